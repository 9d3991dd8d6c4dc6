"""Push and pull: the same bytes arrive, or an error names the file; a part of a CACHE is a CACHE."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import run, tree_digest
from make_cache import add_unit, make_cache, make_identity
from make_dataset import make_dataset
from s3_server import KEY_ID, SECRET, Server, s3_server

from cache_tools.cache import Cache
from cache_tools.errors import CorruptionError, IdentityError, ResourceError, UsageError
from cache_tools.preview import preview
from cache_tools.records import encode_record
from cache_tools.remote import open_remote
from cache_tools.storage import write_atomic
from cache_tools.transfer import FilesRecord, Part, pull, push
from cache_tools.verify import verify
from cache_tools.writer import publish_identity

PATCH = "train/v0/features.zarr/patch/c.1.0.0"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 shards of two views of train, and one of val, with a projection and extract.toml."""
    path = tmp_path_factory.mktemp("share") / "cache"
    make_cache(path, rows=170, projection=np.ones((16, 4), np.float32))
    write_atomic(path / "extract.toml", b"views = 2\n")
    return path


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=[pytest.param("s3", marks=pytest.mark.slow), "folder"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty remote of a test of its own."""
    if request.param == "folder":
        return str(tmp_path / "remote")
    return f"{request.getfixturevalue('s3').url}/{tmp_path.name}"


def test_what_is_pushed_is_pulled_to_the_byte(cache: Path, address: str, tmp_path: Path) -> None:
    assert "13 of 13" in push(cache, address) and "0 of 12" in push(cache, address)
    pull(address, tmp_path / "pulled")
    assert tree_digest(tmp_path / "pulled") == tree_digest(cache) and not verify(tmp_path / "pulled").problems
    assert "0 of 12" in pull(address, tmp_path / "pulled")
    card = open_remote(address).content("README.md").decode()
    assert (
        "test:linear" in card
        and "teacher: last" in card
        and Cache(cache).sha256 in card
        and "170 rows" in card
        and str(cache) not in card
    )
    (tmp_path / "pulled" / PATCH).unlink()  # what is missing comes back
    assert "1 of 12" in pull(address, tmp_path / "pulled")
    assert tree_digest(tmp_path / "pulled") == tree_digest(cache)


def test_a_dataset_and_an_export(address: str, tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset")
    push(tmp_path / "dataset", f"{address}/d")
    pull(f"{address}/d", tmp_path / "pulled")
    assert tree_digest(tmp_path / "pulled") == tree_digest(tmp_path / "dataset")
    for name in ("README.md", "config.json", "model.safetensors"):
        write_atomic(tmp_path / "export" / name, name.encode())
    push(tmp_path / "export", f"{address}/e")
    pull(f"{address}/e", tmp_path / "weights")
    assert tree_digest(tmp_path / "weights") == tree_digest(tmp_path / "export")
    for place in (f"{address}/d", f"{address}/e"):
        with pytest.raises(UsageError, match="no other folder can be pulled in part"):
            pull(place, tmp_path / "part", Part(first=0.5))
    cache = make_cache(tmp_path / "cache").path
    with pytest.raises(UsageError, match="expected a CACHE or a new or empty folder; found a DATASET"):
        pull(str(cache), tmp_path / "pulled")
    with pytest.raises(UsageError, match="expected a CACHE or nothing there; found a DATASET"):
        push(cache, f"{address}/d")
    (tmp_path / "photos").mkdir(), (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UsageError, match="found other files, such as a.jpg"):
        pull(str(cache), tmp_path / "photos")
    with pytest.raises(UsageError, match="expected a CACHE, a DATASET or an exported folder; found 0"):
        pull(f"{address}/nothing", tmp_path / "none")


@pytest.mark.parametrize(("first", "rows"), [(0.3, 64), (0.34, 128), (0.99, 170), (1.0, 170)])
def test_the_first_shards_are_a_cache_of_their_own(cache: Path, tmp_path: Path, first: float, rows: int) -> None:
    pull(str(cache), tmp_path / "part", Part(first=first))
    part, whole = Cache(tmp_path / "part"), Cache(cache)
    assert part.identity.rows == {"train": rows, "val": 40} and not verify(part.path).problems
    assert (part.sha256 == whole.sha256) == (rows == 170)
    for unit in part.all_units():
        assert unit.complete
        for ours, theirs in zip(unit, whole.unit(unit.split, unit.view), strict=False):
            assert (ours.codes == theirs.codes).all() and (ours.images() == theirs.images()).all()
        assert part.zarr(unit.split, unit.view)["patch"].shape[0] == unit.rows
    if rows < 170:
        with pytest.raises(IdentityError, match="cache.json"):
            pull(str(cache), tmp_path / "part")


def test_views_splits_and_unfinished_units(cache: Path, tmp_path: Path) -> None:
    pull(str(cache), tmp_path / "one", Part(views=1))
    assert list(map(str, Cache(tmp_path / "one").all_units())) == ["train/v0", "val/v0"]
    pull(str(cache), tmp_path / "val", Part(splits=["val"]))
    assert list(map(str, Cache(tmp_path / "val").all_units())) == ["val/v0"]
    with pytest.raises(UsageError, match="expected a split 'vall'; found train, val; did you mean 'val'"):
        pull(str(cache), tmp_path / "vall", Part(splits=["vall"]))
    shutil.copytree(cache, tmp_path / "begun")
    for name in ("manifest.json", "commits/000001.json"):
        (tmp_path / "begun" / "train" / "v1" / name).unlink()
    push(tmp_path / "begun", str(tmp_path / "remote"))
    pull(str(tmp_path / "remote"), tmp_path / "begun too")
    assert not verify(tmp_path / "begun too").problems
    assert [unit.complete for unit in Cache(tmp_path / "begun too").units("train")] == [True, False]
    push(cache, str(tmp_path / "remote"))  # the rest, when it is there
    pull(str(tmp_path / "remote"), tmp_path / "begun too")
    assert tree_digest(tmp_path / "begun too") == tree_digest(cache)


def test_features_alone_are_read_and_do_not_train(cache: Path, tmp_path: Path) -> None:
    pull(str(cache), tmp_path / "bare", Part(features_only=True))
    bare, whole = Cache(tmp_path / "bare"), Cache(cache)
    assert not list(bare.path.rglob("*.tar")) and not verify(bare.path).problems
    for ours, theirs in zip(bare.unit("train"), whole.unit("train"), strict=True):
        assert (ours.features() == theirs.features()).all() and (ours.labels == theirs.labels).all()
    with pytest.raises(UsageError, match="found features only; `mcm-train probe` and Cache.zarr"):
        preview(bare.path, tmp_path / "sheet.png")
    push(bare.path, str(tmp_path / "remote"))
    pull(str(tmp_path / "remote"), tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(bare.path)


def test_another_cache_or_another_commit_is_refused(cache: Path, address: str, tmp_path: Path) -> None:
    push(cache, address)
    before = open_remote(address).sizes()
    with pytest.raises(IdentityError, match="cache.json: expected the bytes that are copied; found others"):
        push(make_cache(tmp_path / "other", rows=170, seed=1).path, address)
    identity, float16 = make_identity({"train": 170, "val": 40}), tmp_path / "float16"
    publish_identity(float16, identity)  # the same request with other pictures: another fingerprint does that
    add_unit(float16, identity, "val", 0)
    push(float16, f"{address}/two")
    write_atomic(float16 / "val/v0/commits/000000.json", b"?")
    with pytest.raises(CorruptionError, match=r"000000.json: expected a JSON record"):
        push(float16, f"{address}/two")
    remote = open_remote(f"{address}/three")
    remote._create("cache.json", (cache / "cache.json").read_bytes())
    remote._create("train/v1/commits/000001.json", b"{}")
    with pytest.raises(IdentityError, match=r"v1/commits/000001.json: expected the bytes that are copied"):
        push(cache, f"{address}/three")
    assert {name: size for name, size in open_remote(address).sizes().items() if name in before} == before


def test_a_damaged_file_is_not_pushed(cache: Path, address: str, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "damaged")
    file = tmp_path / "damaged" / PATCH
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(CorruptionError, match="c.1.0.0: expected .* bytes with the recorded sha256"):
        push(tmp_path / "damaged", address)
    assert not {PATCH, "train/v0/commits/000001.json", "train/v0/manifest.json"} & open_remote(address).sizes().keys()
    push(cache, address)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["error", "reset", "truncated", "slow", "damaged"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_faults_of_the_network(s3: Server, cache: Path, tmp_path: Path, kind: str, method: str) -> None:
    met, hurt = set(), (PATCH, "train/v0/commits/000000.json", "v1/views/000001.tar")

    def fault(asked: str, path: str) -> str:
        if asked != method or path in met or not path.endswith(hurt):
            return ""
        met.add(path)
        return kind

    address = f"{s3.url}/{tmp_path.name}"
    for step in (lambda: push(cache, address), lambda: pull(address, tmp_path / "pulled")):
        s3.fault = fault
        for _ in range(4):
            try:
                step()
                break
            except CorruptionError as error:
                assert kind == "damaged" and "s3://" in str(error)
                assert not verify(tmp_path / "pulled", quiet=True).problems
            except ResourceError as error:  # a conditional request is not repeated by obstore
                assert method == "PUT" and "run the command again" in str(error)
        else:
            pytest.fail("it did not recover")
    s3.fault = lambda method, path: ""
    assert len(met) == 3 or method == "PUT"
    assert tree_digest(tmp_path / "pulled") == tree_digest(cache)


@pytest.mark.slow
def test_objects_that_are_missing_changed_or_hostile(s3: Server, cache: Path, tmp_path: Path) -> None:
    address, prefix = f"{s3.url}/{tmp_path.name}", tmp_path.name
    push(cache, address)
    s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/{PATCH}")
    with pytest.raises(ResourceError, match=f"{PATCH}: .*not found"):
        pull(address, tmp_path / "pulled")
    assert "1 of 12" in push(cache, address)
    s3.put(f"{prefix}/train/v0/commits/000000.json", b"x" * 50)
    with pytest.raises(CorruptionError, match="s3://.*train/v0/commits/000000.json: expected a JSON record"):
        pull(address, tmp_path / "pulled")
    s3.put(f"{prefix}/train/v0/commits/000000.json", (cache / "train/v0/commits/000001.json").read_bytes())
    with pytest.raises(CorruptionError, match="expected the commit of shard 0 of train/v0"):
        pull(address, tmp_path / "pulled")
    outside = FilesRecord(files={"../outside": {"bytes": 5, "sha256": "0" * 64}})
    s3.put(f"{prefix}/train/v0/commits/000000.json", (cache / "train/v0/commits/000000.json").read_bytes())
    s3.put(f"{prefix}/files.json", encode_record(outside))
    s3.put(f"{prefix.rpartition('/')[0]}/outside", b"12345")
    pull(address, tmp_path / "pulled")
    assert not (tmp_path / "outside").exists()


@pytest.mark.slow
def test_credentials_stay_in_the_environment(
    s3: Server, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{s3.url}/{tmp_path.name}"
    push(cache, address)
    pull(address, tmp_path / "pulled")
    with pytest.raises(UsageError) as refused:
        open_remote(f"s3://{KEY_ID}:{SECRET}@bucket/cache")
    with pytest.raises(UsageError) as query:
        open_remote(f"az://container/cache?sig={SECRET}")
    s3.fault = lambda method, path: "forbidden"
    with pytest.raises(ResourceError) as forbidden:
        pull(address, tmp_path / "more")
    s3.fault = lambda method, path: ""
    texts = [str(error.value) for error in (refused, query, forbidden)] + list(capfd.readouterr())
    texts += [data.decode("latin-1") for data in s3.objects().values()]
    texts += [path.read_text("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in texts if SECRET in text or KEY_ID in text]
    assert "403" in texts[2] and "check the address, the network and the credentials" in texts[2]


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'masked-channel-modeling\[s3\]'"):
        open_remote("s3://bucket/cache")
    for wrong in ("ftp://x/y", "s3://", "hf://models/a/b"):
        with pytest.raises(UsageError, match="expected"):
            open_remote(wrong)


@pytest.mark.slow
def test_the_commands(s3: Server, cache: Path, tmp_path: Path) -> None:
    address, part = f"{s3.url}/{tmp_path.name}", tmp_path / "part"
    said = run("mcm-cache", "push", cache, address)
    said += run("mcm-cache", "pull", address, part, "--first", "30%", "--views", 1, "--split", "train")
    assert "train/v0" in run("mcm-cache", "info", part) and "64 rows" in run("mcm-cache", "verify", part)
    said += run("mcm-cache", "pull", address, part, expect=5)
    assert "--first: expected a share" in run("mcm-cache", "pull", address, part, "--first", "0.1", expect=2)
    os.environ["AWS_ENDPOINT_URL"], before = "http://127.0.0.1:9", os.environ["AWS_ENDPOINT_URL"]
    said += run("mcm-cache", "pull", address, tmp_path / "none", expect=7)
    os.environ["AWS_ENDPOINT_URL"] = before
    assert SECRET not in said and "Traceback" not in said
