"""At a terminal: one line and the right exit code for a fault of the user's, a clean stop, a second one at once."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from cache_tools import errors
from cache_tools.console import StopFlag, describe, exit_code, guarded, progress

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


def test_gpu_memory_is_a_resource() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. See")
    assert exit_code(error) == 7
    assert describe(error) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB; lower train.micro_batch (mcm-train) or --batch (mcm-cache)"
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
    assert describe(OSError(2, "missing", "a\x1b[31m\nb")).isprintable()


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
