"""The decode pool: crashes, hangs, kills and large results; the command with a decoder that fails, and its signals."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, is_locked, tree_digest
from misbehave import REASONS, misbehave
from test_pipeline_shard import make_source

from cache_tools.errors import ResourceError
from pipeline import decode_pool
from pipeline.decode_pool import DecodePool
from pipeline.shard import shard

# Every Python process of the command has this decoder, which does as the first bytes of a "picture" say.
DECODER = """
import os, time
from misbehave import misbehave
from pipeline import candidates, decode_pool
decode_pool.LIMIT_S = 4  # longer than a process takes to start
def decode_rgb(data, real=candidates.decode_rgb):
    misbehave(data[:20].partition(b" ")[0].decode("latin1"), os.environ["MISBEHAVE"] == "refuse")
    time.sleep(0.02 if os.environ["MISBEHAVE"] == "slow" else 0)
    return real(data)
candidates.decode_rgb = decode_rgb
"""


@pytest.mark.slow
def test_results_come_in_order_and_what_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_pool, "LIMIT_S", 4)
    words = ["a", "SIGSEGV", "b", "REFUSED", "SIGABRT", "SIGSEGV", *map(str, range(40)), "HANG", "d"]
    reasons = REASONS | {"REFUSED": "format"}
    with DecodePool(2) as pool:
        results = list(pool.map(misbehave, words))
    assert [getattr(result, "reason", result) for result in results] == [reasons.get(word, word) for word in words]


@pytest.mark.parametrize(("word", "error"), [("SIGKILL", ResourceError), ("EIO", OSError)])
def test_what_is_no_pictures_fault_ends_the_work(word: str, error: type[Exception]) -> None:
    with DecodePool(2) as pool, pytest.raises(error, match="-9: the kernel may have killed it|1.png"):
        list(pool.map(misbehave, [word, "a"]))


def test_too_few_open_files_are_named_before_a_process_starts(capfd: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (63, before[1]))
    try:
        words = "open files: expected a limit of 64 for 16 workers; found 63; raise it by `ulimit -n 64`"
        with DecodePool(16) as pool, pytest.raises(ResourceError, match=words):
            list(pool.map(misbehave, map(str, range(64))))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert capfd.readouterr().err == ""  # the server of the processes prints nothing either


def test_a_signal_to_the_process_group_does_not_end_the_forkserver() -> None:
    """It would otherwise refuse the next process, and the command would end with another code than 75."""
    lines = "from multiprocessing import forkserver; from pipeline.decode_pool import DecodePool"
    lines += "\nwith DecodePool(1) as pool:\n    list(pool.map(len, ['a']))"
    lines += "\n    print(open(f'/proc/{forkserver._forkserver._forkserver_pid}/status').read())"
    status = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert mask >> (signal.SIGTERM - 1) & mask >> (signal.SIGINT - 1) & 1


def test_a_pool_stops_in_the_middle_of_large_results() -> None:
    """A killed process leaves half a result in the pipe; who waits for the rest waits for ever."""
    with DecodePool(2) as pool:
        assert len(next(pool.map(bytes, [1 << 26] * 8))) == 1 << 26


def start(source: Path, out: Path, *more: object, mode: str = "crash", verb: str = "shard") -> subprocess.Popen[str]:
    (out.parent / "sitecustomize.py").write_text(DECODER)
    places = os.pathsep.join(map(str, (out.parent, ROOT / "tests" / "helpers", ROOT)))
    environment = os.environ | {"PYTHONPATH": places, "MISBEHAVE": mode}
    line = command("mcm-cache", verb, source, out, *(more if verb == "extract" else ("--rows-per-shard", 16, *more)))
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment)


def ended(process: subprocess.Popen[str], code: int) -> str:
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == code, output
    return output


def wait_for(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about in a minute")


def plant(source: Path, **words: str) -> Path:
    for name, word in words.items():
        (source / "train" / "class1" / f"{name[1:]}.img").write_bytes(f"{word} ".encode())
    return source


@pytest.mark.slow
def test_the_command_refuses_pictures_that_crash_or_hang_the_decoder(tmp_path: Path, tally) -> None:
    source = plant(make_source(tmp_path / "source"), _001="SIGSEGV", _013="HANG", _028="SIGABRT")
    assert "train    37 rows in 3 shards, 3 refused" in ended(start(source, tmp_path / "out", "--max-refused", 1), 0)
    ended(start(source, tmp_path / "straight", "--max-refused", 1, mode="refuse"), 0)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "straight")
    tally("pictures that crash or hang the decoder", inputs=3, failures=0)


@pytest.mark.slow
def test_extraction_from_pictures_refuses_them_too(tmp_path: Path) -> None:
    source = plant(make_source(tmp_path / "source", val=1), _001="SIGSEGV")
    teacher = ["--teacher", "timm:vit_tiny_patch16_224", "--weights", "random", "--set", "teacher_size=32"]
    said = ended(start(source, tmp_path / "cache", *teacher, verb="extract"), 3)
    assert "found 1 decoder-crash" in said and f"`mcm-cache shard SOURCE {tmp_path / 'cache/dataset'}` with a" in said


def test_the_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    source = plant(make_source(tmp_path / "source", train=20, val=1), _001="HANG", _007="HANG")
    lock = tmp_path / "out" / ".run" / "shard.lock"
    process = start(source, tmp_path / "out")
    wait_for(lambda: is_locked(lock))
    process.kill()
    assert not process.wait() == 0 and not is_locked(lock)
    process.communicate(timeout=60)  # every process of the pool holds the other end of these pipes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_stops_at_a_shard(tmp_path: Path, number: int) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    process = start(source, out, mode="slow")
    wait_for((tmp_path / "out/.run/shard/train/000000.json").is_file)
    os.killpg(process.pid, number)  # as a terminal and SLURM do
    output = ended(process, 75)
    assert output.count("error: ") == 1 and "the same command resumes" in output
    shard(source, tmp_path / "straight", rows_per_shard=16)
    ended(start(source, out), 0)
    assert tree_digest(out) == tree_digest(tmp_path / "straight")
