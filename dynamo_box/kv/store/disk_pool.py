"""Threads for what may block, which an event loop gives work and hears back from.

They are daemons: one that a disk doesn't let go can't hold up the end of the process (`ThreadPoolExecutor` would wait
for it). A job says when it gets somewhere; so the loop sees for how long one has been silent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Job:
    """`alive` is called by the work between its steps, and `stopping` says that it should end after this one."""

    __slots__ = ("beat", "failed", "stopping", "then", "work")

    def __init__(
        self, work: Callable[[Job], Any], then: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        self.work = work
        self.then = then
        self.failed = failed
        self.stopping = False
        self.beat = 0.0
        """By the monotonic clock; 0.0 until it is begun."""

    def alive(self) -> None:
        self.beat = time.monotonic()


class Pool:
    """`submit`, `busy` and the rest are for the thread of the loop. After each job `finished` is called there."""

    def __init__(self, name: str, threads: int, finished: Callable[[], None]) -> None:
        self._name = name
        self._threads = threads
        self._finished = finished
        self._waiting: deque[Job] = deque()
        self._given = threading.Condition()
        self._jobs: set[Job] = set()
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in range(self._threads):
            threading.Thread(target=self._run, args=(self._loop,), name=f"{self._name}-{number}", daemon=True).start()

    def submit(self, work: Callable[[Job], T], then: Callable[[T], None], failed: Callable[[Exception], None]) -> Job:
        """`work` in a thread, as soon as one is free, in order; then either of the others on the loop."""
        job = Job(work, then, failed)
        self._jobs.add(job)
        with self._given:
            self._waiting.append(job)
            self._given.notify()
        return job

    @property
    def busy(self) -> int:
        """Jobs given and not heard back from."""
        return len(self._jobs)

    def silent_s(self) -> float:
        """For how long the job that has been silent longest has been so."""
        began = [job.beat for job in self._jobs if job.beat]
        return time.monotonic() - min(began) if began else 0.0

    def refuse_waiting(self, error: Exception) -> None:
        """Those that no thread is at have failed with this."""
        with self._given:
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting:
            self._jobs.discard(job)
            job.failed(error)

    def end_jobs(self) -> None:
        """Ask those underway to end early."""
        for job in self._jobs:
            job.stopping = True

    def stop(self) -> None:
        """Threads end after the job that they are at; nobody hears of it any more."""
        with self._given:
            self._stopped = True
            self._waiting.clear()
            self._given.notify_all()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._given:
                while not self._waiting and not self._stopped:
                    self._given.wait()
                if self._stopped:
                    return
                job = self._waiting.popleft()
            job.alive()
            try:
                result = job.work(job)
            except Exception as error:  # noqa: BLE001  the loop hears of it
                self._call(loop, job, job.failed, error)
            else:
                self._call(loop, job, job.then, result)
            del job

    def _call(self, loop: asyncio.AbstractEventLoop, job: Job, tell: Callable[[Any], None], outcome: object) -> None:
        try:
            loop.call_soon_threadsafe(self._finish, job, tell, outcome)
        except RuntimeError:  # the loop is closed: this came back after its end
            return

    def _finish(self, job: Job, tell: Callable[[Any], None], outcome: object) -> None:
        self._jobs.discard(job)
        if not self._stopped:
            tell(outcome)
            self._finished()
