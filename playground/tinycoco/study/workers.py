"""Processes for tasks of minutes: one that is killed costs its own task alone, and none outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, NamedTuple, TypeVar

Task = TypeVar("Task")
SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 10  # seconds for a process to end by itself


class Outcome(NamedTuple):
    """What a task came to: its result, or what went wrong."""

    result: Any = None
    error: str = ""


class Worker:
    """A process that answers one task after another; it ends when this process does."""

    def __init__(self, function: Callable[[Any], Any], start: Callable[[], Any]) -> None:
        self.pipe, end = SPAWN.Pipe()
        # start comes first, so that what it imports can quiet the libraries that function imports.
        self.process = SPAWN.Process(target=_serve, args=(end, start, function))
        self.process.start()
        end.close()  # so that a worker's death ends the pipe

    def outcome(self) -> Outcome:
        """Of its task, as soon as there is one."""
        try:
            outcome: Outcome = self.pipe.recv()
        except (EOFError, OSError):  # it was killed
            self.process.join()
            code = self.process.exitcode
            return Outcome(error=f"its process ended with exit code {code}{' (out of memory?)' * (code == -9)}")
        return outcome

    def end(self, at_once: bool) -> None:
        """Whatever it is doing, or when it has nothing to do."""
        if at_once:
            self.process.terminate()
        self.pipe.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


def each_outcome(
    function: Callable[[Task], Any], tasks: Iterable[Task], count: int, start: Callable[[], Any]
) -> Generator[tuple[Task, Outcome], None, None]:
    """Yield every task with its outcome, in the order in which they finish.

    Args:
        count: tasks at a time, each in a process of its own.
        start: called once in every process, before its first task.

    Whoever leaves the iteration early closes it, and the processes end at once.
    """
    waiting, idle = deque(tasks), list[Worker]()
    busy: dict[Worker, Task] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                worker = idle.pop() if idle else Worker(function, start)
                busy[worker] = waiting.popleft()
                with suppress(OSError):  # killed while idle, as its pipe will say
                    worker.pipe.send(busy[worker])
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                outcome = worker.outcome()
                task = busy.pop(worker)
                if worker.process.is_alive():
                    idle.append(worker)
                yield task, outcome
    finally:
        for worker in [*idle, *busy]:
            worker.end(at_once=worker in busy)


def _serve(pipe: Connection, start: Callable[[], Any], function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, which ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    start()
    with suppress(EOFError):  # the main process has closed the pipe
        while True:
            pipe.send(_outcome_of(function, pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _outcome_of(function: Callable[[Any], Any], task: Any) -> Outcome:
    try:
        return Outcome(function(task))
    except Exception as error:  # a task's error is its outcome, not the worker's end
        return Outcome(error="".join(traceback.format_exception_only(error)).strip())
