"""DATASET and CACHE: what is read is what was committed; damage, swaps and foreign pieces are named."""

import builtins
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from make_cache import add_unit, features, make_cache, make_identity, reseal, view
from make_dataset import make_dataset

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import CorruptionError, IdentityError, UsageError
from cache_tools.info import info, summary
from cache_tools.records import encode_record
from cache_tools.storage import try_lock
from cache_tools.verify import verify
from cache_tools.writer import publish_identity, shard_lock


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("made") / "cache").path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.mark.parametrize(("dtype", "compress"), [("int8", None), ("float16", None), ("int8", "zstd")])
def test_chunks_are_the_rows_that_were_written(tmp_path: Path, dtype: str, compress: str | None) -> None:
    unit = Cache(str(make_cache(tmp_path / "cache", dtype=dtype, compress=compress).path)).unit("train", 1)
    seen = 0
    for chunk in unit:
        pictures = chunk.images()
        sources = np.stack([view("train", 1, row) for row in range(chunk.row0, chunk.row0 + chunk.rows)])
        assert np.abs(pictures.astype(int) - sources).mean() < 4
        assert np.abs(chunk.features() - features(pictures)).max() < 0.2
        assert chunk.labels.tolist() == [row % 2 for row in range(chunk.row0, chunk.row0 + chunk.rows)]
        seen += chunk.rows
    assert seen == 100
    mean, std = unit.channel_stats()
    whole = np.concatenate([chunk.features() for chunk in unit])
    assert np.allclose(mean, whole.mean((0, 1)), atol=0.01) and np.allclose(std, whole.std((0, 1)), atol=0.01)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_chunk_of_a_known_shard_opens_its_views_and_features_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    unit = make_cache(tmp_path / "cache", views=1, val_rows=0, dtype=dtype).all_units()[0]
    names = [name for name in ("patch", "scale") if name in unit.specs]
    into = {name: np.empty(unit.specs[name].chunk_shape, unit.specs[name].dtype) for name in names}
    expected = [unit.chunk(number).features() for number in range(4)]
    opened: list[str] = []
    for module in (os, builtins):

        def noted(path: Any, *rest: Any, real: Any = module.open) -> Any:
            opened.append(str(path))
            return real(path, *rest)

        monkeypatch.setattr(module, "open", noted)
    for number in range(4):
        assert (unit.chunk(number, into).features() == expected[number]).all()
    arrays = [str(unit.group / unit.specs[name].shard_file(0)) for name in names]
    assert opened == [str(unit.tar(0)), *arrays] * 4


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_foreign_reader_reads_the_same(tmp_path: Path, compress: str | None) -> None:
    """zarr-python and tarfile alone, by docs/format.md: no code of ours computes what it finds."""
    cache = make_cache(tmp_path / "cache", compress=compress)
    for unit in cache.all_units():
        group = zarr.open_group(unit.path / "features.zarr", mode="r")
        codes, scale, cls = (group[name][:] for name in ("patch", "scale", "cls"))
        shard_of_row = np.arange(len(codes)) // json.loads((cache.path / "cache.json").read_text())["rows_per_shard"]
        mean, std = (group[name][:][shard_of_row][:, None] for name in ("channel_mean", "channel_std"))
        theirs = codes.astype(np.float32) * scale[..., None] * std + mean
        names, pictures, labels = [], [], []
        for tar in sorted((unit.path / "views").glob("*.tar")):
            with tarfile.open(tar) as opened:
                for member in opened:
                    names.append(member.name)
                    data = opened.extractfile(member).read()
                    labels.append(int(data)) if member.name.endswith(".cls") else pictures.append(data)
        assert names == [f"{row:09d}.{kind}" for row in range(unit.rows) for kind in ("jpg", "cls")]
        for number in range(unit.num_chunks):
            chunk = unit.chunk(number)
            rows = slice(chunk.row0, chunk.row0 + chunk.rows)
            assert (codes[rows] == chunk.codes).all() and (cls[rows] == chunk.cls).all()
            assert np.allclose(theirs[rows], chunk.features(), atol=1e-4)
            assert pictures[rows] == chunk.pictures and labels[rows] == chunk.labels.tolist()


def test_users_get_a_read_only_group(cache: Path) -> None:
    group = Cache(cache).zarr("train", 1)
    assert (group["patch"][16:32] == Cache(cache).units("train")[1].chunk(1).codes).all()
    with pytest.raises(ValueError, match="read.only"):
        group["patch"][0] = 0
    with pytest.raises(UsageError, match="found no val/v1; there is train/v0, train/v1, val/v0"):
        Cache(cache).zarr("val", 1)
    path = cache / "train" / "v0" / "features.zarr" / "patch" / "zarr.json"
    path.write_text(path.read_text().replace("100", "1000000000000"))
    with pytest.raises(CorruptionError, match=r"patch/zarr\.json"):
        Cache(cache).zarr("train")


def test_a_cache_of_a_dtype_that_was_removed_is_refused_with_the_allowed_ones(cache: Path) -> None:
    reseal(cache / "cache.json", lambda payload: payload.update(dtype="int4", compress="blosc"))
    with pytest.raises(IdentityError, match=r"dtype: 'int8' or 'float16' != 'int4'; compress: 'zstd' != 'blosc'"):
        Cache(cache)


