"""At a terminal: one line and the right exit code for a fault of the user's, a clean stop, a second one at once."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from cache_tools import errors
from cache_tools.console import StopFlag, error_line, exit_code, guarded, progress
from cache_tools.errors import UsageError
from cache_tools.records import Record, Text, decode_record, encode_record
from mcm.run_dir import recorded_exit

CODES = {"UsageError": 2, "TooManyRefused": 3, "CorruptionError": 4, "IdentityError": 5, "ResourceError": 7}


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [*(getattr(errors, name)("x\ny") for name in CODES), OSError(28, "No space", "/f")])
def test_one_line_and_the_exit_code(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        guarded(raise_error)(error)
    assert caught.value.code == CODES.get(type(error).__name__, 7)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("columns", [64, 100])
def test_a_narrow_terminal_cuts_the_note_and_never_the_numbers(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with progress(6111, "extract cache", "views", done=512) as bar:
        bar.update(1, "teacher 98%, wait for pictures 2%, wait for the disk 0%")
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", terminal.getvalue()).rstrip().splitlines()[-1]
    assert last.startswith("extract cache") and "513/6111 views" in last and "teacher" in last and "…" in last


def test_gpu_memory_is_a_resource() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. See")
    assert exit_code(error) == 7
    assert error_line(error) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB; lower train.micro_batch, --batch or --processes"
    )
    with pytest.raises(SystemExit):
        guarded(raise_error)(error)
    with pytest.raises(RuntimeError, match="a bug"):
        guarded(raise_error)(RuntimeError("a bug"))


def test_odd_metadata_is_ignored_while_a_command_runs_and_no_longer() -> None:
    script = """
import numpy, PIL.ImageOps, simplejpeg, warnings
kept = list(warnings.filters)
from cache_tools.console import guarded
assert warnings.filters == kept
guarded(warnings.warn_explicit)("odd metadata", UserWarning, "Image.py", 1, "PIL.Image")
assert warnings.filters == kept
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(raise_error)(ZeroDivisionError())


def test_control_characters_of_file_names_do_not_reach_the_terminal() -> None:
    assert error_line(OSError(2, "missing", "a\x1b[31m\nb")).isprintable()


