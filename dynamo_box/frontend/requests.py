"""One request's life between admission and release: placed, run on a worker, tried elsewhere while nothing was said.

Whatever ends it (its last token, an error, a client that left, a lost worker), the sequence is closed on its worker and
the lease released at the router: both hang on the `finally` of `deltas`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend import errors
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.frontend.routing import Lease, RouterClient, RouterGone
from dynamo_box.frontend.stats import RequestStats, Stats
from dynamo_box.frontend.workers import Mailbox, WorkerLost, Workers
from dynamo_box.log import get_logger
from dynamo_box.protocol.request import Delta, Generate
from dynamo_box.protocol.route import Place, Unplaced

MAX_PLACEMENTS = 3
"""A request that has said nothing yet is placed again when its worker is lost, this often in all."""

CONNECTION_WAIT_S = 2.0
"""The router may learn of a worker a moment before this process has connected to it."""

STALL_LIMIT_S = 120.0
STALL_CHECK_S = 1.0

log = get_logger()


class Requests:
    """All live requests of this frontend."""

    def __init__(self, router: RouterClient, workers: Workers, stats: Stats, discovery_timeout_s: float) -> None:
        self.stats = stats
        self._router = router
        self._workers = workers
        self._discovery_timeout_s = discovery_timeout_s
        self._live: dict[str, Mailbox] = {}

    @property
    def active(self) -> int:
        return len(self._live)

    def open(self, request_id: str) -> Mailbox:
        """The mailbox through which a request can be interrupted from its first moment on."""
        mailbox = self._live[request_id] = Mailbox()
        return mailbox

    def close(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def interrupt(self, request_id: str, reason: Exception) -> bool:
        """End a live request with `reason`; False if there is none of this id."""
        mailbox = self._live.get(request_id)
        if mailbox is None:
            return False
        mailbox.interrupt(reason)
        return True

    def interrupt_all(self, reason: Exception) -> None:
        for mailbox in self._live.values():
            mailbox.interrupt(reason)

    async def watch_for_stalls(self, limit_s: float = STALL_LIMIT_S) -> None:
        """End requests that have made no progress for `limit_s`; runs until cancelled."""
        while True:
            await asyncio.sleep(STALL_CHECK_S)
            oldest = time.monotonic() - limit_s
            for request_id, mailbox in self._live.items():
                if mailbox.last_progress < oldest:
                    request = self.stats.live.get(request_id)
                    mailbox.interrupt(errors.stalled(request.worker if request else None, limit_s))

    async def wait_for_instance(self, model: str) -> Instance:
        """Any worker of the model, waiting for one for a bounded time.

        Raises:
            ApiError: none came (503).
        """
        deadline = time.monotonic() + self._discovery_timeout_s
        while (instance := self._workers.instance_of(model)) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise errors.unavailable(f"no worker serves {model} now; see `dynbox ps`")
            await self._workers.wait_for_change(left_s)
        return instance

    async def deltas(
        self, task: Task, prompt: Prompt, request: RequestStats, mailbox: Mailbox
    ) -> AsyncGenerator[Delta, None]:
        """What the worker produces, up to and including the delta with a finish reason.

        Raises:
            ApiError: the request failed, or was interrupted.
        """
        lost: list[str] = []
        while True:
            request.phase = "routing"
            lease = await self._place(task, prompt, request.request_id, tuple(lost))
            request.worker = lease.worker
            request.phase = "prefill"
            try:
                async for delta in self._run(task, prompt, request, lease, mailbox):
                    yield delta
                    if delta.finish is not None:
                        return
            except WorkerLost as error:
                lost.append(lease.worker)
                log.warning(
                    "worker lost",
                    request_id=request.request_id,
                    worker=lease.worker,
                    tokens=request.output_tokens,
                )
                if request.output_tokens or len(lost) >= MAX_PLACEMENTS or task.pin:
                    raise errors.worker_lost(lease.worker, str(error)) from error
                mailbox.retry()
            finally:
                lease.release()

    async def _run(
        self, task: Task, prompt: Prompt, request: RequestStats, lease: Lease, mailbox: Mailbox
    ) -> AsyncGenerator[Delta, None]:
        connection = self._workers.connection(lease.worker)
        deadline = time.monotonic() + CONNECTION_WAIT_S
        while connection is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WorkerLost("it can't be reached")
            await self._workers.wait_for_change(left_s)
            connection = self._workers.connection(lease.worker)
        number = connection.next_number()
        generate = Generate(
            id=number,
            request_id=request.request_id,
            tokens=prompt.tokens,
            sampling=prompt.sampling,
            isolation=prompt.isolation,
            priority=task.priority,
            annotations=task.annotations,
        )
        sequence = connection.start(mailbox, generate)
        try:
            while True:
                delta = await mailbox.get()
                if delta.finish == "error":
                    raise _failure(delta, lease.worker, request)
                if delta.tokens:
                    if not lease.prefilled:
                        lease.prefill_done()
                        request.cached_tokens = delta.cached_tokens
                    request.token(len(delta.tokens))
                yield delta
        finally:
            sequence.close()

    async def _place(self, task: Task, prompt: Prompt, request_id: str, lost: tuple[str, ...]) -> Lease:
        place = Place(
            id=0,
            request_id=request_id,
            model=task.model,
            hashes=prompt.hashes,
            prompt_tokens=prompt.count,
            pin=task.pin,
            exclude=lost,
        )
        deadline = time.monotonic() + self._discovery_timeout_s
        while True:
            try:
                reply = await self._router.place(place)
            except RouterGone as error:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise errors.unavailable("the router doesn't answer; see `dynbox ps`") from error
                try:
                    await asyncio.wait_for(self._router.connected.wait(), left_s)
                except TimeoutError:
                    continue
                continue
            if not isinstance(reply, Unplaced):
                self._note_overhead(reply)
                return reply
            left_s = deadline - time.monotonic()
            if reply.code != "no_workers" or left_s <= 0:
                raise _unplaced(reply, task)
            await self._workers.wait_for_change(min(left_s, 0.1))

    def _note_overhead(self, lease: Lease) -> None:
        metrics, placed = self.stats.metrics, lease.placed
        metrics.routing_total.observe(placed.took_us / 1000)
        metrics.routing_match.observe(placed.match_us / 1000)
        metrics.routing_schedule.observe(max(placed.took_us - placed.match_us, 0.0) / 1000)


def _failure(delta: Delta, worker: str, request: RequestStats) -> Exception:
    if delta.rejected:
        return errors.invalid_request(delta.error)
    if request.output_tokens == 0:
        return WorkerLost(delta.error)
    return errors.worker_failed(worker, delta.error)


def _unplaced(reply: Unplaced, task: Task) -> errors.ApiError:
    match reply.code:
        case "unknown_model":
            return errors.unknown_model(task.model, ())
        case "bad_request":
            return errors.invalid_request(reply.reason)
        case "pinned_worker_gone":
            return errors.invalid_request(reply.reason, "nvext.backend_instance_id")
        case "no_workers":
            return errors.unavailable(reply.reason)
