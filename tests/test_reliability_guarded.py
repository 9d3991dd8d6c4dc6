"""Single promises that no larger harness tests: the order of writes, what binds the pieces of a cache, locks."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import make_cache as make_cache_module
import numpy as np
import pytest
import torch
from conftest import another_process, tree_digest
from disk import Disk, Op
from make_cache import add_unit, make_cache, make_identity, write_shard
from make_extract import make_place, request
from test_mcm_checkpoint import save

import pipeline.extract
from cache_tools.cache import Cache, Unit
from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.images import decode_view_into, encode_view
from cache_tools.records import decode_record, encode_record
from cache_tools.storage import publish, try_lock, write_atomic
from cache_tools.writer import UnitShardWriter, finish_unit, publish_identity, shard_lock, unit_writer
from pipeline.extract import extract
from pipeline.teachers import Teacher, load_teacher


def position(ops: list[Op], kind: str, path: str, first: bool = True) -> int:
    found = [i for i, op in enumerate(ops) if (op.kind, op.path) == (kind, path)]
    assert found, f"no {kind} of {path}"
    return found[0 if first else -1]


def assert_durable(ops: list[Op]) -> None:
    """Every file is synced between its last write and its name; every name is in a folder that is synced later."""
    for i, op in enumerate(ops):
        names = op.kind in ("rename", "link")
        if names and any(before.path == op.source and before.kind == "write" for before in ops[:i]):
            before = [other.kind for other in ops[:i] if other.path == op.source]
            assert before[-1] == "sync", f"{op.path}: {before}"
        if names or op.kind == "mkdir":
            assert ("syncdir", str(Path(op.path).parent)) in [(o.kind, o.path) for o in ops[i:]], op.path


def test_a_shard_stops_counting_before_it_is_redone_and_counts_last(tmp_path: Path) -> None:
    identity = make_identity({"train": 20})
    publish_identity(tmp_path / "cache", identity)
    unit = Unit(tmp_path / "cache", identity, "train", 0)
    for again in (False, True):
        unit.commit_file(0).unlink(missing_ok=True)
        with Disk(tmp_path).installed() as disk:
            write_shard(unit, 0)
            finish_unit(unit)
        ops, here = disk.ops, "cache/train/v0"
        assert_durable(ops)
        parts = (f"{here}/views", f"{here}/features.zarr")
        kinds = ("create", "write", "sync", "rename", "link")
        data = [op.path.startswith(parts) and op.kind in kinds for op in ops]
        # Every zarr.json is a pure function of cache.json, published at any time.
        mine = [i for i, op in enumerate(ops) if data[i] and "zarr.json" not in op.path]
        if again:
            removed = position(ops, "unlink", f"{here}/manifest.json")
            assert removed < ops.index(next(op for op in ops[removed:] if op.kind == "syncdir")) < mine[0]
        begun = [i for i, op in enumerate(ops) if "commits/" in op.path and op.kind in kinds]
        assert mine[-1] < begun[0]
        assert position(ops, "syncdir", f"{here}/commits", first=False) < position(
            ops, "create", f"{here}/.manifest.json.partial"
        )


def test_what_is_published_is_durable_before_it_has_its_name(tmp_path: Path) -> None:
    with Disk(tmp_path).installed() as disk:
        publish(tmp_path / "new" / "folder" / "x", b"1")
        write_atomic(tmp_path / "other" / "x", b"2")
        checkpoint_at = save(tmp_path / "run", 1)
    assert_durable(disk.ops)
    made = checkpoint_at.relative_to(tmp_path)
    assert position(disk.ops, "rename", f"{made.parent}/.{made.name}.partial/state.json") < position(
        disk.ops, "rename", str(made)
    )


def test_an_old_checkpoint_goes_when_the_new_one_is_there_and_its_state_goes_first(tmp_path: Path) -> None:
    """From the loop's own order: a half-removed folder must never pass for a checkpoint."""
    from test_mcm_loop import make_job, run_job

    with Disk(tmp_path).installed() as disk:
        run_job(make_job(tmp_path / "run", keep_last=1))
    removed = [op for op in disk.ops if op.kind == "unlink" and "checkpoints/step" in op.path]
    assert removed
    for folder in {str(Path(op.path).parent) for op in removed}:
        assert next(op for op in removed if op.path.startswith(folder)).path == f"{folder}/state.json"
        steps = [op.path for op in disk.ops if op.kind == "rename" and "/.step" not in op.path and "step_" in op.path]
        newer = next(path for path in steps if path > folder)
        assert position(disk.ops, "rename", newer) < position(disk.ops, "unlink", f"{folder}/state.json")
    assert_durable(disk.ops)


def test_a_commit_is_of_one_shard_of_one_unit_of_one_cache(tmp_path: Path) -> None:
    """Without a manifest, which would tell too: as while an extraction goes on."""
    ours, theirs = (make_cache(tmp_path / name, rows=128, views=2, seed=seed) for seed, name in enumerate("ab"))
    unit, other = ours.units("train")
    foreign = theirs.units("train")[0]
    unit.manifest_file.unlink()
    good = unit.commit_file(0).read_bytes()
    for path in (unit.commit_file(1), other.commit_file(0), foreign.commit_file(0)):
        unit.commit_file(0).write_bytes(path.read_bytes())
        with pytest.raises(CorruptionError, match=str(unit.commit_file(0))):
            Unit(ours.path, ours.identity, "train", 0).chunk(0)
    unit.commit_file(0).write_bytes(good)
    shutil.copy(foreign.manifest_file, unit.manifest_file)
    for path in (foreign.manifest_file, other.manifest_file):
        unit.manifest_file.write_bytes(path.read_bytes())
        with pytest.raises(IdentityError, match="expected the manifest of train/v0 of this cache"):
            _ = Unit(ours.path, ours.identity, "train", 0).manifest


