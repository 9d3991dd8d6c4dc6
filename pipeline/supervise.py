"""Work in a watched process: the picture whose decoder crashes or hangs is found and refused, and the work goes on.

Decoders are C: one crafted picture could end a run of hours, nameless. So the work runs in a forked child, whose
threads note the picture that they decode in memory shared with this process. When the child crashes or a note stays,
each noted picture is tried alone in a process of its own; who fails there again is refused, and the work goes on.
"""

import mmap
import os
import select
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Protocol

from cache_tools.console import guarded
from cache_tools.errors import Interrupted, McmError, ResourceError

LIMIT_S, POLL_S = 60.0, 0.5  # the largest picture allowed decodes in seconds
SLOTS = 1024  # decoding threads at most
HUNG = -256  # beside the negative numbers of signals
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
FAULTS = {HUNG: "decoder-hang"} | {-int(number): "decoder-crash" for number in _CRASHES}
_STOPS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """Which pictures, by number, are being decoded now: seen by the process that made it and by its forks."""

    def __init__(self) -> None:
        self._slots = memoryview(mmap.mmap(-1, 8 * SLOTS)).cast("q")
        self._free = list(range(SLOTS))

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Note that this thread decodes picture `number` while inside."""
        slot = self._free.pop()
        self._slots[slot] = number + 1
        try:
            yield
        finally:
            self._slots[slot] = 0
            self._free.append(slot)

    def noted(self) -> list[int]:
        """The pictures in work, or that were when the process died."""
        return sorted(number - 1 for number in self._slots if number)


class Suspects(Protocol):
    """What the supervisor asks about pictures, by number."""

    def name(self, number: int) -> str:
        """For messages."""

    def alone(self, number: int, watch: Watch) -> object:
        """Decode it and nothing else."""

    def refuse(self, faults: dict[int, str]) -> None:
        """Write down that these must not be decoded again, and the reason of each."""


def supervised(work: Callable[[Watch], object], suspects: Suspects) -> None:
    """Run `work`, which resumes what it began, in a watched process until it ends; exits as it did when it failed.

    Call it before any thread is started.
    Raises: McmError when it crashes and no picture does alone; ResourceError when it is killed; Interrupted.
    """
    with _Relay() as relay:
        while (end := _run(partial(work, watch := Watch()), watch, relay)) in FAULTS:
            faults = {}
            for number in watch.noted():
                trial = Watch()
                found = _run(partial(suspects.alone, number, trial), trial, relay)
                if found in FAULTS:
                    faults[number] = FAULTS[found]
            if not faults:
                names = ", ".join(map(suspects.name, watch.noted())) or "no picture"
                what = "decoding did not go on" if end == HUNG else f"the process died of {signal.Signals(-end).name}"
                raise McmError(f"{what} with {names} in work; each decodes alone; the same command resumes")
            suspects.refuse(faults)
    if end == -signal.SIGKILL:
        raise ResourceError(
            "the decoding process was killed, by the kernel if memory ran out; the same command resumes"
        )
    if end < 0:  # as it would have died without a supervisor
        signal.signal(-end, signal.SIG_DFL)
        os.kill(os.getpid(), -end)
    if end:
        sys.exit(end)  # its message is printed


class _Relay:
    """Hands SIGTERM and Ctrl-C to the child, once each: the child has its own process group, or Ctrl-C came twice."""

    def __enter__(self) -> "_Relay":
        self.child, self.asked = 0, False
        self._previous = {number: signal.signal(number, self._hand_on) for number in _STOPS}
        return self

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.child:
            os.kill(self.child, number)

    def fork(self) -> int:
        """os.fork, between two signals.

        Raises: Interrupted when a stop was asked for before.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            if self.asked:
                raise Interrupted("stopped; the same command resumes")
            self.child = os.fork()
            if not self.child:
                os.setpgid(0, 0)
                self.__exit__(None, None, None)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        return self.child

    def wait(self) -> int:
        """The child's exit code, negative for a signal."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # so that no signal goes to a number that is free again
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        finally:
            self.child = 0
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _run(work: Callable[[], object], watch: Watch, relay: _Relay) -> int:
    """How `work` ended in a forked process: its exit code, minus the signal that it died of, or HUNG."""
    sys.stdout.flush()  # or the child would print our buffer again
    # Each pipe tells the end that reads that the process with the other end is gone, however it went.
    (child_reads, ours), (we_read, childs) = os.pipe(), os.pipe()
    if not relay.fork():
        os.close(ours)
        os.close(we_read)
        _be_child(work, child_reads)
    os.close(child_reads)
    os.close(childs)
    hung = _hangs(we_read, watch)
    if hung:
        os.kill(relay.child, signal.SIGKILL)
    end = relay.wait()
    os.close(we_read)
    os.close(ours)
    return HUNG if hung and end == -signal.SIGKILL else end


def _hangs(ended: int, watch: Watch) -> bool:
    """Wait until the child's end of the pipe `ended` closes (False), or a picture takes over LIMIT_S (True)."""
    polls: Counter[int] = Counter()  # that saw a picture in work: a clock would count the hours of a suspended machine
    while not select.select([ended], [], [], POLL_S)[0]:
        polls = Counter({number: polls[number] + 1 for number in watch.noted()})
        if max(polls.values(), default=0) * POLL_S > LIMIT_S:
            return True
    return False


def _be_child(work: Callable[[], object], parent: int) -> None:
    """Do `work` and exit, as a command would; or exit as soon as the parent is gone: the next run needs our lock."""

    def follow() -> None:
        os.read(parent, 1)
        os._exit(Interrupted.exit_code)

    code: object = 1
    try:
        threading.Thread(target=follow, daemon=True).start()
        guarded(work)()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