def test_a_stop_is_asked_for_once_and_taken_at_once_the_second_time() -> None:
    code = """
import os, signal
from cache_tools.console import StopFlag
with StopFlag("this step is saved") as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "True\n")
    assert done.stderr == "\nstopping: this step is saved; press Ctrl-C again to stop at once\n"


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_plain_progress_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "shard", "pictures", done=4) as bar:
        bar.update(6, "1 refused")
    assert capsys.readouterr().out.startswith("shard: 10/10 pictures, ")
    with progress(10, "shard", "pictures", quiet=True) as bar:
        bar.update(10)
    assert capsys.readouterr().out == ""


SIGNALS = [signal.SIGTERM, signal.SIGINT]


def shell(code: str, streams: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a shell that redirects its streams."""
    line = f'exec "$0" -c "$1" {streams}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, code], capture_output=True, text=True, cwd=ROOT, env=os.environ | env
    )


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("program", ["pipeline.cli", "mcm.cli"])
def test_a_signal_before_or_after_the_command_ends_with_75(program: str, number: signal.Signals) -> None:
    done = shell(f"import {program}, os; os.kill(os.getpid(), {int(number)})")
    assert (done.returncode, done.stderr) == (75, "\nerror: interrupted; the same command resumes\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_command_cleans_up_and_ends_with_75(number: signal.Signals, tmp_path: Path) -> None:
    done = shell(f"""
import os, time
from pathlib import Path
from cache_tools.console import guarded
from cache_tools.storage import atomic_file
def work():
    with atomic_file(Path({str(tmp_path / "x")!r})):
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
guarded(work)()
""")
    assert (done.returncode, done.stderr) == (75, "error: interrupted; the same command resumes\n")
    assert not list(tmp_path.iterdir())


FULL = (">/dev/full", 7, "error: standard output: No space left on device")


@pytest.mark.parametrize(
    ("arguments", "streams", "code", "said"),
    [
        ("info tests/data/dataset-v1", ">&-", 0, ""),
        ("info tests/data/dataset-v1", "<&- >&- 2>&-", 0, ""),
        ("info tests/data/dataset-v1", *FULL),
        ("info nowhere", "2>/dev/full", 2, ""),
        ("info nowhere", "2>&-", 2, ""),
        ("--help", *FULL),
        ("--version", *FULL),
        ("--version", ">&-", 0, ""),
        ("verify --help", *FULL),
        ("verify --unknown", "2>/dev/full", 2, ""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_and_full_streams(arguments: str, streams: str, code: int, said: str, unbuffered: str) -> None:
    run = f"from pipeline.cli import app; app({arguments.split()})"
    done = shell(run, streams, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("arguments", ["info tests/data/dataset-v1", "--help", "--version", "verify --help"])
@pytest.mark.parametrize("first", ["", "import wandb; "])
def test_a_closed_pipe_ends_a_command_without_a_message(first: str, arguments: str) -> None:
    if first:
        pytest.importorskip("wandb")  # it wraps standard output
    reader, writer = os.pipe()
    os.close(reader)
    code = f"{first}from pipeline.cli import app; app({arguments.split()})"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    code = "import pipeline.cli, os, sys; sys.exit(os.open('pyproject.toml', os.O_RDONLY))"
    assert shell(code, "<&- >&- 2>&-").returncode > 2


def test_every_locale_is_utf8() -> None:
    code = "import pipeline.cli, os; print(chr(233), chr(0xDCFC), os.fsencode(chr(233)).hex())"
    done = shell(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout == "\u00e9 \\udcfc c3a9\n", done.stderr


def test_paths_that_are_not_utf8_are_refused_or_escaped(tmp_path: Path) -> None:
    class Named(Record):
        name: Text

    odd = os.fsdecode(b"gr\xfcn")
    assert decode_record(Named, encode_record(Named(name=odd)), "x").name == r"gr\xfcn"
    with pytest.raises(UsageError, match=r"gr\\xfcn: expected a path in UTF-8"), recorded_exit(tmp_path / odd, True):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "open files: Too many open files; raise `ulimit -n`"),
        (OSError(errno.ENOSPC, "No space", "/dev/shm/x"), "/dev/shm/x: No space, "),
        (RuntimeError("unable to open shared memory: Read-only file system (30)"), "unable to open shared memory"),
        (MemoryError("Unable to allocate 3 GiB"), "memory: Unable to allocate 3 GiB; free memory"),
        (EOFError(), "a worker process ended early"),
    ],
)
def test_scarce_resources_are_named(error: Exception, said: str) -> None:
    assert error_line(error).startswith(said) and exit_code(error) == 7


def test_an_error_of_the_workers_memory_names_it() -> None:
    done = shell("""
import multiprocessing.synchronize, os
from cache_tools.console import guarded
def fails(*_): raise OSError(30, os.strerror(30))
multiprocessing.synchronize.SemLock._make_name = fails
guarded(multiprocessing.Lock)()
""")
    assert done.stderr.startswith("error: /dev/shm or a pipe to a worker: Read-only file system") and not done.stdout
    assert done.returncode == 7 and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_training_stops_when_its_ablation_ended_while_it_started() -> None:
    done = shell("""
import os, subprocess, sys
from mcm.ablate import COMMAND
work = COMMAND.format(os.getpid()).replace("app()", "import time; time.sleep(60)")
subprocess.Popen(["sh", "-c", 'sleep 1; exec "$0" -c "$1"', sys.executable, work])
os._exit(0)
""")  # returns when the second process, which holds the pipes open, has ended
    assert done.stderr == "\nerror: interrupted; the same command resumes\n"
