"""One request on the workers: placed by the router, run, and placed again while the client has heard nothing."""

from __future__ import annotations

import asyncio
import time

from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.frontend.requests import LiveRequest
from dynamo_box.frontend.routing import Lease, RouterClient, RouterGone
from dynamo_box.frontend.sleepers import Sleepers
from dynamo_box.frontend.workers import WorkerConnection, WorkerLost, Workers, WorkerSequence
from dynamo_box.log import get_logger
from dynamo_box.metrics import FrontendMetrics
from dynamo_box.protocol.request import Delta, Generate
from dynamo_box.protocol.route import Place, Unplaced

MAX_PLACEMENTS = 4
"""The first and three more, each time without the workers that were lost."""

CONNECTION_WAIT_S = 2.0
"""The router may learn of a worker a moment before this process has connected to it."""

ASK_AGAIN_S = 0.1
FIRST_ASK_AGAIN_S = 0.005
"""A router that has no worker for a model looks for one at once and needs a moment to connect."""

WENT_TO_SLEEP = ("worker is going to sleep", "worker is asleep")
"""So a worker refuses what was placed on it just before."""

CANCELLED = "cancelled:"
"""So begins the error of what a person ended; nobody tries it again."""

SHORTEST_ANSWER_WAIT_S = 1.0
"""Asked at the very deadline, a router that lives still gets to say why it has no place."""

ROUTER_SILENT = "the router doesn't answer; see `dynbox ps`"

log = get_logger()


class FellAsleep(WorkerLost):
    """The model went to sleep before this request had its turn."""


