"""At a terminal: one line and the right exit code for a fault of the user's, a clean stop, a second one at once."""

import os
import signal
import subprocess
import sys

import pytest

from cache_tools import errors
from cache_tools.console import StopFlag, describe, guarded, progress

CODES = {"UsageError": 2, "TooManyRefused": 3, "CorruptionError": 4, "IdentityError": 5, "ResourceError": 7}


@pytest.mark.parametrize("error", [*(getattr(errors, name)("x\ny") for name in CODES), OSError(28, "No space", "/f")])
def test_one_line_and_the_exit_code(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == CODES.get(type(error).__name__, 7)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    @guarded
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


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
