"""Crash matrix: killed before any operation or at any moment, the same command ends with the same bytes."""

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import pytest
import zygote
from conftest import is_locked, tree_digest

from cache_tools.verify import verify

pytestmark = pytest.mark.slow

KILLED_AGAIN = 0.3  # the chance that a resuming process is killed too
VIEWS = 2
Run = Callable[..., None]
WORK: list[tuple[str, Run, int]] = [  # name, run, tars that one commit step may make anew
    ("shard", zygote.run_shard, 1),
    ("shard parquet", zygote.run_parquet, 1),
    ("shard masks", zygote.run_scenes, 1),
    ("shard boxes", zygote.run_boxes, 1),
    ("extract", partial(zygote.run_extract, views=VIEWS), VIEWS),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zygote.make_place(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(("name", "run", "tars"), WORK, ids=["shard", "parquet", "masks", "boxes", "extract"])
def test_killed_and_resumed_ends_with_the_same_bytes(
    name: str,
    run: Run,
    tars: int,
    place: Path,
    tmp_path: Path,
    how_many: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    ops, longest_s = _straight(run, place, tmp_path / "straight")
    expected, begun = tree_digest(tmp_path / "straight" / "out"), sum(map(_begins_a_tar, ops))
    kills, trials, draw = 0, 0, random.Random(name)
    points = [op for op in ops if not op.startswith("write")]  # a kill between writes is one at a random moment
    points = draw.sample(points, min(len(points), how_many(6, len(ops))))
    for point in chain(points, repeat("")):
        if point == "" and kills >= how_many(12, 500):
            break
        (tmp_path / "trial").mkdir()
        killed = _trial(run, place, tmp_path / "trial", point, longest_s, draw)
        kills, trials = kills + killed, trials + 1
        assert killed or not point, f"{name}: trial {trials} never came to {point!r}"
        where = f"{name}: trial {trials}, killed {killed} times, first before {point or 'a random moment'!r}"
        log = (tmp_path / "trial" / "log").read_text().splitlines()
        assert tree_digest(tmp_path / "trial" / "out") == expected, where
        assert not verify(tmp_path / "trial" / "out", quiet=True).problems, where
        assert sum(map(_begins_a_tar, log)) <= begun + killed * tars, f"{where}: more than a shard redone by a kill"
        shutil.rmtree(tmp_path / "trial")
    tally(f"crash matrix: {name}", kills=kills, points=len(points), runs_compared=trials, failures=0)


def _straight(run: Run, place: Path, folder: Path) -> tuple[list[str], float]:
    """A run that nothing disturbs: the names of its operations, and the seconds of one more."""
    folder.mkdir()
    for number in range(2):  # the first one starts the server
        start = time.monotonic()
        process = zygote.start(run, place, folder / ("out", "again")[number], folder / f"log{number}")
        process.join()
        assert process.exitcode == 0
    return (folder / "log0").read_text().splitlines(), time.monotonic() - start


def _begins_a_tar(name: str) -> bool:
    return name.startswith(("create", "truncate")) and ".tar.partial" in name


def _trial(
    run: Run, place: Path, folder: Path, point: str, longest_s: float, draw: random.Random,
    check: Callable[[Path], object] = lambda out: None,
) -> int:  # fmt: skip
    """Start, kill, and resume until a run is let through; how many were killed. `check` sees what each one left."""
    killed = 0
    for at, after_s in _deaths(point, longest_s, draw):
        process = zygote.start(run, place, folder / "out", folder / "log", at)
        process.join(after_s)
        process.kill()
        process.join()
        while is_locked(folder / "out" / ".run" / "shard.lock"):
            time.sleep(0.01)  # the watched process ends as soon as it sees that its watcher is gone
        last, log = not at and after_s is None, folder / "log.out"
        said = log.read_text() if log.is_file() else ""  # killed before its first line
        died = process.exitcode == -signal.SIGKILL or (process.exitcode == 7 and "process was killed" in said)
        assert process.exitcode == 0 or (died and not last), (point, at, after_s, process.exitcode, said)
        killed += died
        check(folder / "out")
    return killed


def _deaths(point: str, longest_s: float, draw: random.Random) -> Iterator[tuple[str, float | None]]:
    """When each run of a trial dies: before an operation, or some seconds after its start; the last one never."""
    yield (point, None) if point else ("", draw.uniform(0, longest_s))
    while draw.random() < KILLED_AGAIN:
        yield "", draw.uniform(0, longest_s)
    yield "", None