def read_all(cache: Path) -> None:
    opened = Cache(cache)
    for unit in opened.complete_units("train") + opened.complete_units("val"):
        unit.check_arrays()
        for number in range(unit.num_chunks):
            unit.chunk(number)


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
def test_verify_and_reading_find_lost_files(cache: Path, damage: str) -> None:
    unit = Cache(cache).complete_units("train")[0]
    files = [unit.tar(0), unit.index_file(0), unit.group / "patch" / "c.0.0.0", unit.commit_file(0)]
    for path in [*files, unit.group / "patch" / "zarr.json"]:
        good = path.read_bytes()
        path.unlink() if damage == "delete" else path.write_bytes(
            good[: len(good) // 2] if damage == "truncate" else b""
        )
        assert any(str(path) in problem.text for problem in verify(cache, quiet=True).problems), path
        with pytest.raises(CorruptionError):
            read_all(cache)
        path.write_bytes(good)


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


@pytest.mark.parametrize("what", ["tars", "tars and indexes", "features", "commits", "shards", "units"])
def test_swapped_pieces_stop_by_name(cache: Path, what: str) -> None:
    """Each of these is intact by itself: only what binds the pieces together can tell."""
    a, b = Cache(cache).complete_units("train")
    pairs = {
        "tars": [(a.tar(0), b.tar(0))],
        "tars and indexes": [(a.tar(0), b.tar(0)), (a.index_file(0), b.index_file(0))],
        "features": [(a.group / "patch" / "c.0.0.0", b.group / "patch" / "c.0.0.0")],
        "commits": [(a.commit_file(0), b.commit_file(0))],
        "shards": [(a.commit_file(0), a.commit_file(1)), (a.tar(0), a.tar(1)), (a.index_file(0), a.index_file(1))],
        "units": [(a.manifest_file, b.manifest_file)],
    }[what]
    for first, second in pairs:
        swap(first, second)
    with pytest.raises((CorruptionError, IdentityError), match=str(cache)):
        read_all(cache)
    assert verify(cache, quiet=True).problems


def test_a_foreign_shard_of_the_same_shape_is_refused(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=5).complete_units("train")[0]
    unit = Cache(cache).complete_units("train")[0]
    for name in ("views", "features.zarr", "commits"):
        shutil.copytree(other.path / name, unit.path / name, dirs_exist_ok=True)
    with pytest.raises(CorruptionError, match="commit"):
        read_all(cache)


def test_identity_differences_are_listed(cache: Path) -> None:
    with pytest.raises(IdentityError, match=r"seed: 9 != 0"):
        publish_identity(cache, make_identity({"train": 100, "val": 40}, seed=9))
    data = encode_record(Cache(cache).identity.model_copy(update={"version": 2}))
    (cache / "cache.json").write_bytes(data)
    with pytest.raises(IdentityError, match="format version 1; found 2"):
        Cache(cache)


def test_units_are_complete_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "cache", views=1)
    unit = add_unit(cache.path, cache.identity, "train", 3)
    assert [str(unit) for unit in cache.complete_units("train")] == ["train/v0", "train/v3"]
    unit.manifest_file.unlink()
    unit.commit_file(1).unlink()
    assert [str(unit) for unit in cache.complete_units("train")] == ["train/v0"]
    with try_lock(shard_lock(cache.path, "train", 1)):
        monkeypatch.setattr("fcntl.flock", None)  # info takes no lock: a worker would pass over the shard
        known = info(cache.path)
    assert known["units"]["train/v3"]["shards"] == 1 and "1 of 2 shards" in summary(known)


def test_no_cache_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mcm-cache extract"):
        Cache(tmp_path)
    with pytest.raises(UsageError, match="mcm-cache shard"):
        Dataset(tmp_path)
    for read in (info, verify):
        with pytest.raises(UsageError, match="DATASET .* or a CACHE"):
            read(tmp_path)


def test_dataset_rows_and_damage(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    assert dataset.labels("train").tolist() == [row % 2 for row in range(96)]
    assert dataset.picture("val", 3)[1] == 1
    with pytest.raises(UsageError, match="did you mean 'train'"):
        dataset.rows("trian")
    assert not verify(dataset.path, quiet=True).problems and "classes" in summary(info(dataset.path))
    for path in (dataset.tar("train", 0), dataset.tar("train", 0).with_suffix(".index.npy")):
        good = path.read_bytes()
        path.write_bytes(good[:600] + bytes([good[600] ^ 4]) + good[601:])
        assert any(str(path) in problem.text for problem in verify(dataset.path, quiet=True).problems)
        path.write_bytes(good)


def test_names_that_only_look_like_numbers_are_no_units_or_commits(cache: Path) -> None:
    (cache / "train" / "v\u00b2").mkdir()
    (cache / "train" / "v01").mkdir()
    (cache / "train" / "v0" / "commits" / "\u00b2.json").write_bytes(b"{}")
    units = Cache(cache).units("train")
    assert [unit.view for unit in units] == [0, 1] and units[0].committed() == [0, 1]


def test_pictures_of_two_splits_are_compared_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_dataset(tmp_path / "apart").copies("val", "train").size == 0
    dataset = make_dataset(tmp_path / "copied", rows=64, copies=3)
    assert dataset.copies("val", "train").tolist() == [0, 1, 2] and dataset.copies("train", "val").tolist() == [
        61,
        62,
        63,
    ]
    read: list[tuple[str, int]] = []
    monkeypatch.setattr(dataset, "picture", lambda split, row: (read.append((split, row)), (split.encode(), 0))[1])
    assert dataset.copies("val", "train").size == 0, "a size and a crc32c that agree by chance"
    assert {row for split, row in read if split == "val"} == {0, 1, 2} and len(read) == 6
