"""The start of both programs: signals and standard streams, set up before the slow imports."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; the same command resumes"
_EXIT_CODE = 75  # of errors.Interrupted
LAUNCHER = os.getppid()  # read before the slow imports, during which a launcher may end


def begin() -> None:
    """Set up signals, standard streams and UTF-8 for a program.

    SIGTERM or SIGINT outside a command ends the process with exit code 75. A closed standard stream
    becomes /dev/null; otherwise a data file could get its descriptor. File names and text are UTF-8
    in every locale, and messages escape other bytes. Worker processes and library imports, which
    have loaded `multiprocessing`, are left unchanged.
    """
    if "multiprocessing" in sys.modules:
        return
    if sys.getfilesystemencoding() != "utf-8":
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"PYTHONUTF8": "1"})
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _end(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, f"\nerror: {INTERRUPTED}\n".encode())
    finally:
        os._exit(_EXIT_CODE)