class Execution:
    """The tokens of one request, whichever worker they come from. `close` it in every ending: that cancels the
    sequence, unless it has finished, and releases the lease.
    """

    def __init__(
        self,
        task: Task,
        prompt: Prompt,
        live: LiveRequest,
        *,
        router: RouterClient,
        workers: Workers,
        sleepers: Sleepers,
        metrics: FrontendMetrics,
        discovery_timeout_s: float,
    ) -> None:
        self._task = task
        self._prompt = prompt
        self._live = live
        self._router = router
        self._workers = workers
        self._sleepers = sleepers
        self._metrics = metrics
        self._discovery_timeout_s = discovery_timeout_s
        self._lease: Lease | None = None
        self._sequence: WorkerSequence | None = None
        self._lost: list[str] = []

    async def next(self) -> Delta:
        """What the next step added. The one with a finish reason is the last.

        Raises:
            ApiError: the request has failed.
        """
        while True:
            try:
                if self._sequence is None:
                    self._sequence = await self._start()
                delta = await self._sequence.next()
                if delta.finish == "error":
                    self._judge(delta)
            except WorkerLost as error:
                if not await self._slept(error):
                    self._give_up_on_worker(error)
                continue
            self._note(delta)
            return delta

    def close(self) -> None:
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    async def _slept(self, error: WorkerLost) -> bool:
        """Was the worker lost to sleep, with nothing said yet? Then the request has waited until it is awake."""
        stats = self._live.stats
        if stats.first_token is not None:
            return False
        fell_asleep = isinstance(error, FellAsleep) and await self._sleepers.wait_for_sleep(stats.model)
        if not fell_asleep and not self._sleepers.is_sleeping(stats.model):
            return False
        log.info("model fell asleep", request_id=stats.request_id, worker=stats.worker, reason=str(error))
        self.close()
        stats.unplaced()
        await self._sleepers.wait_until_awake(self._live)
        self._lost.clear()
        return True

    async def _start(self) -> WorkerSequence:
        stats = self._live.stats
        stats.phase = "routing"
        lease = self._lease = await self._place()
        stats.placed(lease.worker)
        connection = await self._connection(lease.worker)
        self._live.worker_last_step = lambda: connection.last_step
        self._live.last_step = time.monotonic()
        return connection.start(
            Generate(
                id=0,
                request_id=stats.request_id,
                tokens=self._prompt.tokens,
                sampling=self._prompt.sampling,
                isolation=self._prompt.isolation,
                priority=self._task.priority or 0,
                annotations=self._task.annotations,
                kv_priority=self._task.priority,
                kv_priorities=self._task.kv_priorities,
            )
        )

    def _note(self, delta: Delta) -> None:
        live = self._live
        now = live.last_step = time.monotonic()
        if not delta.tokens:
            return
        stats = live.stats
        if stats.first_token is None:
            assert self._lease is not None
            self._lease.prefill_done()
            stats.cached_tokens = delta.cached_tokens
        stats.token(len(delta.tokens), now)

    def _judge(self, delta: Delta) -> None:
        """A sequence has failed: was it the request's fault, and may another worker do better?"""
        stats = self._live.stats
        if delta.rejected:
            raise errors.invalid_request(delta.error)
        if delta.error.startswith(CANCELLED):
            raise errors.put_to_sleep(delta.error)
        if delta.error.startswith(WENT_TO_SLEEP):
            raise FellAsleep(delta.error)
        if stats.first_token is None:
            raise WorkerLost(delta.error)
        raise errors.worker_failed(stats.worker or "", delta.error)

    def _give_up_on_worker(self, error: WorkerLost) -> None:
        stats = self._live.stats
        worker = stats.worker or ""
        log.warning(
            "worker lost", request_id=stats.request_id, worker=worker, tokens=stats.output_tokens, reason=str(error)
        )
        self.close()
        self._lost.append(worker)
        if stats.first_token is not None or self._task.pin or len(self._lost) >= MAX_PLACEMENTS:
            raise errors.worker_lost(worker, str(error)) from error
        self._metrics.migrations.labels(self._task.model).inc()

    async def _connection(self, worker: str) -> WorkerConnection:
        deadline = time.monotonic() + CONNECTION_WAIT_S
        while (connection := self._workers.connection(worker)) is None:
            left_s = deadline - time.monotonic()
            self._require_awake()
            if left_s <= 0:
                raise WorkerLost("it can't be reached")
            await self._workers.wait_for_change(left_s)
        return connection

    async def _place(self) -> Lease:
        place = Place(
            id=0,
            request_id=self._live.stats.request_id,
            model=self._task.model,
            hashes=self._prompt.hashes,
            prompt_tokens=self._prompt.count,
            pin=self._task.pin,
            exclude=tuple(self._lost),
        )
        began = time.monotonic()
        deadline = began + self._discovery_timeout_s
        pause_s = FIRST_ASK_AGAIN_S
        while True:
            self._require_awake()
            left_s = deadline - time.monotonic()
            try:
                async with asyncio.timeout(max(left_s, SHORTEST_ANSWER_WAIT_S)):
                    reply = await self._router.place(place)
            except TimeoutError as error:
                raise errors.unavailable(ROUTER_SILENT) from error
            except RouterGone as error:
                if left_s <= 0:
                    raise errors.unavailable(ROUTER_SILENT) from error
                await self._router.wait_until_connected(left_s)
                continue
            if isinstance(reply, Lease):
                self._metrics.note_placement(
                    self._task.model,
                    reply.placed,
                    prompt_blocks=len(self._prompt.hashes),
                    hashing_ms=self._prompt.hashing_ms,
                    round_trip_ms=(time.monotonic() - began) * 1000,
                )
                return reply
            if left_s <= 0 or not self._may_come(reply):
                raise _refusal(reply, self._task)
            await self._workers.wait_for_change(min(left_s, pause_s))
            pause_s = min(2 * pause_s, ASK_AGAIN_S)

    def _require_awake(self) -> None:
        """
        Raises:
            FellAsleep: there is no use in waiting for a worker.
        """
        if self._sleepers.is_sleeping(self._task.model):
            raise FellAsleep("the model went to sleep")

    def _may_come(self, reply: Unplaced) -> bool:
        """May the router find what it lacks now? The worker that is asked for, if it is announced, in a moment."""
        if reply.code == "pinned_worker_gone":
            return self._task.pin in self._workers.names
        return reply.code == "no_workers"


def _refusal(reply: Unplaced, task: Task) -> ApiError:
    match reply.code:
        case "unknown_model":
            return errors.unavailable(f"the router does not know {task.model}: {reply.reason}")
        case "bad_request":
            return errors.invalid_request(reply.reason)
        case "pinned_worker_gone":
            return errors.invalid_request(reply.reason, "nvext.backend_instance_id")
        case "no_workers":
            return errors.unavailable(reply.reason)
