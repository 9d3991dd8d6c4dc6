"""Extraction by several processes: the bytes of one process, one progress, one stop, one error, no orphans."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, run, tree_digest
from make_extract import make_place, request

from pipeline.extract import extract

pytestmark = pytest.mark.slow

TWO = ("--processes", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("pool"), rows=200, val_rows=40)
    extract(request(place, place / "cache"))
    return place


def words(place: Path, cache: Path, *how: object, source: str = "dataset") -> list[object]:
    weights = place / "clip" / "open_clip_model.safetensors"
    teacher = ["--teacher", f"open_clip:{place / 'clip'}", "--weights", weights, "--device", "cpu", "--threads", 1]
    sizes = ["--views", 2, "--size", 32, "--batch", 16]
    return ["mcm-cache", "extract", place / source, cache, *teacher, *sizes, *how]


def start(place: Path, cache: Path, *how: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    line = command(*words(place, cache, *how))
    process = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while process.poll() is None and not list(cache.rglob("*.tar.*.partial")):
        time.sleep(0.002)
    return process


def ended(process: subprocess.Popen[str], code: int) -> str:
    output = "".join(process.communicate(timeout=300))  # every worker holds the other end of these pipes
    errors = output.count("\nerror: ")
    assert process.returncode == code and errors == (code > 0) and "Traceback" not in output, output
    return output


def worker(process: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    spawned = [one for one in map(int, children) if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]
    assert len(spawned) == 2
    return spawned[0]


@pytest.mark.parametrize(("processes", "source"), [(2, "pictures"), (4, "dataset")])
def test_the_bytes_are_those_of_one_process(processes: int, source: str, place: Path, tmp_path: Path) -> None:
    said = run(*words(place, tmp_path / "cache", "--processes", processes, source=source))
    assert said.count("teacher open_clip:clip") == 1 and "3 of 3 units complete\n" in said
    assert re.search(r"extract .*: 440/440 views", said) and "other workers" not in said
    if source == "pictures":  # in shards of another size
        assert len(list((tmp_path / "cache" / "dataset").rglob("*.tar"))) == 2
    else:
        assert tree_digest(tmp_path / "cache") == tree_digest(place / "cache")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_each_worker_at_a_shard(number: signal.Signals, place: Path, tmp_path: Path) -> None:
    process = start(place, tmp_path / "cache", *TWO)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = ended(process, 75)
    assert said.count("stopping: each worker finishes") == 1 and "stopped; the same command resumes" in said
    assert not list(tmp_path.rglob("*.partial"))  # the shards in work were finished
    if number == signal.SIGTERM:
        run(*words(place, tmp_path / "cache", *TWO))
        assert tree_digest(tmp_path / "cache") == tree_digest(place / "cache")


def test_the_first_error_stops_all_and_is_the_error_of_the_command(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "place")
    tar = tmp_path / "place" / "dataset" / "train" / "000003.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xda", b"\xff\xdb"))
    said = run(*words(tmp_path / "place", tmp_path / "cache", *TWO), expect=4)
    assert f"{tar}: row 96: expected the crc32c" in said and said.count("error: ") == 1


def test_a_worker_whose_parent_was_killed_prints_nothing() -> None:
    code = "from pipeline.worker_pool import CONTEXT, _run; r, s = CONTEXT.Pipe(False); r.close()\n"
    code += "p = CONTEXT.Process(target=_run, args=(s, abs, -1)); p.start(); p.join(); raise SystemExit(p.exitcode)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_killed_worker_is_an_error_and_a_killed_parent_leaves_none(place: Path, tmp_path: Path) -> None:
    process = start(place, tmp_path / "cache", *TWO)
    os.kill(worker(process), signal.SIGKILL)
    assert "a worker process was killed" in ended(process, 7)
    process = start(place, tmp_path / "another", *TWO)
    worker(process)
    process.kill()
    ended(process, -9)


def test_each_worker_is_started_with_ctrl_c_blocked() -> None:
    """The first worker too: with it the resource tracker starts, which unblocks the signal in its parent."""
    code = """
import signal
from functools import partial
from pipeline.worker_pool import run_workers
print(run_workers(partial(signal.pthread_sigmask, signal.SIG_BLOCK), [(), ()], "label", "stopped"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("SIGINT") == 2, done.stdout + done.stderr
