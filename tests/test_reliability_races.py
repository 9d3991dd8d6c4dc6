"""Several at once on one folder, stopped, woken and killed at random: one winner a shard, the bytes of a lone run."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import zygote
from conftest import is_locked, tree_digest

from cache_tools.verify import verify

pytestmark = pytest.mark.slow

VIEWS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zygote.make_place(tmp_path_factory.mktemp("races"), train=68)


def disturb(processes: list[BaseProcess], victim: BaseProcess | None, draw: random.Random) -> None:
    """Stop and wake the processes at random until all have ended; the victim is killed after some of that."""
    kill_after = draw.randrange(20)
    for turn in range(10**9):
        living = [process for process in processes if process.is_alive()]
        if not living:
            return
        with suppress(ProcessLookupError):  # it has ended since we looked
            if turn == kill_after and victim in living:
                victim.kill()
            pid = draw.choice(living).pid
            os.kill(pid, signal.SIGSTOP)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGCONT)
        time.sleep(draw.uniform(0, 0.06))


def commits_written(log: Path) -> Counter[str]:
    """How often each commit got its name, by all processes together."""
    lines = (line.rsplit(" ", 1)[0].replace(" link/", " out/") for line in log.read_text().splitlines())
    return Counter(line for line in lines if line.startswith("link ") and "/commits/" in line)


def test_extractors_share_one_cache(
    place: Path, tmp_path: Path, how_many: Callable[..., int], tally: Callable[..., None]
) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    zygote.start(zygote.run_extract, place, straight / "out", straight / "log", views=VIEWS).join()
    expected, written = tree_digest(straight / "out"), commits_written(straight / "log")
    kills, races = 0, how_many(3, 40)
    for race in range(races):
        folder, draw, workers = tmp_path / f"race{race}", random.Random(race), (2, 4)[race % 2]
        folder.mkdir()
        names = [folder / "out", folder / "link"]  # of one CACHE
        names[0].mkdir()
        names[1].symlink_to("out")
        run = (zygote.run_extract, place)
        processes = [
            zygote.start(*run, names[k % 2], folder / "log", views=VIEWS, worker=k, workers=workers)
            for k in range(workers)
        ]
        victim = draw.choice(processes) if race % 4 >= 2 else None
        disturb(processes, victim, draw)
        codes = [process.exitcode for process in processes]
        killed, where = codes.count(-signal.SIGKILL), (f"race of seed {race}", (folder / "log.out").read_text())
        assert all(code == 0 or process is victim for code, process in zip(codes, processes, strict=True)), where
        if killed:  # the others may have ended before
            last = zygote.start(*run, names[0], folder / "log", views=VIEWS)
            last.join()
            assert last.exitcode == 0, where
        again = commits_written(folder / "log")
        assert again.keys() == written.keys() and again.total() <= written.total() + killed * VIEWS, where
        assert tree_digest(folder / "out") == expected, where
        assert not verify(folder / "out", quiet=True).problems, where
        kills += killed
    tally("races: extract", races=races, kills=kills, failures=0)


def test_extractors_that_do_not_see_each_others_locks(
    place: Path, tmp_path: Path, how_many: Callable[..., int], tally: Callable[..., None]
) -> None:
    """Each process makes every shard that has no commit yet, while the other one makes it too."""
    straight = tmp_path / "straight"
    straight.mkdir()
    zygote.start(zygote.run_extract, place, straight / "out", straight / "log", views=VIEWS).join()
    expected, races, doubled = tree_digest(straight / "out"), how_many(3, 40), 0
    for race in range(races):
        folder, draw, hosts = tmp_path / f"race{race}", random.Random(race), ("a" * 8, "b" * 8 if race % 2 else "a" * 8)
        folder.mkdir()
        run = (zygote.run_unlocked, place, folder / "out", folder / "log")
        processes = [zygote.start(*run, views=VIEWS, host=host) for host in hosts]
        disturb(processes, None, draw)
        where = (f"race of seed {race}", (folder / "log.out").read_text())
        assert [process.exitcode for process in processes] == [0, 0], where
        assert tree_digest(folder / "out") == expected, where
        assert not verify(folder / "out", quiet=True).problems, where
        tars = [
            line for line in (folder / "log").read_text().splitlines() if line.startswith("create") and ".tar" in line
        ]
        doubled += len(tars) > len(list((folder / "out").rglob("*.tar")))
    assert doubled
    tally("races: extract without locks", races=races, doubled=doubled, failures=0)


def test_two_that_shard_into_one_folder(
    place: Path, tmp_path: Path, how_many: Callable[..., int], tally: Callable[..., None]
) -> None:
    """The second one says who is there, while the first one stands still with the lock; the first one ends well."""
    expected, races, met = tree_digest(place / "dataset"), how_many(4, 40), 0
    for race in range(races):
        folder, draw = tmp_path / f"race{race}", random.Random(race)
        folder.mkdir()
        lock = folder / "out" / ".run" / "shard.lock"
        first = zygote.start(zygote.run_shard, place, folder / "out", folder / "log")
        while first.is_alive() and not lock.is_file():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        with suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGSTOP)
        held = is_locked(lock)
        second = zygote.start(zygote.run_shard, place, folder / "out", folder / "log")
        second.join()
        with suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGCONT)
        first.join()
        said = (folder / "log.out").read_text()
        assert (first.exitcode, second.exitcode) == (0, 2 if held else 0), (race, said)
        assert not held or "another process shards" in said, (race, said)
        assert tree_digest(folder / "out") == expected, race
        met += held
    tally("races: shard", races=races, met=met, failures=0)
