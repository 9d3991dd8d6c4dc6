"""Watcher threads that end a process after its parent has ended, even if SIGKILL ended it."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable


def end_with_parent() -> None:
    """Kill this `multiprocessing` child once its parent has ended.

    The kernel closes a pipe of the parent at that moment, and the child waits for this.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    _end_after(parent.join, signal.SIGKILL)


def stop_with_launcher() -> None:
    """Send SIGTERM to this process once its launcher has ended, so that it saves and stops."""
    launcher = os.getppid()

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(1)

    _end_after(wait, signal.SIGTERM)


def _end_after(wait: Callable[[], object], number: signal.Signals) -> None:
    def watch() -> None:
        wait()
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
