"""verify: which damage each level names, by file and chunk, and which shards a subset takes."""

from pathlib import Path

import pytest
from make_cache import add_unit, make_cache, make_identity
from make_dataset import make_dataset

from cache_tools.cache import Cache
from cache_tools.errors import UsageError
from cache_tools.verify import verify
from cache_tools.writer import publish_identity


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache").path


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def found_in(path: Path) -> dict[str, str]:
    """The name of each damaged file and the parts of it that are named."""
    return {problem.file: problem.text.partition("damaged parts: ")[2] for problem in verify(path, quiet=True).problems}


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_flipped_bit_is_named_by_file_and_chunk(tmp_path: Path, dtype: str, compress: str | None) -> None:
    unit = make_cache(tmp_path / "cache", views=1, val_rows=0, dtype=dtype, compress=compress).all_units()[0]
    path, patch = unit.path.parents[1], unit.group / unit.specs["patch"].shard_file(1)
    reports = [verify(path, quiet=True, **options) for options in ({"quick": True}, {})]
    assert not any(report.problems for report in reports) and [report.rows for report in reports] == [0, 100]
    assert len({report.files for report in reports}) == 1
    flip(patch, 40)
    flip(unit.index_file(0), -1)
    flip(unit.tar(1), 600)
    flip(unit.group / unit.specs["cls"].shard_file(0), -1)  # in the index at its end
    assert not verify(path, quick=True, quiet=True).problems  # sizes alone
    assert found_in(path) == {
        str(patch): "chunk 0",
        str(unit.index_file(0)): "chunk 3",
        str(unit.tar(1)): "row 64",
        str(unit.group / unit.specs["cls"].shard_file(0)): "not located",
    }
    problem = next(problem for problem in verify(path, quiet=True).problems if problem.what == "patch")
    assert (problem.split, problem.unit, problem.shard) == ("train", "train/v0", 1)
    patch.write_bytes(patch.read_bytes()[:-1])
    (problem,) = verify(path, quick=True, quiet=True).problems
    assert problem.file == str(patch) and "bytes; found" in problem.text


def test_swapped_chunks_and_swapped_files_are_named(cache: Path) -> None:
    first, second = Cache(cache).units("train")
    patch, data = first.group / "patch" / "c.0.0.0", (first.group / "patch" / "c.0.0.0").read_bytes()
    size = first.specs["patch"].chunk_bytes + 4
    patch.write_bytes(data[:size] + data[2 * size : 3 * size] + data[size : 2 * size] + data[3 * size :])
    scales = [unit.group / "scale" / "c.1.0" for unit in (first, second)]
    exchanged = [scale.read_bytes() for scale in reversed(scales)]
    for scale, other in zip(scales, exchanged, strict=True):
        scale.write_bytes(other)
    assert found_in(cache) == {str(patch): "chunk 1, chunk 2"} | {
        str(scale): "chunk 0, chunk 1, chunk 2" for scale in scales
    }


def test_one_damaged_file_hides_no_other(cache: Path) -> None:
    first, second = Cache(cache).units("train")
    damaged = [first.index_file(0), first.group / "cls" / "c.0.0", first.commit_file(1), second.manifest_file]
    damaged += [second.tar(1), second.group / "patch" / "zarr.json"]
    for path in damaged:
        flip(path, 200)
    (cache / "probe.json").write_bytes(b"no record")
    report = verify(cache, quiet=True)
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


def test_a_dataset_by_level(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    tar = dataset.tar("val", 0)
    flip(tar, -1)  # behind the last picture
    assert not verify(dataset.path, quick=True, quiet=True).problems
    (problem,) = verify(dataset.path, quiet=True).problems
    assert (problem.file, problem.what, problem.split, problem.shard) == (str(tar), "tar", "val", 0)
    flip(tar, 600)
    assert found_in(dataset.path) == {str(tar): "row 0"}
    flip(dataset.path / "dataset.json", 300)
    assert [found.what for found in verify(dataset.path, quiet=True).problems] == ["dataset.json"]


def test_no_right_to_read_is_no_damage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard must not be redone because a mount was not ready."""
    monkeypatch.setattr("cache_tools.verify.file_sha256", lambda path: (_ for _ in ()).throw(PermissionError(13, "x")))
    with pytest.raises(PermissionError):
        verify(cache, quiet=True)
    assert not verify(cache, quick=True, quiet=True).problems
