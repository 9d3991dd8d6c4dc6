"""The Hub, by the real huggingface_hub against a stand-in of its server; training from a remote, to the bit."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import command, run, tree_digest
from hub_server import TOKEN, HubServer, hub_server
from make_cache import make_cache
from s3_server import SECRET, Server, s3_server
from test_mcm_pretrain import make_config, metrics

from cache_tools.cache import Cache
from cache_tools.errors import CorruptionError, IdentityError, ResourceError, UsageError
from cache_tools.local_part import attached
from cache_tools.records import write_toml
from cache_tools.remote import elsewhere, open_remote
from cache_tools.transfer import pull, push
from cache_tools.verify import verify
from mcm.pretrain import pretrain
from mcm.stream import CacheDataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("share") / "cache", rows=200).path


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def s3(cache: Path) -> Iterator[Server]:
    elsewhere.cache_clear()
    with s3_server() as server:
        push(cache, f"{server.url}/cache")
        yield server


@pytest.mark.parametrize("kind", ["datasets", "buckets"])
def test_the_hub(
    kind: str, hub: HubServer, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def upload(_: object, bucket: str, add: list[tuple[Path | bytes, str]]) -> None:
        assert bucket == "me/cache"  # a bucket takes uploads by the xet protocol only, which the stand-in lacks
        hub.files |= {name: one if isinstance(one, bytes) else one.read_bytes() for one, name in add}

    monkeypatch.setattr("huggingface_hub.HfApi.batch_bucket_files", upload)
    address = f"hf://{kind}/me/cache/vit"
    assert "15 of 15" in push(cache, address) and "0 of 14" in push(cache, address)
    assert hub.private and hub.files["vit/README.md"].startswith(b"---\nlicense: other\n")
    pull(address, tmp_path / "pulled")
    assert tree_digest(tmp_path / "pulled") == tree_digest(cache)
    name = "train/v0/views/000000.tar"
    assert bytes(open_remote(address).range(name, 512, 100)) == (cache / name).read_bytes()[512:612]
    with pytest.raises(IdentityError, match="cache.json"):
        push(make_cache(tmp_path / "other", seed=1).path, address)
    hub.files["vit/train/v0/features.zarr/patch/c.0.0.0"] = b"x" * 16720
    with pytest.raises(CorruptionError, match=r"hf://.*patch/c.0.0.0: expected"):
        pull(address, tmp_path / "damaged")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = "".join(capfd.readouterr()).encode()
    assert not [one for one in (said, *written, *hub.files.values()) if TOKEN.encode() in one]


def test_a_push_to_the_hub_that_another_one_overtakes(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    hub.fail = 1
    with pytest.raises(ResourceError, match="412.*run the command again"):
        push(cache, "hf://datasets/me/cache")
    push(cache, "hf://datasets/me/cache")
    for names in hub.commits:  # no commit of the repository has a record without its files
        shards = {name for name in names if "/commits/" in name}
        assert all(name.replace("commits", "views").replace("json", "tar") in names for name in shards)
    with pytest.raises(UsageError, match="expected a CACHE, a DATASET or an exported folder; found 0"):
        pull("hf://datasets/me/nothing", tmp_path / "none")


@pytest.mark.parametrize("limit", [60_000, 110_000, 10**9])
@pytest.mark.parametrize(("dtype", "compress"), [("int8", None), ("float16", "zstd")])
def test_a_remote_gives_the_same_batches(
    tmp_path: Path, s3: Server, limit: int, dtype: str, compress: str | None
) -> None:
    whole = make_cache(tmp_path / "cache", rows=200, dtype=dtype, compress=compress).path
    address, folder = f"{s3.url}/{tmp_path.name}", tmp_path / "local"
    push(whole, address)
    for bound in (10**9, limit):  # what no longer fits is removed
        with attached(address, folder, bound):
            for ours, theirs in zip(CacheDataset(folder, 32, 2), CacheDataset(whole, 32, 2), strict=True):
                assert all((ours[name] == theirs[name]).all() for name in theirs)
        sizes = open_remote(str(folder)).sizes()
        assert sum(sizes.values()) <= bound and any(".tar" in name for name in sizes) == (bound > 100_000)
    complete = tree_digest(folder) == tree_digest(whole)
    assert complete == (limit == 10**9) and bool(verify(folder, quiet=True).problems) != complete
    pull(address, folder)
    assert tree_digest(folder) == tree_digest(whole)


def test_a_remote_that_is_damaged_or_too_large(s3: Server, cache: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="--local-bytes: expected [0-9]+ for the records; found 1000"),
        attached(f"{s3.url}/cache", tmp_path / "small", 1000),
    ):
        pass
    push(cache, f"{s3.url}/damaged")
    for name, data in s3.objects("damaged/").items():
        if "/patch/c." in name:
            s3.put(f"damaged/{name}", bytes(one ^ 1 for one in data))
    with attached(f"{s3.url}/damaged", tmp_path / "local", 70_000) as folder:
        with pytest.raises(CorruptionError, match="patch/c.*: chunk .*: expected the crc32c of the commit"):
            CacheDataset(folder, 32)[0]
        assert not list(folder.rglob("patch/c.*"))


def test_training_from_a_remote_resumes_with_the_same_losses(s3: Server, cache: Path, tmp_path: Path) -> None:
    config = make_config(train={"workers": 2})
    pretrain(config, cache, tmp_path / "expected")
    (tmp_path / "config.toml").write_text(write_toml(config))
    options = ["--cache", f"{s3.url}/cache", "--out", tmp_path / "run", "--local-cache", tmp_path / "local"]
    line = command("mcm-train", "pretrain", tmp_path / "config.toml", *options, "--local-bytes", "100KB")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (log := tmp_path / "run" / "metrics.jsonl").is_file() or log.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, process.communicate()
        process.kill()
    said = run(*line_of(line))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "expected") and SECRET not in said
    assert Cache(tmp_path / "local").sha256 == Cache(cache).sha256
    assert "--local-cache FOLDER" in run("mcm-train", *line_of(line)[1:-4], expect=2)


def line_of(line: list[str]) -> list[str]:
    """The program and the arguments of a line of `command`."""
    return ["mcm-train", *line[3:]]
