"""repair: what is damaged moves away and nothing else; the same command then makes the very bytes again."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run, tree_digest
from make_extract import make_extracted, make_place, request

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset, DatasetRecord
from cache_tools.errors import IdentityError
from cache_tools.records import encode_record
from cache_tools.repair import Repair, repair
from cache_tools.storage import move_durably, try_lock, work_dir, write_atomic
from cache_tools.verify import verify
from cache_tools.writer import shard_lock
from pipeline.decode_pool import DecodePool
from pipeline.extract import extract
from pipeline.shard import shard


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("repair"), refused=2)
    make_extracted(root, "good")
    return root


@pytest.fixture
def cache(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "good", tmp_path / "cache"))


@pytest.fixture
def dataset(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "dataset", tmp_path / "dataset"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mend(path: Path) -> Repair:
    return repair(verify(path, quiet=True))


def reshard(place: Path, dataset: Path) -> None:
    shard(str(place / "pictures"), dataset, rows_per_shard=32, max_refused=0.5)


def shards_at(cache: Path) -> None:
    """Features, a tar, an index: of another shard each, in other ways."""
    first, second, val = Cache(cache).all_units()
    flip(first.group / "patch" / "c.0.0.0")
    second.tar(1).write_bytes(second.tar(1).read_bytes()[:-700])
    val.index_file(0).unlink()


def records_at(cache: Path) -> None:
    """A commit, a manifest, the description of an array."""
    first, second, val = Cache(cache).all_units()
    flip(first.commit_file(2))
    flip(second.manifest_file)
    (val.group / "patch" / "zarr.json").write_bytes(b"{}")


def roots_at(cache: Path) -> None:
    """The probe features and the projection."""
    (cache / "probe.npy").write_bytes(b"")
    flip(cache / "projection.npy")


def identity_at(cache: Path) -> None:
    flip(cache / "cache.json")


@pytest.mark.parametrize("damage", [shards_at, records_at, roots_at, identity_at])
def test_the_same_extract_makes_the_very_bytes_again(place: Path, cache: Path, damage: Callable[[Path], None]) -> None:
    before = {path: path.stat() for path in cache.rglob("*") if path.is_file()}
    damage(cache)
    damaged = {problem.file for problem in verify(cache, quiet=True).problems}
    done = mend(cache)
    assert done.moved and "mcm-cache extract" in done.next
    assert not any(Path(file).exists() for file in damaged)
    if damage is not identity_at:
        left = verify(cache, quiet=True).problems
        assert {problem.what for problem in left} <= {"projection"}  # missing, until `extract` has written it
        assert not mend(cache).moved
    spared = {path for path in before if path.exists()}
    extract(request(place, cache))
    assert tree_digest(cache) == tree_digest(place / "good") and not verify(cache, quiet=True).problems
    redone = {(problem.parent.parent, problem.stem) for problem in map(Path, damaged) if problem.parent.name == "views"}
    kept = [path for path in spared if path.parent.name == "views" and (path.parent.parent, path.stem) not in redone]
    untouched = [path for path in kept if path.stat().st_mtime_ns == before[path].st_mtime_ns]
    assert len(untouched) >= len(kept) - 4  # a shard whose features or commit were damaged is redone whole


def test_intact_shards_are_not_touched_and_nothing_is_overwritten(cache: Path) -> None:
    before = tree_digest(cache)
    for _ in range(2):
        flip(cache / "train/v0/views/000001.tar")
        assert mend(cache).moved == [
            "train/v0/commits/000001.json",
            "train/v0/manifest.json",
            "train/v0/views/000001.tar",
        ]
        gone = before.keys() - tree_digest(cache).keys()
        assert tree_digest(cache).items() <= before.items() and len(gone) == 3
        for name in gone:  # as if made again
            shutil.copy(work_dir(cache) / "quarantine" / "000000" / name, cache / name)
        flip(cache / "train/v0/views/000001.tar")
        assert tree_digest(cache) == before
    assert len(list((work_dir(cache) / "quarantine").glob("*/train/v0/views/000001.tar"))) == 2


def test_killed_before_any_move(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit vouches for what is gone, and the next repair ends where one alone would have ended."""
    shards_at(cache)
    flip(cache / "train/v0/commits/000002.json")
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    moves = len(mend(cache).moved)
    vouched = {name for name in tree_digest(cache) if "commits" in name or "manifest" in name}
    assert moves == 9
    for kill in range(moves):
        trial = Path(shutil.copytree(damaged, tmp_path / f"killed-{kill}" / "cache"))
        left = iter(range(kill))

        def dies(source: Path, target: Path, left: Iterator[int] = left) -> bool:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return move_durably(source, target)

        monkeypatch.setattr("cache_tools.repair.move_durably", dies)
        with pytest.raises(KeyboardInterrupt):
            mend(trial)
        monkeypatch.undo()
        mend(trial)
        assert not verify(trial, quiet=True).problems
        assert vouched == {name for name in tree_digest(trial) if "commits" in name or "manifest" in name}


def test_a_shard_that_a_worker_holds_is_left_to_it(cache: Path) -> None:
    flip(cache / "train/v0/views/000001.tar")
    with try_lock(shard_lock(cache, "train", 1)) as held:
        assert held
        done = mend(cache)
    assert done.held == ["train shard 1"] and not done.moved and (cache / "train/v0/commits/000001.json").is_file()
    assert mend(cache).moved


