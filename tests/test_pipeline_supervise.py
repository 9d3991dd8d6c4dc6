"""Decoders that crash and hang: the picture is named and refused, the rest is as ever; signals, kills, exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tree_digest
from test_pipeline_shard import make_source

from cache_tools.images import PictureRefused
from cache_tools.storage import is_locked
from pipeline import shard_split as module
from pipeline.shard import shard

# The command, with a decoder that does as the first bytes of a "picture" say.
SCRIPT = """
import ctypes, os, resource, signal, sys, time
from pathlib import Path
from pipeline import shard_split, supervise
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
real = shard_split.decode_rgb
def decode_rgb(data):
    word, _, rest = data[:200].partition(b" ")
    if word == b"SIGSEGV":
        ctypes.string_at(0)
    if word == b"SIGABRT":
        os.abort()
    if word == b"SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == b"HANG":
        time.sleep(1e6)
    if word == b"ONCE" and not Path(rest.decode()).exists():
        Path(rest.decode()).touch()
        signal.raise_signal(signal.SIGBUS)
    time.sleep({slow})
    return real(data)
shard_split.decode_rgb = decode_rgb
supervise.LIMIT_S, supervise.POLL_S = {limit}, 0.05
sys.argv[1:] = {arguments!r}
from pipeline.cli import app
app()
"""


def start(source: Path, out: Path, *more: object, limit: float = 2.0, slow: float = 0.0) -> subprocess.Popen[str]:
    arguments = [str(word) for word in ("shard", source, out, "--rows-per-shard", 16, *more)]
    code = SCRIPT.format(arguments=arguments, limit=limit, slow=slow)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


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


def plant(source: Path, **words: str) -> dict[str, str]:
    """Put bytes that make the decoder misbehave in the place of pictures; {source: reason to expect}."""
    for name, word in words.items():
        (source / "train" / "class1" / f"{name[1:]}.img").write_bytes(f"{word} ".encode())
    reasons = {"HANG": "decoder-hang", "SIGSEGV": "decoder-crash", "SIGABRT": "decoder-crash"}
    return {word: reasons[word] for word in words.values()}


@pytest.fixture
def straight(tmp_path, monkeypatch):
    """What a run gives that knows beforehand which pictures its decoder fails on."""

    def make(source: Path, reasons: dict[str, str]) -> dict[str, str]:
        def decode_rgb(data, real=module.decode_rgb):
            if reason := reasons.get(data[:20].decode("latin1").partition(" ")[0]):
                raise PictureRefused(reason, module.FAULT_DETAIL[reason])
            return real(data)

        monkeypatch.setattr(module, "decode_rgb", decode_rgb)
        shard(source, tmp_path / "straight", rows_per_shard=16, max_refused=1)
        return tree_digest(tmp_path / "straight")

    return make


def test_pictures_that_crash_or_hang_the_decoder_are_refused_and_the_run_goes_on(tmp_path, straight, tally):
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    reasons = plant(source, _001="SIGSEGV", _013="HANG", _028="SIGABRT")
    output = ended(start(source, out, "--max-refused", 1), 0)
    for name, what in (("001", "crashed"), ("013", "did not come to an end"), ("028", "crashed")):
        assert f"warning: train/class1/{name}.img: refused, its decoder {what}" in output
    assert "train: 37 rows in 3 shards, 3 refused" in output
    assert tree_digest(out) == straight(source, reasons)
    assert tree_digest(tmp_path / "out.run").keys() == {"shard.lock"}
    tally("pictures that crash or hang the decoder", inputs=3, failures=0)


def test_what_was_refused_stays_refused_in_the_next_run(tmp_path, straight):
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    reasons = plant(source, _001="SIGSEGV")
    assert "found 1 decoder-crash" in ended(start(source, out, "--max-refused", 0), 3)
    shard(source, out, rows_per_shard=16, max_refused=1)  # bare: whoever decoded it would find no picture
    assert tree_digest(out) == straight(source, reasons)


def test_a_crash_that_no_picture_repeats_ends_by_name_and_resumes(tmp_path):
    source, out = make_source(tmp_path / "source", train=20, val=1), tmp_path / "out"
    (source / "train/class1/001.img").write_bytes(f"ONCE {tmp_path}/once ".encode())
    output = ended(start(source, out, "--workers", 1, "--max-refused", 1), 1)
    assert "error: the process died of SIGBUS with train/class1/001.img in work; each decodes alone" in output
    assert "19 rows in 2 shards, 1 refused" in ended(start(source, out, "--max-refused", 1), 0)


def test_a_killed_decoding_process_is_no_ones_fault(tmp_path):
    source = make_source(tmp_path / "source", train=20, val=1)
    plant_kill = source / "train/class1/001.img"
    plant_kill.write_bytes(b"SIGKILL ")
    assert "error: the decoding process was killed" in ended(start(source, tmp_path / "out"), 7)


def test_the_child_dies_with_its_parent_and_frees_the_lock(tmp_path):
    source, lock = make_source(tmp_path / "source", train=20, val=1), tmp_path / "out.run" / "shard.lock"
    (source / "train/class1/001.img").write_bytes(b"HANG ")
    process = start(source, tmp_path / "out", limit=1e6)
    wait_for(lambda: lock.is_file() and is_locked(lock))
    process.kill()
    process.wait()
    wait_for(lambda: not is_locked(lock))
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_child_once(tmp_path, number):
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    process = start(source, out, slow=0.02)
    wait_for((tmp_path / "out.run/shard/train/000000.json").is_file)
    os.killpg(process.pid, number)  # as a terminal does; a second Ctrl-C would end it without a word
    output = ended(process, 75)
    assert output.count("error: ") == 1 and "the same command resumes" in output
    shard(source, tmp_path / "straight", rows_per_shard=16)
    ended(start(source, out), 0)
    assert tree_digest(out) == tree_digest(tmp_path / "straight")
