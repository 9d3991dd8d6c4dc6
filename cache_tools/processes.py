"""Child processes end with their parent, whatever it died of: a killed parent tells its children nothing."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable


def end_with_parent() -> None:
    """Kill this `multiprocessing` child once its parent has ended; the parent alone holds a pipe open until then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    _end_after(parent.join, signal.SIGKILL)


def stop_with_launcher() -> None:
    """Send SIGTERM to this process, which saves and stops, once the process that started it has ended."""
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
