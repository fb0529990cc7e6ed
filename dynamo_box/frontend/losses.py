"""What counts as the loss of a worker, and whom a request has lost."""

from __future__ import annotations

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.workers import WorkerLost, Workers
from dynamo_box.protocol.request import Delta

WENT_TO_SLEEP = ("worker is going to sleep", "worker is asleep")
"""So a worker refuses what was placed on it just before."""

TAKES_NOTHING_NEW = ("worker is changing its role", "worker is draining")
"""So a worker refuses what was placed on it before it heard that."""

CANCELLED = "cancelled:"
"""So begins the error of what a person ended; nobody tries it again."""


class NotTaken(WorkerLost):
    """The worker has not begun with it."""


class FellAsleep(NotTaken):
    """The model went to sleep before this request had its turn."""


class WorkerFailed(WorkerLost):
    """The worker is there, but has ended the sequence with an error that is not the request's fault."""


def judge(delta: Delta, *, begun: bool) -> ApiError | WorkerLost:
    """A sequence has ended with an error: was it the request's fault, or may another worker do better? What one worker
    has taken and `begun` is no bad request, whatever the next one thinks of it.
    """
    if delta.error.startswith(CANCELLED):
        return errors.put_to_sleep(delta.error)
    if delta.error.startswith(WENT_TO_SLEEP):
        return FellAsleep(delta.error)
    if delta.error.startswith(TAKES_NOTHING_NEW):
        return NotTaken(delta.error)
    if delta.rejected and not begun:
        return errors.invalid_request(delta.error)
    return WorkerFailed(delta.error)


def told(worker: str, loss: WorkerLost) -> ApiError:
    """What the client hears of a loss, if it ends the request."""
    if isinstance(loss, WorkerFailed):
        return errors.worker_failed(worker, str(loss))
    return errors.worker_lost(worker, str(loss))


class Losses:
    """The workers that a request has lost. It does not go there again, unless a new process has their name."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._lost: dict[str, Instance | None] = {}
        self.count = 0

    def add(self, worker: str, instance: Instance | None) -> None:
        """`instance` is the process that it was; None if this frontend never reached it."""
        self._lost[worker] = instance or self._workers.instance(worker)
        self.count += 1

    def clear(self) -> None:
        self._lost.clear()
        self.count = 0

    def names(self) -> tuple[str, ...]:
        """Those not to go to now. One that is announced no more is among them: the router may not know it yet."""
        return tuple(name for name, lost in self._lost.items() if self._workers.instance(name) in (None, lost))
