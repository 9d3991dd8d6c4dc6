"""A pool of processes that decode pictures and refuse a picture that crashes or hangs its decoder.

Decoders are C code, and one crafted picture could end a run of hours. A process that dies breaks
its whole executor, which does not report the task. The pool therefore retries the tasks in flight
one by one, in a separate process.
"""

import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from itertools import islice
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, TypeVar, cast

from cache_tools.errors import ResourceError
from cache_tools.images import PictureRefused
from cache_tools.processes import init_worker, start_forkserver

Task = TypeVar("Task")
Result = TypeVar("Result")
LIMIT_S = 60  # the largest allowed picture decodes within seconds
AHEAD = 4  # tasks in flight per process
_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_CRASH_CODES = {-number for number in _SIGNALS}


class DecodePool(AbstractContextManager["DecodePool"]):
    """A `map` over `workers` processes, which start with the first task.

    Use it in a `with` statement, which stops the processes.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._single: ProcessPoolExecutor | None = None  # one process, for retries

    def __exit__(self, *error: object) -> None:
        _stop(self._executor)
        _stop(self._single)

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result | PictureRefused]:
        """Yield the result of every task in order, or the PictureRefused that `function` raised.

        A task that crashes its process is refused as "decoder-crash", and one that takes more than
        LIMIT_S seconds as "timeout".

        Raises: ResourceError if the system kills a process; the other errors of `function`.
        """
        todo, pending = iter(tasks), deque[tuple[Task, Future[Result]]]()
        while True:
            for task in islice(todo, AHEAD * self.workers - len(pending)):
                pending.append((task, self._submit(function, task)))
            if not pending:
                return
            result: Result | PictureRefused
            try:
                result = self._result(function, *pending.popleft())
            except PictureRefused as refused:
                result = refused
            yield result

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        self._executor = self._executor or _start(self.workers)
        try:
            return self._executor.submit(function, task)
        except BrokenProcessPool:
            _stop(self._executor)
            self._executor = _start(self.workers)
            return self._executor.submit(function, task)

    def _result(
        self, function: Callable[[Task], Result], task: Task, future: Future[Result]
    ) -> Result:
        try:
            if _finishes(future):
                return future.result()
            _stop(self._executor)
            self._executor = None
        except BrokenProcessPool:
            pass  # `_submit` replaces the executor
        return self._run_alone(function, task)

    def _run_alone(self, function: Callable[[Task], Result], task: Task) -> Result:
        """Return the result of a task that runs alone, so that a crash has one possible cause."""
        self._single = self._single or _start(1)
        refusal = PictureRefused("timeout", "its decoder did not finish")
        try:
            future = self._single.submit(function, task)
            if _finishes(future):
                return future.result()
        except BrokenProcessPool:
            refusal = PictureRefused("decoder-crash", "its decoder crashed")
        (code,) = _stop(self._single)
        self._single = None
        if refusal.reason == "decoder-crash" and code not in _CRASH_CODES:
            raise ResourceError(
                f"a decoding process ended with code {code} (-9: the kernel may have killed it "
                "because memory ran out); run the same command again to resume"
            )
        raise refusal


class _Process(ForkServerProcess):
    """A process that does not run the main module again.

    A user's script may lack the `__main__` guard, or import torch.
    """

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    """A forkserver, because a fork of this process would copy the locks of its threads."""

    Process = _Process


def _start(workers: int) -> ProcessPoolExecutor:
    start_forkserver(workers, 32 + 2 * workers, "pipeline.candidates")
    return ProcessPoolExecutor(workers, _Context(), init_worker)


def _finishes(future: Future[Result]) -> bool:
    """Return whether a task finishes within LIMIT_S polls of one second.

    A clock would also count the hours in which the machine is suspended.
    """
    return any(wait([future], timeout=1).done for _ in range(LIMIT_S))


def _stop(executor: ProcessPoolExecutor | None) -> list[int | None]:
    """Kill the processes of an executor, wait for them, and return their exit codes."""
    if executor is None:
        return []
    processes, results = list(executor._processes.values()), executor._result_queue
    manager = cast(threading.Thread | None, executor._executor_manager_thread)
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    # The manager thread may wait for a result of a killed process. Closing the pipe ends the wait.
    results._writer.close()  # type: ignore[attr-defined]
    if manager is not None:
        manager.join()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
