"""Run several workers of one extraction in processes, with one progress line and one stop."""

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Interrupted, ResourceError
from cache_tools.processes import blocked, init_worker

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int, str], object]  # shows a number of finished views, and a note
POLL_S = 0.2
CONTEXT = get_context("spawn")
_pipe: Connection | None = None  # in a worker process: to the parent


def run_workers(
    work: Callable[[Task], Result], tasks: Sequence[Task], label: str, stopped: str
) -> list[Result]:
    """Return the result of `work(task)` of every task, each in its own process, in any order.

    SIGTERM, Ctrl-C and the first error of a worker send SIGTERM to every worker. The workers end
    with this process.

    Raises: the first error of a worker; Interrupted with the text `stopped`; ResourceError when
    the system killed a worker.
    """
    results, error, bar, told = list[Result](), None, None, False
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag("each worker finishes and commits its current shard"))
        workers = dict(_start(work, task) for task in tasks)
        while workers:
            for pipe in wait(list(workers), POLL_S):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    kind, value = "error", _killed(stopped if stop.requested else None)
                if kind == "views":
                    total, done, n, note = value
                    bar = bar or stack.enter_context(progress(total, label, "views", done))
                    bar.update(n, note)
                    continue
                workers.pop(pipe).join()
                if kind == "error":
                    error = error or value
                else:
                    results.append(value)
            if (error or stop.requested) and not told:
                told = True
                for worker in workers.values():
                    worker.terminate()
    if error:
        raise error
    return results


def _killed(stopped: str | None) -> Exception:
    """Return the error of a worker that ended without a result."""
    if stopped is not None:  # SIGTERM ended it before its first shard
        return Interrupted(stopped)
    return ResourceError(
        "a worker process was killed, perhaps because memory ran out; lower --processes and run "
        "the same command again to resume"
    )


def _start(work: Callable[[Task], object], task: Task) -> tuple[Connection, SpawnProcess]:
    """Start a worker; a forkserver would end at once when SIGTERM reaches the process group."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    worker = CONTEXT.Process(target=_run, args=(sender, work, task), daemon=True)
    with blocked(signal.SIGINT):  # a Ctrl-C of the terminal stops only the parent
        worker.start()
    sender.close()
    return receiver, worker


def _run(pipe: Connection, work: Callable[[Task], object], task: Task) -> None:
    global _pipe
    _pipe = pipe
    init_worker()
    try:
        pipe.send(("result", work(task)))
    except Exception as error:  # the parent raises it
        error.add_note(traceback.format_exc())
        with suppress(BrokenPipeError):  # the parent was killed, so no process reads the error
            pipe.send(("error", error))


@contextmanager
def reporting(total: int, label: str, done: int, then: str) -> Iterator[tuple[StopFlag, Report]]:
    """Yield the StopFlag and the Report of a worker; the first signal prints `then`.

    A worker process reports to its parent, which prints the progress and handles Ctrl-C.
    """
    if _pipe is None:
        with StopFlag(then) as stop, progress(total, label, "views", done) as bar:
            yield stop, bar.update
    else:
        send = _pipe.send
        with StopFlag() as stop:
            send(("views", (total, done, 0, "")))
            yield stop, lambda n, note: send(("views", (total, done, n, note)))