def test_the_manifest_knows_which_commits(tmp_path: Path) -> None:
    """A commit of the same place and identity, whole by its own sha256, but of another extraction."""
    cache = make_cache(tmp_path / "cache", views=1)
    unit = cache.units("train")[0]
    commit = unit.commit(0)
    fingerprint = commit.fingerprint.model_copy(update={"batch": 999})
    unit.commit_file(0).write_bytes(encode_record(commit.model_copy(update={"fingerprint": fingerprint})))
    with pytest.raises(CorruptionError, match="expected the commit that the manifest of .* names"):
        Cache(cache.path).units("train")[0].chunk(0)


def test_a_failed_redo_leaves_no_commit(tmp_path: Path) -> None:
    unit = add_unit(tmp_path / "cache", make_identity({"train": 20}), "train", 0)
    unit.commit_file(0).unlink()
    with pytest.raises(RuntimeError), unit_writer(unit, 0):
        raise RuntimeError
    assert not unit.complete and unit.committed() == []


@pytest.mark.parametrize("same", [True, False])
def test_of_two_writers_of_one_shard_the_first_stays(tmp_path: Path, monkeypatch, same: bool) -> None:
    """As where locks do not exclude: the other one ends while the unit is complete, and compares its bytes."""
    unit = Unit(tmp_path / "cache", make_identity({"train": 20}), "train", 0)
    publish_identity(tmp_path / "cache", unit.identity)
    write_shard(unit, 0)
    unit.commit_file(0).unlink()  # as left by a killed worker; the first one replaces it
    left, commit, features = unit.tar(0).stat().st_ino, UnitShardWriter.commit, make_cache_module.features
    first: dict[str, str] = {}

    def overtaken(writer: UnitShardWriter, mean: np.ndarray, *more: object) -> None:
        monkeypatch.undo()
        write_shard(unit, 0)
        assert finish_unit(unit)
        first.update({name: sha for name, sha in tree_digest(tmp_path).items() if ".partial" not in name})
        commit(writer, mean + 1, *more)  # another commit of the same files

    monkeypatch.setattr(UnitShardWriter, "commit", overtaken)
    monkeypatch.setattr(make_cache_module, "features", lambda *given: features(*given) + (0 if same else 1))
    with nullcontext() if same else pytest.raises(IdentityError, match="another process wrote others, which stay"):
        write_shard(unit, 0)
    assert tree_digest(tmp_path) == first and unit.tar(0).stat().st_ino != left
    assert Unit(unit.path.parents[1], unit.identity, "train", 0).chunk(0).rows == 16


def test_a_record_has_one_form_and_its_own_digest() -> None:
    """Two spellings of one record would have one digest and other bytes; another value is damage, not another cache."""
    identity = make_identity({"train": 20})
    data = encode_record(identity)
    spaced = json.dumps(json.loads(data)).encode() + b"\n"
    for other in (spaced, data[:-1], data + b"\n", data.replace(b'"seed":0', b'"seed":1')):
        with pytest.raises(CorruptionError, match="bytes that match their own sha256"):
            decode_record(type(identity), other, "here")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("guarded"), rows=40)


def test_a_held_shard_is_left_to_its_holder(place: Path, tmp_path: Path, capsys) -> None:
    """Also to one that reached the CACHE by another name."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to("cache")
    with try_lock(shard_lock(tmp_path / "link", "train", 0)) as held:
        assert held
        extract(request(place, tmp_path / "cache", views=1))
    assert Cache(tmp_path / "cache").units("train")[0].committed() == [1]
    assert "other workers hold the remaining shards" in capsys.readouterr().out


def test_a_worker_asks_again_for_the_shards_of_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = shard_lock(tmp_path / "cache", "train", 0)
    with another_process(f"held = try_lock(Path({str(lock)!r}))\nheld.__enter__()") as holder:

        def pause(_: float) -> None:
            holder.kill()
            holder.wait()

        monkeypatch.setattr("time.sleep", pause)
        extract(request(place, tmp_path / "cache", views=1))
    assert Cache(tmp_path / "cache").units("train")[0].complete


def test_the_teacher_sees_batches_of_one_size(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows in shards of 32: the last batch of a shard is filled up, never with rows of the next."""
    asked, seen = request(place, tmp_path / "cache", views=1, splits=("train",)), []
    teacher = load_teacher(asked.config.teacher, asked.config.weights, None, "cpu")
    monkeypatch.setattr(pipeline.extract, "load_teacher", lambda *_: teacher)
    forward = Teacher.features

    def features(self: Teacher, pictures: torch.Tensor, precision: str | None = None) -> object:
        seen.append((len(pictures), int((pictures.flatten(1).amax(1) > 0).sum())))
        return forward(self, pictures, precision)

    monkeypatch.setattr(Teacher, "features", features)
    extract(asked)
    assert seen[-3:] == [(16, 16), (16, 16), (16, 8)]


def test_a_view_of_another_size_does_not_fill_one() -> None:
    """numpy would spread a single pixel over all of it."""
    with pytest.raises(CorruptionError, match="expected a view of 32x32 pixels; found 1x1"):
        decode_view_into(encode_view(np.zeros((1, 1, 3), np.uint8), "png"), np.empty((32, 32, 3), np.uint8))
