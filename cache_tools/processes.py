"""Process setup: warnings, the limit of open files, and the end together with the parent."""

import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable

from .errors import ResourceError


def ignore_metadata_warnings() -> None:
    """Ignore the warnings of Pillow about unusual metadata in this process.

    Each program and each worker calls this once. `decode_rgb` does not filter warnings itself,
    because warnings.catch_warnings is not thread-safe.
    """
    warnings.filterwarnings("ignore", module="PIL")


def check_open_files(workers: int, needed: int) -> None:
    """Check that the limit of open files allows the `needed` files of `workers` processes.

    Raises: ResourceError if the limit is lower. Without this check, the forkserver would print a
    traceback.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < needed:
        raise ResourceError(
            f"open files: expected a limit of {needed} for {workers} workers; found {limit};"
            f" raise it by `ulimit -n {needed}`, or lower the number of workers"
        )


def end_with_parent() -> None:
    """Kill this `multiprocessing` child after its parent has ended.

    The child waits for a pipe of the parent, which the kernel closes when the parent ends.
    """
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
