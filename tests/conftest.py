"""What all tests share: the optional folder of real pictures, small tools for processes and trees."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Before torch is imported, here and in the processes that tests start: bytes depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests compare the CPU with itself. A GPU is hidden, also from the processes that tests start.
if os.environ.get("MCM_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-counts", action="store_true", help="harnesses with the counts of docs/reliability.md")
    parser.addoption("--tally", type=Path, help="append the counts of each harness to this file, a JSON line each")


@pytest.fixture(scope="session", autouse=True)
def server_of_workers() -> None:
    """Start the forkserver with torch: the decode pool's server has none, and each worker then takes 5 s to start."""
    multiprocessing.set_forkserver_preload(["torch", "mcm.stream", "pipeline.candidates"])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def how_many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """how_many(lane, full): the count of a harness in the ordinary tests, and by scripts/reliability."""
    return lambda lane, full: full if request.config.getoption("--full-counts") else lane


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """tally(harness, kills=40, failures=0): what a harness did, for docs/reliability.md."""
    start = time.monotonic()

    def write(harness: str, **counts: object) -> None:
        if path := request.config.getoption("--tally"):
            with open(path, "a") as file:
                line = {"harness": harness, **counts, "seconds": round(time.monotonic() - start, 1)}
                file.write(json.dumps(line) + "\n")

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and a real ViT, where they can be had; never part of this repository."""
    for place in (os.environ.get("MCM_TEST_DATA", ""), ROOT.parent / "shared" / "data"):
        if place and (Path(place) / "odd-images").is_dir():
            return Path(place)
    pytest.skip("no test data: set MCM_TEST_DATA to the folder with photos/, odd-images/ and deit-tiny/")


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path; locks and progress in .run are no part of it."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if ".run/" not in name}


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file, by the kernel's table: looking takes no lock."""
    return path.is_file() and f":{path.stat().st_ino} " in Path("/proc/locks").read_text()


def command(program: str, *arguments: object) -> list[str]:
    """The command line of one of the two console scripts, run by this interpreter."""
    module = {"mcm-cache": "pipeline.cli", "mcm-train": "mcm.cli"}[program]
    return [sys.executable, "-c", f"from {module} import app; app()", *map(str, arguments)]


def run(program: str, *arguments: object, expect: int = 0) -> str:
    """Run a console script to its end; returns stdout and stderr together."""
    done = subprocess.run(command(program, *arguments), capture_output=True, text=True)
    assert done.returncode == expect, f"exit {done.returncode}, expected {expect}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has run `code`, with the names of cache_tools.storage, and waits to be killed."""
    line = [sys.executable, "-c", f"from cache_tools.storage import *\n{code}\nprint(flush=True)\ninput()"]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        yield process
    finally:
        process.kill()
        process.communicate()
