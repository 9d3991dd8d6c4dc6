"""The processes of a run look after each other: where one fails or is gone, all end soon and say the first cause."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from threading import Event, Thread
from types import FrameType, TracebackType

from accelerate import Accelerator
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from cache_tools.console import describe, exit_code
from cache_tools.errors import Interrupted, ResourceError

# In beats, one a second, and not in seconds: processes that were suspended together wake up together. A launcher kills
# 30 s after it has asked to stop: who is gone must be named before. What holds Python's lock is silent: safetensors,
# as it parses a checkpoint, for 0.6 s a GB.
SILENT, SUSPECTED = 25, 10  # until a process is gone; the same where something failed that needs the others
GRACE = 3  # the first to fail records and says it before the others do
LEFT = -(2**40)  # added to the beats of a process that needs the others no more: they are negative then
CAUSE, NONE, SUSPECTS = "cause", "none", "suspects"  # keys, and no cause


class Heartbeat:
    """`with Heartbeat(accelerator) as peers:` around all that needs the other processes; idle where there are none."""

    # Of those in this process: keys of an earlier one, or of an attempt before a restart, are not ours.
    number = count()

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.rank: int = accelerator.process_index if accelerator else 0
        self.world: int = accelerator.num_processes if accelerator else 1
        self.record: Callable[[int, str], None] | None = None  # writes exit.json, once the folder is this run's
        self.cause, self.left = "", Event()  # `cause` is what this process failed of

    def __enter__(self) -> "Heartbeat":
        if self.world > 1:
            # A connection of its own: on the process group's, the main thread waits for keys.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, wait_for_workers=False)
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.store = PrefixStore(f"mcm/{attempt}/{next(self.number)}", store)
            self.neighbour = (self.rank + 1) % self.world  # each looks after one, so that the store serves many
            self.own, self.watched = (f"beats/{rank}" for rank in (self.rank, self.neighbour))
            for key in (self.own, self.watched, SUSPECTS):
                self.store.add(key, 0)  # whoever reads a key that is missing waits for it
            self.store.compare_set(CAUSE, "", NONE)
            self.store.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
            self.previous = signal.signal(signal.SIGTERM, self._terminated)  # the loop has its own
            self.thread = Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Interrupted):
            self.fail(error)
        if self.world > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if error else self.previous)
            self.left.set()
            self.thread.join()
            with suppress(DistError):
                self.store.add(self.own, LEFT)

    def fail(self, error: BaseException) -> None:
        """Record `error` if it is the first cause of the run's end; else end this process, saying the one that is."""
        if self.cause:
            return
        code, message = exit_code(error), f"{type(error).__name__}: {describe(error)}"
        if self.world > 1:
            message = f"rank {self.rank}: {message}"
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a launcher that has seen another process end
            if isinstance(error, DistError) or "gloo" in str(error):
                self._suspect()
        self.cause = f"{code} {message}"
        if self.world == 1 or self._is_first(self.cause):
            self._record(self.cause)
        else:
            self.thread.join()

    def _is_first(self, cause: str) -> bool:
        try:
            return bool(self.store.compare_set(CAUSE, NONE, cause).decode() == cause)
        except DistError:
            return True  # nobody is there to ask

    def _record(self, cause: str) -> None:
        code, _, message = cause.partition(" ")
        if self.record:
            with suppress(OSError):  # the first cause is what must be read
                self.record(int(code), message)

    def _suspect(self) -> None:
        """Let the threads find whose loss may be the reason, and end the processes."""
        with suppress(DistError):
            self.store.add(SUSPECTS, 1)
        time.sleep(SUSPECTED + GRACE + 2)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._suspect()
        raise Interrupted("stopped before the first step or behind the last; the same command goes on")

    def _watch(self) -> None:
        """The thread: show that this process lives, and see whether the next one does and all are well."""
        silent, last = 0, b""
        while not self.left.wait(1.0):
            try:
                self.store.add(self.own, 1)
                beat, cause, suspects = self.store.multi_get([self.watched, CAUSE, SUSPECTS])
            except DistError:
                return self._lost("the launcher or rank 0 is gone")
            if cause.decode() not in (NONE, self.cause):
                time.sleep(GRACE)
                _end(cause.decode())
            silent, last = (silent + 1 if beat == last and int(beat) >= 0 else 0), beat
            if silent > (SUSPECTED if int(suspects) else SILENT):
                self._wake(self.neighbour)
                self._lost(f"rank {self.neighbour} is gone: silent for {silent} s, so killed or stopped")

    def _wake(self, rank: int) -> None:
        """Let a stopped process of this machine go on, so that it ends as well; a launcher kills it 30 s later."""
        if self.store.check([key := f"process/{rank}"]):
            host, _, pid = self.store.get(key).decode().rpartition(" ")
            if host == socket.gethostname():
                with suppress(OSError):
                    os.kill(int(pid), signal.SIGCONT)

    def _lost(self, message: str) -> None:
        """End this process, if that is the first cause."""
        cause = f"{ResourceError.exit_code} {message}; look at its machine and memory; the same command resumes"
        if not self.cause and self._is_first(cause):
            self._record(cause)
            _end(cause)


def _end(cause: str) -> None:
    code, _, message = cause.partition(" ")
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(int(code))  # the main thread may wait for the others for ever
