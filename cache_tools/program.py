"""The first lines of both programs: signals and standard streams, before the imports that take time."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; the same command resumes"
_EXIT_CODE = 75  # of errors.Interrupted


def begin() -> None:
    """Prepare a process as a program: a signal before or after the command ends it with 75.

    A standard stream that the caller closed becomes /dev/null, so that no data file gets its number. File names and
    text are UTF-8 under every locale; other bytes are escaped in messages. Nothing is done in a worker process, or
    where the program is imported as a library.
    """
    if "multiprocessing" in sys.modules:
        return
    if sys.getfilesystemencoding() != "utf-8":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
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
