"""A pool of processes that decode pictures: one that crashes or hangs its decoder is refused, and the work goes on.

Decoders are C code, and one crafted picture could end a run of hours. A process that dies breaks its whole executor
without naming its task. So the tasks that were in flight are then tried one by one, in a process of their own.
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
from cache_tools.images import PictureRefused, ignore_metadata_warnings
from cache_tools.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
LIMIT_S = 60  # the largest picture that is allowed decodes in seconds
AHEAD = 4  # tasks in flight per process
_CRASHES = {-number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)}


class DecodePool(AbstractContextManager["DecodePool"]):
    """`workers` processes behind `map`. Use it in a `with` statement; nothing starts before the first task."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._single: ProcessPoolExecutor | None = None  # one process, for the tasks that are tried one by one

    def __exit__(self, *error: object) -> None:
        _stop(self._executor)
        _stop(self._single)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result | PictureRefused]:
        """The result of every task in order, or the PictureRefused that `function` raised for it.

        A task that crashes its process or takes over LIMIT_S is refused as "decoder-crash" or "timeout".

        Raises: ResourceError when the system kills a process; anything else that `function` raises.
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

    def _result(self, function: Callable[[Task], Result], task: Task, future: Future[Result]) -> Result:
        try:
            if _ends(future):
                return future.result()
            _stop(self._executor)
            self._executor = None
        except BrokenProcessPool:
            pass  # of an executor that `_submit` replaces
        return self._alone(function, task)

    def _alone(self, function: Callable[[Task], Result], task: Task) -> Result:
        """The result of a task, with no other one in work; where it fails, it is to blame."""
        self._single = self._single or _start(1)
        refusal = PictureRefused("timeout", "its decoder did not come to an end")
        try:
            future = self._single.submit(function, task)
            if _ends(future):
                return future.result()
        except BrokenProcessPool:
            refusal = PictureRefused("decoder-crash", "its decoder crashed")
        (code,) = _stop(self._single)
        self._single = None
        if refusal.reason == "decoder-crash" and code not in _CRASHES:
            raise ResourceError(
                f"a decoding process ended with code {code}; expected it to work on (-9: it was killed, by the kernel "
                "if memory ran out); the same command resumes"
            )
        raise refusal


class _Process(ForkServerProcess):
    """A process that does not run the main module again: a script may lack the guard, or import torch."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):  # a fork of this process would copy the locks of its threads
    Process = _Process


def _start(workers: int) -> ProcessPoolExecutor:
    context = _Context()
    context.set_forkserver_preload(["pipeline.candidates"])
    return ProcessPoolExecutor(workers, context, _begin)


def _begin() -> None:
    """Prepare a worker: it leaves Ctrl-C to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_metadata_warnings()
    end_with_parent()


def _ends(future: Future[Result]) -> bool:
    """Whether a task ends within LIMIT_S polls of a second; a clock would also count the hours of a stopped machine."""
    return any(wait([future], timeout=1).done for _ in range(LIMIT_S))


def _stop(executor: ProcessPoolExecutor | None) -> list[int | None]:
    """Kill the processes of an executor and wait for their end; returns their exit codes."""
    if executor is None:
        return []
    processes, results = list(executor._processes.values()), executor._result_queue
    manager = cast(threading.Thread | None, executor._executor_manager_thread)
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    # The manager thread may be reading a result; with its writer killed, only the end of the pipe ends that.
    results._writer.close()  # type: ignore[attr-defined]
    if manager is not None:
        manager.join()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
