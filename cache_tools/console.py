"""What both programs do at a terminal: exit codes, progress, clean stops."""

import errno
import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TextIO, TypeVar

from .errors import Interrupted, McmError, ResourceError
from .program import INTERRUPTED
from .storage import free_bytes

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]
PLAIN_EVERY_S = 10.0
_PACKAGES = ("cache_tools", "pipeline", "mcm")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILES = (errno.EMFILE, errno.ENFILE)
_SCARCE = (*_FULL, *_FILES, errno.ENOMEM, errno.EROFS)  # torch raises a RuntimeError with the text of these


def exit_code(error: BaseException) -> int:
    """The process exit code that stands for `error`."""
    if isinstance(error, McmError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return ResourceError.exit_code if _is_resource(error) else McmError.exit_code


def _is_resource(error: BaseException) -> bool:
    scarce = isinstance(error, RuntimeError) and any(os.strerror(number) in str(error) for number in _SCARCE)
    return scarce or isinstance(error, OSError | MemoryError | EOFError) or _is_gpu_memory(error)


def _is_gpu_memory(error: BaseException) -> bool:
    """Whether this is torch.OutOfMemoryError, by its name: this package does not import torch."""
    return type(error).__name__ == "OutOfMemoryError"


def error_line(error: BaseException) -> str:
    """One line for the user, control characters escaped."""
    again = "and run the same command again"
    if isinstance(error, KeyboardInterrupt):
        text = INTERRUPTED
    elif isinstance(error, OSError):
        text = f"{_resource(error)}: {error.strerror or error}"
        if error.errno in _FULL and error.filename:
            text += f", {free_bytes(Path(os.fsdecode(error.filename))) / 1e6:,.0f} MB free"
        remedy = {**dict.fromkeys(_FULL, "make room"), **dict.fromkeys(_FILES, "raise `ulimit -n`, lower the workers")}
        text += f"; {remedy.get(error.errno or 0, 'correct that')} {again}"
    elif _is_gpu_memory(error):
        text = ". ".join(str(error).split(". ")[:2]) + "; lower train.micro_batch (mcm-train) or --batch (mcm-cache)"
    elif isinstance(error, MemoryError):
        text = f"memory: {error or 'none is left'}; free some or lower the batch {again}"
    elif isinstance(error, EOFError):
        text = f"a worker process: it ended early ({error}); lower the workers or raise `ulimit -n` {again}"
    else:
        text = str(error)
    return one_line(text)


def _resource(error: OSError) -> str:
    """What the system's error is about; print, pipes and shared memory name no file."""
    if error.filename:
        return os.fsdecode(error.filename)
    if error.errno in _FILES:
        return "open files"
    trace, files = error.__traceback__, list[Path]()
    while trace:
        files.append(Path(trace.tb_frame.f_code.co_filename))
        trace = trace.tb_next
    if any("multiprocessing" in file.parts for file in files):
        return "/dev/shm or a pipe to a worker"
    return "standard output" if files and files[-1].parent.name in _PACKAGES else f"the system, in {files[-1:]}"


def one_line(text: str) -> str:
    """`text` with control characters escaped: names of files may hold any, a terminal obeys some."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Call `handler` at SIGTERM and Ctrl-C while inside."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _say(text: str, stream: TextIO) -> None:
    """Print `text` and flush. A stream that is full or closed becomes /dev/null, so that the exit code stays."""
    try:
        print(text, end="\n" if text else "", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def kept() -> Iterator[None]:
    """Warn where a result cannot be written inside the block: what was computed is still printed."""
    try:
        yield
    except (McmError, OSError) as error:
        print(f"warning: the result is not kept: {error_line(error)}", file=sys.stderr, flush=True)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command: the user's fault ends in one line on stderr and its exit code, never in a traceback.

    SIGTERM and Ctrl-C raise KeyboardInterrupt where no StopFlag is held, and so clean up.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from .images import ignore_metadata_warnings  # imports numpy, which --help does not need

        try:
            with handling(signal.default_int_handler), warnings.catch_warnings():
                ignore_metadata_warnings()
                result = command(*args, **kwargs)
                sys.stdout.flush()
                return result
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, McmError | KeyboardInterrupt) and not _is_resource(error):
                raise
            _say(f"error: {error_line(error)}", sys.stderr)
            _say("", sys.stdout)
            sys.unraisablehook = lambda _: None  # of objects that a library could not finish making
            sys.exit(exit_code(error))

    return run


def print_json(payload: Any) -> None:
    """The answer of a read command under --json."""
    print(json.dumps(payload, indent=2, sort_keys=True))


class Progress:
    """How far a long work has come: a bar of `rich` on a terminal, or a line every ten seconds and one at the end."""

    def __init__(self, total: int, label: str, unit: str, done: int, show: Callable[..., Any] | None) -> None:
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, done, done
        self.start = self.last = time.monotonic()
        self.note, self._show = "", show

    def update(self, n: int, note: str = "") -> None:
        """`n` more units are done; `note` is shown behind the rate."""
        self.done, self.note = self.done + n, note or self.note
        if self._show:
            self._show(completed=self.done, note=self.note)
        elif time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.print()

    def print(self) -> None:
        """Print a line with the rate, the remaining time and the note."""
        self.last = time.monotonic()
        rate = (self.done - self.first) / max(self.last - self.start, 1e-9)
        eta = f", {(self.total - self.done) / rate:.0f} s left" if self.done < self.total and rate else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{eta} {self.note}"
        print(one_line(text.rstrip()), flush=True)


@contextmanager
def progress(total: int, label: str, unit: str, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Show the progress of a long work; nothing when `quiet` (other ranks)."""
    if not quiet and sys.stdout.isatty():
        from rich import progress as rich

        columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
        columns += [rich.TextColumn(unit), rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[note]}")]
        with rich.Progress(*columns) as bar:
            task = bar.add_task(one_line(label), total=total, completed=done, note="")
            yield Progress(total, label, unit, done, functools.partial(bar.update, task))
    elif quiet:
        yield Progress(total, label, unit, done, lambda **_: None)
    else:
        yield (plain := Progress(total, label, unit, done, None))
        plain.print()


class StopFlag:
    """SIGTERM and Ctrl-C ask for a stop at the next safe point; a second Ctrl-C exits at once.

    The first signal prints `then`, what happens next; "" prints nothing, for all ranks but the main one.
    """

    def __init__(self, then: str = "") -> None:
        self.requested, self.then, self._handling = False, then, handling(self._ask)

    def __enter__(self) -> "StopFlag":
        self._handling.__enter__()
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(Interrupted.exit_code)
        if self.then and not self.requested:  # not by print: the signal may have interrupted one
            with suppress(OSError):
                os.write(2, f"\nstopping: {self.then}; press Ctrl-C again to stop at once\n".encode())
        self.requested = True

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)