def test_another_request_cannot_take_the_place_of_a_lost_cache_json(place: Path, cache: Path) -> None:
    identity_at(cache)
    mend(cache)
    before = tree_digest(cache)
    with pytest.raises(IdentityError, match="the request that made its commits"):
        extract(request(place, cache, seed=1))
    assert tree_digest(cache) == before


def test_a_dataset_is_filled_in_from_its_pictures(place: Path, dataset: Path) -> None:
    good = tree_digest(dataset)
    flip(dataset / "train/000001.tar")
    (dataset / "train/000000.index.npy").unlink()
    (dataset / "val/_info.json").write_text("{}")
    done = mend(dataset)
    assert done.moved == ["train/000001.tar", "val/_info.json"] and "original pictures" in done.next
    spared = (dataset / "train/000000.tar").stat().st_mtime_ns
    reshard(place, dataset)
    assert tree_digest(dataset) == good and (dataset / "train/000000.tar").stat().st_mtime_ns == spared
    assert not (work_dir(dataset) / "again").exists() and not (work_dir(dataset) / "shard").exists()
    flip(dataset / "dataset.json")
    done = mend(dataset)
    assert not done.moved and "new folder" in done.next


def test_a_lost_shard_costs_its_own_pictures_alone(place: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, read = tree_digest(dataset), []
    (first, *_, last) = Dataset(dataset).record.splits["train"].shards
    assert (first.first_candidate, first.rows, last.rows) == (0, 32, 8) and last.first_candidate >= 64

    def counted(self: DecodePool, function: Any, tasks: Any, real: Any = DecodePool.map) -> Any:
        return real(self, function, (read.append(task) or task for task in tasks))

    monkeypatch.setattr(DecodePool, "map", counted)
    (dataset / "train/000002.tar").unlink()
    reshard(place, dataset)
    assert tree_digest(dataset) == good and 8 <= len(read) == 74 - last.first_candidate


def test_a_dataset_of_before_is_filled_in_where_no_picture_was_refused(place: Path, dataset: Path) -> None:
    record = Dataset(dataset).record.model_dump()
    for split in record["splits"].values():
        split["shards"] = tuple(entry | {"first_candidate": None} for entry in split["shards"])
    write_atomic(dataset / "dataset.json", encode_record(DatasetRecord.model_validate(record)))
    assert b"first_candidate" not in (dataset / "dataset.json").read_bytes()
    good = tree_digest(dataset)
    (dataset / "val/000000.tar").unlink()
    reshard(place, dataset)
    assert tree_digest(dataset) == good
    (dataset / "train/000001.tar").unlink()
    reshard(place, dataset)
    assert tree_digest(dataset) == good


def test_a_dataset_takes_nothing_from_changed_pictures(place: Path, dataset: Path, tmp_path: Path) -> None:
    good, train = tree_digest(dataset), place / "pictures" / "train"
    with_row = Dataset(dataset)
    source = with_row.tar("train", 1).read_bytes().split(b'{"source": "')[1].split(b'"')[0].decode()
    path = next(file for file in train.rglob(Path(source).name))
    kept = path.read_bytes()
    for shard_number in (0, 1):
        (dataset / f"train/{shard_number:06d}.tar").unlink()
    try:
        path.write_bytes(next(file for file in train.rglob("*.jpg") if file.read_bytes() != kept).read_bytes())
        with pytest.raises(IdentityError, match="000001.tar: expected the pictures that this file was made from"):
            reshard(place, dataset)
        assert (dataset / "train/000000.tar").is_file() and not (dataset / "train/000001.tar").exists()
    finally:
        path.write_bytes(kept)
    reshard(place, dataset)
    assert tree_digest(dataset) == good


def test_filling_in_is_resumed_after_a_kill(place: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tree_digest(dataset)
    for name in ("train/000000.tar", "train/000001.index.npy", "val/000000.tar"):
        (dataset / name).unlink()
    from cache_tools import storage as module

    move, calls = module.move_durably, iter((True, False))

    def killed(source: Path, target: Path) -> None:
        if not next(calls):
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(module, "move_durably", killed)
    with pytest.raises(KeyboardInterrupt):
        reshard(place, dataset)
    monkeypatch.undo()
    assert (work_dir(dataset) / "again").is_dir()
    reshard(place, dataset)
    assert tree_digest(dataset) == good


def test_the_command(cache: Path) -> None:
    assert "3 of 7 shards" in run("mcm-cache", "verify", cache, "--subset", "34%")
    assert "such as 5%" in run("mcm-cache", "verify", cache, "--subset", "0.05", expect=2)
    flip(cache / "train/v1/views/000001.tar")
    assert "add `--repair` to move the damaged files away" in run("mcm-cache", "verify", cache, expect=4)
    said = run("mcm-cache", "verify", cache, "--repair", "--json", expect=4)
    known = json.loads(said[: said.rindex("}") + 1])
    assert [problem["unit"] for problem in known["problems"]] == ["train/v1"] and len(known["repair"]["moved"]) == 3
    assert not json.loads(run("mcm-cache", "verify", cache, "--repair", "--json"))["problems"]
