"""What both programmes do at a terminal: exit codes, progress, clean stops."""

import errno
import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ParamSpec, Protocol, TypeVar

from .errors import Interrupted, McmError, ResourceError
from .storage import free_bytes

P = ParamSpec("P")
T = TypeVar("T")
PLAIN_EVERY_S = 10.0


def exit_code(error: BaseException) -> int:
    """The process exit code that stands for `error`."""
    if isinstance(error, McmError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    full = isinstance(error, OSError) or _is_gpu_memory(error)
    return ResourceError.exit_code if full else McmError.exit_code


def _is_gpu_memory(error: BaseException) -> bool:
    """Whether this is torch.OutOfMemoryError, by its name: this package does not import torch."""
    return type(error).__name__ == "OutOfMemoryError"


def describe(error: BaseException) -> str:
    """One line for the user, control characters escaped."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted; the same command resumes"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename:
        free_mb = free_bytes(Path(os.fsdecode(error.filename))) / 1e6
        text = f"{error.filename}: {error.strerror}, {free_mb:,.0f} MB free; make room and run the same command again"
    elif isinstance(error, OSError) and not isinstance(error, McmError):
        text = f"{error.filename or 'a file'}: {error.strerror or error}; mend that and run the same command again"
    elif _is_gpu_memory(error):
        text = ". ".join(str(error).split(". ")[:2]) + "; lower train.micro_batch (mcm-train) or --batch (mcm-cache)"
    else:
        text = str(error)
    return one_line(text)


def one_line(text: str) -> str:
    """`text` with control characters escaped: names of files may hold any, a terminal obeys some."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command: a fault that is the user's ends in one line on stderr and its exit code, never in a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        from .images import ignore_metadata_warnings  # imports numpy, which --help does not need

        try:
            with warnings.catch_warnings():
                ignore_metadata_warnings()
                return command(*args, **kwargs)
        except (McmError, OSError, KeyboardInterrupt, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_gpu_memory(error):
                raise
            print(f"error: {describe(error)}", file=sys.stderr, flush=True)
            sys.exit(exit_code(error))

    return run


def print_json(payload: Any) -> None:
    """The answer of a read command under --json."""
    print(json.dumps(payload, indent=2, sort_keys=True))


class Progress(Protocol):
    """How far a long work has come."""

    def update(self, n: int, note: str = "") -> None:
        """`n` more units are done; `note` is shown behind the rate."""


class _Plain:
    """A line every ten seconds and one at the end: rate, ETA, note."""

    def __init__(self, total: int, label: str, unit: str, done: int) -> None:
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, done, done
        self.start = self.last = time.monotonic()
        self.note = ""

    def update(self, n: int, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.show()

    def show(self) -> None:
        self.last = time.monotonic()
        rate = (self.done - self.first) / max(self.last - self.start, 1e-9)
        eta_s = (self.total - self.done) / rate if rate else float("inf")
        eta = f", {eta_s:.0f} s left" if self.done < self.total and rate else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{eta} {self.note}"
        print(text.rstrip(), flush=True)


class _Bar:
    """A bar on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, n: int, note: str = "") -> None:
        self.bar.update(self.task, advance=n, **({"note": note} if note else {}))


@contextmanager
def progress(total: int, label: str, unit: str, done: int = 0, quiet: bool = False) -> Iterator[Progress]:
    """Progress with rate and ETA: a bar on a terminal, plain lines elsewhere, nothing when `quiet` (other ranks)."""
    if not quiet and sys.stdout.isatty():
        from rich import progress as rich

        columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
        columns += [rich.TextColumn(unit), rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[note]}")]
        with rich.Progress(*columns) as bar:
            yield _Bar(bar, bar.add_task(label, total=total, completed=done, note=""))
    else:
        plain = _Plain(total, label, unit, done)
        plain.last = float("inf") if quiet else plain.last
        yield plain
        if not quiet:
            plain.show()


class StopFlag:
    """SIGTERM and Ctrl-C ask for a stop at the next safe point; a second Ctrl-C exits at once.

    The first signal prints `then`, what happens next; "" prints nothing, for all ranks but the main one.
    """

    def __init__(self, then: str = "") -> None:
        self.requested, self.then = False, then

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(Interrupted.exit_code)
        if self.then and not self.requested:  # not by print: the signal may have interrupted one
            os.write(2, f"\nstopping: {self.then}; press Ctrl-C again to stop at once\n".encode())
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
