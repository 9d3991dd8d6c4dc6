"""Every state that a power cut can leave is resumed from; every operation that fails is said, and costs nothing."""

import errno
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zygote
from conftest import tree_digest
from disk import Disk, Op

from cache_tools.cache import Cache
from cache_tools.console import guarded
from cache_tools.records import read_record
from cache_tools.storage import HOST, file_sha256
from cache_tools.verify import verify
from pipeline.shard_writer import ShardProgress

pytestmark = pytest.mark.slow

Run = Callable[[Path, Path], None]
State = dict[str, bytes | None]  # path -> content; None is a folder
RUNS = pytest.mark.parametrize("run", [zygote.run_shard, zygote.run_extract], ids=["shard", "extract"])
FAULTS = [errno.ENOSPC, errno.EIO, errno.EACCES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs' inputs are; the teacher is loaded once, which spares half the time of a run."""
    place = zygote.make_place(tmp_path_factory.mktemp("replay"))
    load = zygote.extract_module.load_teacher
    teacher = load(f"open_clip:{place / 'clip'}", str(place / "clip" / "open_clip_model.safetensors"), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zygote.extract_module, "load_teacher", lambda *request: teacher)
        yield place


def record(run: Run, place: Path, folder: Path) -> tuple[list[Op], dict[str, str]]:
    """The operations of an undisturbed run, and the tree it makes."""
    folder.mkdir(exist_ok=True)
    with Disk(folder).installed() as disk:
        run(place, folder / "out")
    return disk.ops, tree_digest(folder / "out")


class _File:
    """Content as processes see it, and as far as an fsync reached."""

    data = durable = b""

    def after(self, fate: str) -> bytes:
        lost = self.data[len(self.durable) :]
        return {
            "kept": self.data,
            "dropped": self.durable,
            "zeros": self.durable + bytes(len(lost)),
            "torn": self.durable + lost[: len(lost) // 2],
        }[fate]


class Crash:
    """What a power cut behind the operations given so far can leave.

    Names (create, rename, unlink, mkdir, rmdir) survive in order: all of them, or only those whose folder was fsynced
    afterwards. What was written and not fsynced is there (`kept`: as after a SIGKILL), or not, or zeros, or torn.
    """

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        self.names: list[tuple[Op, _File | None]] = []
        self.synced: dict[str, int] = {}  # folder -> names that were made before its last fsync

    def add(self, op: Op) -> None:
        if op.kind == "syncdir":
            self.synced[op.path] = len(self.names)
        elif op.kind in ("write", "truncate"):
            file = self.files[op.path]
            file.data = file.data + op.data if op.kind == "write" else b""
            file.durable = file.durable if op.kind == "write" else b""
        elif op.kind == "sync":
            self.files[op.path].durable = self.files[op.path].data
        else:
            if op.kind == "create":
                self.files[op.path] = _File()
            elif op.kind == "rename":
                self.files[op.path] = self.files.pop(op.source)
            elif op.kind == "link":
                self.files[op.path] = self.files[op.source]
            self.names.append((op, self.files.get(op.path)))

    def state(self, all_names: bool, fate: str) -> State:
        left: dict[str, _File | None] = {".": None}
        for number, (op, file) in enumerate(self.names):
            if all_names or number < self.synced.get(str(Path(op.path).parent), 0):
                if op.kind == "rename":
                    left.pop(op.source, None)
                if op.kind in ("unlink", "rmdir"):
                    left.pop(op.path, None)
                else:
                    left[op.path] = file
        # What lies in a folder that was lost is lost with it.
        whole = (path for path in left if all(str(parent) in left for parent in Path(path).parents))
        return {path: None if (file := left[path]) is None else file.after(fate) for path in whole}


def crash_states(ops: list[Op]) -> dict[str, State]:
    """Every different state behind every operation, by a name for messages."""
    crash, seen = Crash(), {}
    for number, op in enumerate(ops):
        crash.add(op)
        for all_names in (True, False):
            for fate in ("dropped", "zeros", "torn"):
                state = crash.state(all_names, fate)
                names = "all names" if all_names else "fsynced names only"
                seen.setdefault(frozenset(state.items()), (f"{number} {op.name}, {names}, data {fate}", state))
    return dict(seen.values())


def restore(folder: Path, state: State) -> None:
    """Make `folder` what the state says; a temporary name is one of this host again."""
    for name, data in sorted(state.items()):
        path = name.replace(".partial", f".{HOST}00000000.partial")
        if data is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(data)


def vouched(out: Path) -> int:
    """Check every file that a record below OUT vouches for; returns how many records there are."""
    records = 0
    for path in (out / ".run").glob("shard/*/[0-9]*.json"):
        entry, tar = read_record(ShardProgress, path).entry, out / path.parent.name / f"{path.stem}.tar"
        assert entry and file_sha256(tar) == entry.tar_sha256, tar
        assert file_sha256(tar.with_suffix(".index.npy")) == entry.index_sha256, tar
        records += 1
    if (out / "dataset.json").is_file():
        assert not verify(out, quiet=True).problems
        records += 1
    for unit in Cache(out).all_units() if (out / "cache.json").is_file() else ():
        assert not unit.complete or len(unit.committed()) == unit.num_shards, unit.manifest_file
        for shard in unit.committed():
            unit.check_arrays()
            for name, entry in unit.commit(shard).files.items():
                assert file_sha256(unit.path / name) == entry.sha256, (unit, name)
            records += 1
    return records


@RUNS
def test_every_state_after_a_power_cut_is_sound_and_resumed(
    run: Run, place: Path, tmp_path: Path, how_many: Callable[..., int], tally: Callable[..., None]
) -> None:
    ops, expected = record(run, place, tmp_path / "straight")
    states = crash_states(ops)
    chosen = random.Random(0).sample(sorted(states), how_many(20, len(states)))
    records = 0
    for number, name in enumerate(chosen):
        folder = tmp_path / f"state{number}"
        restore(folder, states[name])
        try:
            records += vouched(folder / "out")
            run(place, folder / "out")
            assert tree_digest(folder / "out") == expected
        except Exception as error:
            raise AssertionError(f"power cut after {name}") from error
        shutil.rmtree(folder)
    kind = run.__name__.removeprefix("run_")
    tally(f"power cut: {kind}", states=len(chosen), of=len(states), records_checked=records, failures=0)


@RUNS
def test_what_is_done_is_durable_also_behind_a_killed_run(
    run: Run, place: Path, tmp_path: Path, how_many: Callable[..., int], tally: Callable[..., None]
) -> None:
    """The names that a killed process left without an fsync are not lost by a power cut after the run that resumed."""
    ops, _ = record(run, place, tmp_path / "straight")
    kills = random.Random(1).sample(range(len(ops)), how_many(8, len(ops)))
    for kill in [len(ops) - 1, *kills]:  # at the end: nothing was killed
        crash, folder = Crash(), tmp_path / f"kill{kill}"
        for op in ops[: kill + 1]:
            crash.add(op)
        restore(folder, crash.state(all_names=True, fate="kept"))
        again, _ = record(run, place, folder)
        for op in again:
            crash.add(op)
        done, durable = (crash.state(names, fate) for names, fate in ((True, "kept"), (False, "dropped")))
        kept = {path: data for path, data in done.items() if path.startswith("out/") and "/.run" not in path}
        lost = [path for path, data in kept.items() if durable.get(path, 0) != data]
        assert not lost, f"killed after {kill} {ops[kill].name}, resumed to its end, power cut: {lost} lost"
        shutil.rmtree(folder)
    tally(f"power cut behind a killed run: {run.__name__.removeprefix('run_')}", kills=len(kills), failures=0)


@RUNS
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: errno.errorcode[fault])
def test_an_operation_that_fails_is_said_and_costs_nothing(
    run: Run, fault: int, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    how_many: Callable[..., int], tally: Callable[..., None],
) -> None:  # fmt: skip
    ops, expected = record(run, place, tmp_path / "straight")
    chosen = random.Random(fault).sample(ops, how_many(4, len(ops)))
    for number, op in enumerate(chosen):
        folder, where = tmp_path / f"fail{number}", f"{errno.errorcode[fault]} at {op.name}"
        folder.mkdir()
        capsys.readouterr()
        with Disk(folder, at=op.name, fault=fault).installed() as disk, pytest.raises(SystemExit) as ended:
            guarded(run)(place, folder / "out")
        said = capsys.readouterr().err
        assert disk.hit and ended.value.code == 7, (where, said)
        named = re.sub(r"^\.|\.partial$", "", (folder / op.path).resolve().name) in said
        # A disk stays full: files that are closed behind the first failure fail too, and the last one is named.
        named |= fault == errno.ENOSPC and f"{folder / 'out'}" in said
        assert said.count("\n") == 1 and named, (where, said)
        assert "again" in said and ("free" in said or fault != errno.ENOSPC), (where, said)
        renamed = [done.path for done in disk.ops if done.kind == "rename" and "/commits/" in done.path]
        assert all((folder / path).is_file() for path in renamed), f"{where}: a commit is lost"
        vouched(folder / "out")
        run(place, folder / "out")
        assert tree_digest(folder / "out") == expected, where
        shutil.rmtree(folder)
    kind = run.__name__.removeprefix("run_")
    tally(f"failing call: {kind} {errno.errorcode[fault]}", calls=len(chosen), of=len(ops), failures=0)
