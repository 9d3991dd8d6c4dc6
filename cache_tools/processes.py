"""Child processes end with their parent, whatever it died of: a killed parent tells its children nothing."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable


def end_with_parent() -> None:
    """Kill this `multiprocessing` child once its parent has ended; the parent alone holds a pipe open until then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_after(parent.join, signal.SIGKILL)


def end_after(wait: Callable[[], object], number: signal.Signals) -> None:
    """Send the signal `number` to this process when `wait`, which runs in a thread, returns."""

    def watch() -> None:
        wait()
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
