"""Process setup: warnings, the forkserver and its workers, and the end together with the parent."""

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import ResourceError


def ignore_metadata_warnings() -> None:
    """Ignore the warnings of Pillow about unusual metadata in this process.

    Each program and each worker calls this once. `decode_rgb` does not filter warnings itself,
    because warnings.catch_warnings is not thread-safe.
    """
    warnings.filterwarnings("ignore", module="PIL")


def start_forkserver(workers: int, files: int, *modules: str) -> None:
    """Start the forkserver, which imports `modules`, with SIGTERM and SIGINT blocked.

    The workers inherit the blocked signals: a launcher or a terminal signals the whole process
    group, but the current step or shard still needs the workers.

    Raises: ResourceError if fewer than `files` open files are allowed. Otherwise the forkserver
    would print a traceback.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < files:
        raise ResourceError(
            f"open files: expected a limit of {files} for {workers} workers; found {limit};"
            f" raise it by `ulimit -n {files}`, or lower the number of workers"
        )
    multiprocessing.forkserver.set_forkserver_preload(list(modules))
    with blocked(signal.SIGTERM, signal.SIGINT):
        multiprocessing.forkserver.ensure_running()


def default_workers() -> int:
    """Return the loader workers per rank: one less than the cores of the rank, and at most 8.

    On 16 cores, the step of ViT-S was slower with 12 workers than with 8 (docs/performance.md).
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(8, len(os.sched_getaffinity(0)) // ranks - 1))


@contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block `signals` in the processes that the block starts."""
    multiprocessing.resource_tracker.ensure_running()  # first: its start unblocks these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(*_: object) -> None:
    """Set up a `multiprocessing` child: ignore metadata warnings, and end with the parent.

    The child waits for a pipe of the parent, which the kernel closes when the parent ends.
    """
    ignore_metadata_warnings()
    parent = multiprocessing.parent_process()
    assert parent is not None
    _end_after(parent.join, signal.SIGKILL)


def stop_with_launcher(launcher: int) -> None:
    """Send SIGTERM to this process after its parent `launcher` has ended, so it saves and stops.

    `launcher` is a process id that was read earlier: the launcher may have ended before this call.
    """

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(1)

    _end_after(wait, signal.SIGTERM)


def _end_after(wait: Callable[[], object], number: signal.Signals) -> None:
    def watch() -> None:
        wait()
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
