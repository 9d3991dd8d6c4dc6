"""The terminal behavior of both programs: exit codes, error lines, progress and clean stops."""

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
from .processes import ignore_metadata_warnings
from .program import INTERRUPTED
from .storage import free_bytes

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]
PLAIN_EVERY_S = 10.0
_PRINTERS = ("cache_tools", "pipeline", "mcm", "_click", "click", "lib")  # print; lib is wandb's
CLOSED_PIPE = 141  # as a shell shows a process that SIGPIPE ended
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILES = (errno.EMFILE, errno.ENFILE)
# Torch raises a RuntimeError that contains the text of one of these error numbers.
_SCARCE = (*_FULL, *_FILES, errno.ENOMEM, errno.EROFS)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends with `error`."""
    if isinstance(error, McmError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if isinstance(error, BrokenPipeError) and _resource(error) == "standard output":
        return CLOSED_PIPE
    return ResourceError.exit_code if _is_resource(error) else McmError.exit_code


def _is_resource(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and any(os.strerror(n) in str(error) for n in _SCARCE):
        return True
    return isinstance(error, OSError | MemoryError | EOFError) or _is_gpu_memory(error)


def _is_gpu_memory(error: BaseException) -> bool:
    """Return whether `error` is a torch.OutOfMemoryError; torch is not imported to find out."""
    return type(error).__name__ == "OutOfMemoryError"


def error_line(error: BaseException) -> str:
    """Return the message of `error` for the user, as one line without control characters."""
    again = "and run the same command again"
    if isinstance(error, KeyboardInterrupt):
        text = INTERRUPTED
    elif isinstance(error, OSError):
        text = f"{_resource(error)}: {error.strerror or error}"
        if error.errno in _FULL and error.filename:
            text += f", {free_bytes(Path(os.fsdecode(error.filename))) / 1e6:,.0f} MB free"
        remedies = dict.fromkeys(_FULL, "free disk space")
        remedies |= dict.fromkeys(_FILES, "raise `ulimit -n` or lower the number of workers")
        text += f"; {remedies.get(error.errno or 0, 'fix this')} {again}"
    elif _is_gpu_memory(error):
        text = ". ".join(str(error).split(". ")[:2])
        text += "; lower train.micro_batch, --batch or --processes"
    elif isinstance(error, MemoryError):
        text = f"memory: {error or 'none is left'}; free memory or lower the batch size {again}"
    elif isinstance(error, EOFError):
        remedy = "lower the number of workers or raise `ulimit -n`"
        text = f"a worker process ended early ({error}); {remedy} {again}"
    else:
        text = str(error)
    return one_line(text)


def _resource(error: OSError) -> str:
    """Return the name of the resource that an OSError is about.

    Errors of print, pipes and shared memory name no file; the traceback shows what they are about.
    """
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
    if files and files[-1].parent.name in _PRINTERS:
        return "standard output"
    caller = f", called from {files[-1]}" if files else ""
    return f"the operating system{caller}"


def one_line(text: str) -> str:
    """Return `text` with escaped control characters.

    File names can contain control characters, which a terminal interprets.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Call `handler` on SIGTERM and SIGINT (Ctrl-C) inside the block."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def say(text: str, stream: TextIO) -> None:
    """Print `text` and flush the stream.

    If the stream is full or closed, it becomes /dev/null: another error would change the exit code.
    """
    try:
        print(text, end="\n" if text else "", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def warn_if_not_saved() -> Iterator[None]:
    """Print a warning if the block cannot write a result; the caller still prints the result."""
    try:
        yield
    except (McmError, OSError) as error:
        print(f"warning: the result is not saved: {error_line(error)}", file=sys.stderr, flush=True)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command: an error of the user prints one line on stderr and sets the exit code.

    If the reader of standard output has closed the pipe, nothing is printed. Other errors are bugs
    and keep their traceback. Outside a StopFlag, SIGTERM and Ctrl-C raise
    KeyboardInterrupt, so that the command cleans up.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with handling(signal.default_int_handler), warnings.catch_warnings():
                ignore_metadata_warnings()
                result = command(*args, **kwargs)
                sys.stdout.flush()
                return result
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, McmError | KeyboardInterrupt) and not _is_resource(error):
                raise
            if exit_code(error) != CLOSED_PIPE:
                say(f"error: {error_line(error)}", sys.stderr)
            say("", sys.stdout)
            sys.unraisablehook = lambda _: None  # a library may leave incomplete objects behind
            sys.exit(exit_code(error))

    return run


def print_json(payload: Any) -> None:
    """Print the result of a read command as JSON, for --json."""
    print(json.dumps(payload, indent=2, sort_keys=True))


class Progress:
    """The progress of a long command: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(
        self, total: int, label: str, unit: str, done: int, show: Callable[..., Any] | None
    ) -> None:
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, done, done
        self.start = self.last = time.monotonic()
        self.note, self._show = "", show

    def update(self, n: int, note: str = "") -> None:
        """Add `n` finished units; `note` is shown after the rate."""
        self.done, self.note = self.done + n, note or self.note
        if self._show:
            self._show(completed=self.done, note=self.note)
        elif time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.print()

    def print(self) -> None:
        """Print a line with the rate, the remaining time and the note."""
        self.last = time.monotonic()
        rate = (self.done - self.first) / max(self.last - self.start, 1e-9)
        left = self.total - self.done
        eta = f", {left / rate:.0f} s left" if left > 0 and rate else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{eta}"
        print(one_line(f"{text} {self.note}".rstrip()), flush=True)


@contextmanager
def progress(
    total: int, label: str, unit: str, done: int = 0, quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of a long command, or nothing if `quiet`, as on ranks other than 0."""
    if not quiet and sys.stdout.isatty():
        from rich import progress as rich
        from rich.table import Column

        class Note(rich.TextColumn):  # on a narrow terminal, the note is cut before the numbers
            def render(self, task: rich.Task) -> Any:
                text = super().render(task)
                text.no_wrap = True
                return text

        text, column = rich.TextColumn("{task.description}"), Column(overflow="ellipsis")
        note = Note("{task.fields[note]}", table_column=column)
        numbers = rich.MofNCompleteColumn(), rich.TextColumn(unit), rich.TimeRemainingColumn()
        with rich.Progress(text, rich.BarColumn(20), *numbers, note) as bar:
            task = bar.add_task(one_line(label), total=total, completed=done, note="")
            yield Progress(total, label, unit, done, functools.partial(bar.update, task))
    elif quiet:
        yield Progress(total, label, unit, done, lambda **_: None)
    else:
        yield (plain := Progress(total, label, unit, done, None))
        plain.print()


class StopFlag:
    """A flag that SIGTERM or Ctrl-C sets; the command then stops at the next safe point.

    A second Ctrl-C exits at once. The first signal prints `then`: what the command does next. Ranks
    other than 0 pass "", which prints nothing.
    """

    def __init__(self, then: str = "") -> None:
        self.requested, self.then, self._handling = False, then, handling(self._on_signal)

    def __enter__(self) -> "StopFlag":
        self._handling.__enter__()
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            os._exit(Interrupted.exit_code)
        if self.then and not self.requested:
            text = f"\nstopping: {self.then}; press Ctrl-C again to stop at once\n"
            with suppress(OSError):
                os.write(2, text.encode())  # the signal may have interrupted a print
        self.requested = True

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)
