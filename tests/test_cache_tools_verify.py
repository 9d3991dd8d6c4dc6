"""verify: what each level reads and finds, which shards a subset takes, what no checksum can see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_cache import FINGERPRINT, GEOMETRY, add_unit, features, make_cache, make_identity, view
from make_dataset import make_dataset

from cache_tools.cache import Cache, Unit
from cache_tools.errors import CorruptionError, UsageError
from cache_tools.file_checks import check_tar, finite
from cache_tools.identity import Fidelity, FileEntry
from cache_tools.images import encode_view
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.records import sha256_hex
from cache_tools.tars import INDEX_DTYPE, TarShardWriter
from cache_tools.verify import verify
from cache_tools.writer import UnitShardWriter, finish_unit, publish_identity

ALL = [("int8", None), ("int8", "zstd"), ("float16", "zstd"), ("float16", None)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache").path


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("dtype", "compress"), ALL)
def test_every_level_of_an_intact_cache(tmp_path: Path, dtype: str, compress: str | None) -> None:
    path = make_cache(tmp_path / "cache", dtype=dtype, compress=compress).path
    reports = [verify(path, quiet=True, **level) for level in ({"quick": True}, {}, {"full": True}, {"threads": 1})]
    assert [report.problems for report in reports] == [[]] * 4
    assert [report.rows for report in reports] == [0, 240, 240, 240] and len({report.files for report in reports}) == 1


@pytest.mark.parametrize(("dtype", "compress"), ALL)
def test_what_each_level_finds(tmp_path: Path, dtype: str, compress: str | None) -> None:
    unit = make_cache(tmp_path / "cache", views=1, val_rows=0, dtype=dtype, compress=compress).all_units()[0]
    path, patch = unit.path.parents[1], unit.group / unit.specs["patch"].shard_file(1)
    flip(patch, 40)
    assert not verify(path, quick=True, quiet=True).problems  # sizes alone
    for full in (False, True):
        (problem,) = verify(path, full=full, quiet=True).problems
        expected = (str(patch), "patch", "train", "train/v0", 1)
        assert (problem.file, problem.what, problem.split, problem.unit, problem.shard) == expected
        assert str(patch) in problem.text
    patch.write_bytes(patch.read_bytes()[:-1])
    (problem,) = verify(path, quick=True, quiet=True).problems
    assert problem.file == str(patch) and "bytes; found" in problem.text


def test_one_damaged_file_hides_no_other(cache: Path) -> None:
    first, second = Cache(cache).units("train")
    damaged = [first.index_file(0), first.group / "cls" / "c.0.0", first.commit_file(1), second.manifest_file]
    damaged += [second.tar(1), second.group / "patch" / "zarr.json"]
    for path in damaged:
        flip(path, 200)
    (cache / "probe.npy").write_bytes(b"no array")
    report = verify(cache, full=True, quiet=True)
    assert {problem.file for problem in report.problems} == {str(path) for path in (*damaged, cache / "probe.npy")}
    assert {problem.shard for problem in report.problems if problem.what in ("manifest", "zarr.json")} == {None}


def test_a_subset_is_drawn_by_hash_and_grows(tmp_path: Path) -> None:
    identity = make_identity({"train": 640}, rows_per_shard=16)
    publish_identity(tmp_path / "cache", identity)
    unit = add_unit(tmp_path / "cache", identity, "train", 0)
    for shard in range(40):
        flip(unit.tar(shard), 512)

    def found(share: float, seed: int = 0) -> set[int | None]:
        report = verify(tmp_path / "cache", share=share, seed=seed, quiet=True)
        assert report.of == 40 and report.shards == len(report.problems)
        return {problem.shard for problem in report.problems}

    assert len(found(0.001)) == 1 and len(found(0.1)) == 4 and len(found(1.0)) == 40
    assert found(0.1) == found(0.1) < found(0.5) and found(0.1) != found(0.1, seed=1)
    for share in (0.0, 1.5):
        with pytest.raises(UsageError, match="--subset"):
            verify(tmp_path / "cache", share=share)


def write_codes(
    path: Path, dtype: str, said: float | None = None, scale: float = 1.0, size: int = 32, constant: int = 0
) -> Path:
    """A cache of one shard with its true error, or a commit that says another; scales and views can be wrong."""
    identity = make_identity({"train": 64}, dtype)
    publish_identity(path, identity)
    unit, sides = Unit(path, identity, "train", 0), (size, size, 3)
    x = features(np.stack([view("train", 0, row) for row in range(64)]), identity.channels)
    x[..., :constant] = 3.0
    mean, std = channel_stats(x)
    arrays = encode(dtype, x, mean, std)
    q = decode(arrays["patch"], arrays.get("scale"), mean, std)
    loss = (((q - x) / std) ** 2).sum() / (((x - mean) / std) ** 2).sum()
    arrays["scale"] = (arrays["scale"] * scale).astype(unit.specs["scale"].dtype)
    with UnitShardWriter(unit, 0) as writer:
        for row in range(64):
            writer.add_view(encode_view(np.full(sides, row, np.uint8), identity.view_encoding), row % 2, GEOMETRY)
        for name, rows in (arrays | {"cls": x.mean(1).astype(np.float16)}).items():
            writer.add(name, rows)
        writer.add("channel_mean", mean[None])
        writer.add("channel_std", std[None])
        flat = x.reshape(-1, identity.channels).astype(np.float64)
        fidelity = Fidelity(relative_mse=float(loss) if said is None else said, cosine=1.0, precision_mse=0.0)
        writer.commit(flat.mean(0), flat.var(0), fidelity, FINGERPRINT)
    assert finish_unit(unit)
    return path


def test_the_scales_must_stand_for_the_error(tmp_path: Path) -> None:
    """Every sum agrees in these: only the formula sees scales or a commit that are not those of the features."""
    for constant in (0, 5):  # a constant channel has no error at all
        good = write_codes(tmp_path / f"good{constant}", "int8", constant=constant)
        assert not verify(good, full=True, quiet=True).problems
    for name, wrong in {"scaled": {"scale": 0.8}, "blamed": {"said": 0.5}}.items():
        path = write_codes(tmp_path / name, "int8", **wrong)
        assert not verify(path, quiet=True).problems
        (problem,) = verify(path, full=True, quiet=True).problems
        assert problem.what == "patch" and "its commit says" in problem.text


def test_values_that_are_not_finite_and_views_of_another_size(tmp_path: Path) -> None:
    path = write_codes(tmp_path / "inf", "int8", scale=np.inf)
    assert [problem.what for problem in verify(path, full=True, quiet=True).problems] == ["scale"]
    path = write_codes(tmp_path / "small", "int8", size=24)
    (problem,) = verify(path, full=True, quiet=True).problems
    assert "expected views of (32, 32); found (24, 24)" in problem.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_looks_at_exponents(value: float) -> None:
    extremes = np.array([[0, -0.0, 65504, -65504, 6e-8]] * 9, np.float16)
    assert finite(extremes) and finite(extremes.astype(np.float32))
    for dtype in (np.float16, np.float32):
        bad = extremes.astype(dtype)
        bad[7, 1] = value
        assert not finite(bad)


MEMBERS = {"jpg": b"\xff\xd8\xff picture", "cls": b"1", "json": b"{}"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, fields: (key, fields), ""),
        (lambda key, fields: (key, {"jpg": fields["jpg"], "cls": b"1"}), ""),
        (lambda key, fields: (key.replace("3", "4"), fields), "expected 000000003.jpg, found b.000000004"),
        (lambda key, fields: (key, fields | {"cls": b"2"}), "labels"),
        (lambda key, fields: (key, fields | {"cls": b""}), "invalid literal"),
        (lambda key, fields: (key, {"jpg": fields["jpg"]}), "cls"),
        (lambda key, fields: (key, fields | {"txt": b"more"}), "something else lies between"),
    ],
)
def test_a_tar_is_walked_against_its_index(tmp_path: Path, change, said: str) -> None:
    path, index = tmp_path / "rows.tar", np.zeros(70, INDEX_DTYPE)
    with TarShardWriter(path) as writer:
        for row in range(70):
            key, fields = change(f"{row:09d}", MEMBERS)
            index[row] = (*writer.add(key, fields, picture="jpg"), 1)
    data = path.read_bytes()
    entry = FileEntry(bytes=len(data), sha256=sha256_hex(data))
    check_tar(path, index, 0, entry, full=False)
    if not said:
        return check_tar(path, index, 0, entry, full=True)
    with pytest.raises(CorruptionError, match=f"{path}.*{said}"):
        check_tar(path, index, 0, entry, full=True)
    return None


def test_an_index_of_other_places(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    index, entry = dataset.index("train", 0).copy(), dataset.split("train").shards[0]
    file = FileEntry(bytes=entry.tar_bytes, sha256=entry.tar_sha256)
    check_tar(dataset.tar("train", 0), index, 0, file, full=True)
    for field, row, value in (("offset", 0, 1024), ("offset", 3, 10), ("size", 95, 1 << 30)):
        wrong = index.copy()
        wrong[field][row] = value
        with pytest.raises(CorruptionError, match="do not follow one another"):
            check_tar(dataset.tar("train", 0), wrong, 0, file, full=False)


def test_a_dataset_by_level(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    tar = dataset.tar("val", 0)
    flip(tar, -1)  # behind the last picture
    assert not verify(dataset.path, quick=True, quiet=True).problems and not verify(dataset.path, quiet=True).problems
    (problem,) = verify(dataset.path, full=True, quiet=True).problems
    assert (problem.file, problem.what, problem.split, problem.shard) == (str(tar), "tar", "val", 0)
    flip(dataset.path / "dataset.json", 300)
    assert [found.what for found in verify(dataset.path, quiet=True).problems] == ["dataset.json"]


def test_no_right_to_read_is_no_damage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard must not be redone because a mount was not ready."""
    monkeypatch.setattr(
        "cache_tools.verify.check_array", lambda *arguments: (_ for _ in ()).throw(PermissionError(13, "x"))
    )
    with pytest.raises(PermissionError):
        verify(cache, quiet=True)
    assert replace(verify(cache, quick=True, quiet=True)).problems == []
