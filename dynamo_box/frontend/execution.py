"""One request on the workers. It may take several of them, one after the other, and is one stream to its client.

A placement names one worker, or two: then the request begins with a prefill leg on the one, which computes the prompt,
says the first token and leaves the prompt's KV in the tiers, and goes on with a decode leg on the other, which takes
that KV over. Where that one takes nothing new any more (it drains, changes its role, falls asleep), another one takes
it over. Whatever else is lost on the way, the request goes on elsewhere in one leg: prompt and tokens so far are a
prompt like any other. Three things are not made up for: a request that is pinned to its worker, one that has lost too
many, and, under the policy `strict`, two legs of which the client has heard something: nobody may compute that prompt
again but a prefill worker.
"""

from __future__ import annotations

import time

import msgspec

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.losses import FellAsleep, Losses, NotTaken, WorkerFailed, judge, told
from dynamo_box.frontend.placing import Placing
from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.frontend.progress import Progress
from dynamo_box.frontend.requests import LiveRequest
from dynamo_box.frontend.routing import Lease
from dynamo_box.frontend.sleepers import Sleepers
from dynamo_box.frontend.workers import WorkerConnection, WorkerLost, WorkerSequence
from dynamo_box.log import get_logger
from dynamo_box.metrics import FrontendMetrics
from dynamo_box.protocol.request import Delta, Generate, Leg, Transfer
from dynamo_box.protocol.route import Place

MAX_PLACEMENTS = 4
"""The first and three more, each time without the workers that were lost. A request that breaks whoever takes it must
not break the whole box."""

log = get_logger()


class Execution:
    """The tokens of one request, whichever workers they come from. `close` it in every ending: that cancels the
    sequence, unless it has finished, and releases the lease.
    """

    def __init__(
        self,
        task: Task,
        prompt: Prompt,
        live: LiveRequest,
        *,
        placing: Placing,
        sleepers: Sleepers,
        metrics: FrontendMetrics,
        transfer_ttl_s: float,
    ) -> None:
        self._task = task
        self._prompt = prompt
        self._live = live
        self._placing = placing
        self._sleepers = sleepers
        self._metrics = metrics
        self._transfer_ttl_s = transfer_ttl_s
        self._progress = Progress(prompt)
        self._losses = Losses(placing.workers)
        self._lease: Lease | None = None
        self._leg: Leg = "whole"
        self._sequence: WorkerSequence | None = None
        self._prefilled: Delta | None = None
        """The end of the prefill leg, until the decode leg begins."""
        self._unclaimed: tuple[WorkerSequence, Transfer] | None = None
        """What the prefill leg left for the decode leg, until that has said something: it has claimed it by then."""
        self._worker = ""
        """The worker that has the leg, and which process it is, as far as it was reached."""
        self._instance: Instance | None = None
        self._two_legs = self._strict = False
        """The latest placement: names it two workers, and must the second one take over what the first one computed?"""
        self._one_leg = False
        """Only one worker may be named from now on."""
        self._setback: ApiError | None = None
        """Why it was placed again, the last time, and when, until the next token."""
        self._set_back_at: float | None = None

    async def next(self) -> Delta:
        """What the next step added. The one with a finish reason is the last.

        Raises:
            ApiError: the request has failed.
        """
        while True:
            try:
                if self._prefilled is not None or self._sequence is None:
                    if self._progress.complete:
                        return Delta(0, finish="length")  # all was said; only the word that it is all was lost
                    await self._go_on()
                delta = await self._step()
            except WorkerLost as error:
                if not await self._slept(error):
                    self._lose(error)
                continue
            if delta.tokens or delta.finish is not None:
                return delta

    def close(self) -> None:
        self._prefilled = None
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None
        if self._unclaimed is not None:
            prefill, transfer = self._unclaimed
            self._unclaimed = None
            prefill.give_up(transfer)
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    # legs

    async def _go_on(self) -> None:
        if self._prefilled is not None:
            await self._hand_over(self._prefilled)
        if self._sequence is None:
            await self._begin()

    async def _begin(self) -> None:
        """Find a place for what is left of the request, and start there."""
        lease = self._lease = await self._place()
        placed = lease.placed
        if self._unclaimed is not None:
            await self._take_over(placed.worker, self._unclaimed[1])
            return
        first = placed.prefill.worker if placed.prefill is not None else None
        self._two_legs, self._strict = first is not None, placed.policy == "strict"
        self._leg = "whole" if first is None else "prefill"
        self._live.stats.placed(placed.worker, first, policy=placed.policy)
        connection = await self._reach(placed.worker)
        if first is not None:  # whoever takes over is there, so what is begun can be handed over
            connection = await self._reach(first)
        self._start(connection, self._leg)

    async def _take_over(self, worker: str, transfer: Transfer) -> None:
        """In place of a decode worker that has not taken what was handed over, another one does."""
        self._live.stats.taken_over_by(worker)
        connection = await self._reach(worker)
        if self._strict and connection.instance.role == "prefill":
            why = self._setback.message if self._setback is not None else "its decode worker fell asleep"
            raise errors.not_handed_over(f"{why}; only workers for prefill are left")
        self._start(connection, "decode", transfer)

    async def _hand_over(self, prefilled: Delta) -> None:
        """The prompt is computed, and its first token passed on: go on with that on the other worker, if it can be."""
        assert self._lease is not None
        self._prefilled = None
        if prefilled.transfer is None:
            reason = prefilled.error or "no word of where the prompt's KV is"
            log.warning("not handed over", request_id=self._live.stats.request_id, worker=self._worker, reason=reason)
            self._elsewhere(errors.worker_failed(self._worker, reason))
            await self._begin()
            return
        self._live.stats.handing_over()
        self._start(await self._reach(self._lease.worker), "decode", prefilled.transfer)

    async def _reach(self, worker: str) -> WorkerConnection:
        self._worker, self._instance = worker, None
        connection = await self._placing.connection(self._task.model, worker)
        self._instance = connection.instance
        return connection

    def _start(self, connection: WorkerConnection, leg: Leg, transfer: Transfer | None = None) -> None:
        task, live = self._task, self._live
        self._leg = leg
        live.begin_leg(lambda: connection.last_step)
        self._sequence = connection.start(
            Generate(
                id=0,
                request_id=live.stats.request_id,
                tokens=self._progress.tokens,
                sampling=self._progress.sampling,
                isolation=self._prompt.isolation,
                priority=task.priority or 0,
                annotations=task.annotations,
                kv_priority=task.priority,
                kv_priorities=task.kv_priorities,
                leg=leg,
                transfer=transfer,
                transfer_ttl_s=self._transfer_ttl_s,
                must_transfer=leg == "decode" and self._strict,
            )
        )

    async def _step(self) -> Delta:
        """What the sequence says next, without what is not the client's business.

        Raises:
            WorkerLost: it will say no more, and another worker may.
            ApiError: it has failed for good.
        """
        assert self._sequence is not None
        delta = await self._sequence.next()
        if delta.transfer is not None:
            self._unclaimed = self._sequence, delta.transfer
        if delta.finish == "error":
            raise judge(delta, begun=self._progress.begun)
        self._note(delta)
        if delta.finish != "prefilled":
            return delta
        if self._leg != "prefill" or not self._progress.begun:
            raise WorkerFailed(f"it ended a {self._leg} leg as prefilled after {len(delta.tokens)} tokens")
        self._prefilled = delta
        return msgspec.structs.replace(delta, finish=None, transfer=None)

    def _note(self, delta: Delta) -> None:
        live = self._live
        now = live.last_step = time.monotonic()
        if not delta.tokens:
            return
        if self._leg == "decode":
            self._unclaimed = None
        live.awaits_turn = False
        stats = live.stats
        if self._set_back_at is not None:
            self._metrics.recovery.labels(stats.model).observe(now - self._set_back_at)
            self._set_back_at = None
        if not self._progress.begun:
            stats.cached_tokens = delta.cached_tokens
        assert self._lease is not None
        self._lease.prefill_done()
        self._progress.take(delta.tokens)
        stats.token(len(delta.tokens), now)

    # losses

    async def _slept(self, error: WorkerLost) -> bool:
        """Was the worker lost to sleep? Then the request has waited until the model is awake."""
        stats = self._live.stats
        fell_asleep = isinstance(error, FellAsleep) and await self._sleepers.wait_for_sleep(stats.model)
        if not fell_asleep and not self._sleepers.is_sleeping(stats.model):
            return False
        log.info("model fell asleep", request_id=stats.request_id, worker=self._worker, reason=str(error))
        self._give_up_place(str(error), kept=self._kept(error))
        stats.unplaced()
        await self._sleepers.wait_until_awake(self._live)
        self._losses.clear()
        return True

    def _lose(self, error: WorkerLost) -> None:
        """Not to this worker again.

        Raises:
            ApiError: nobody may go on.
        """
        log.warning(
            "worker lost",
            request_id=self._live.stats.request_id,
            worker=self._worker,
            leg=self._leg,
            tokens=self._live.stats.output_tokens,
            reason=str(error),
        )
        self._losses.add(self._worker, self._instance)
        loss = told(self._worker, error)
        if self._task.pin or self._losses.count >= MAX_PLACEMENTS:
            raise loss from error
        self._elsewhere(loss, kept=self._kept(error))

    def _kept(self, error: WorkerLost) -> tuple[WorkerSequence, Transfer] | None:
        """What was handed over and not taken: whoever is next may have it."""
        return self._unclaimed if isinstance(error, NotTaken) else None

    def _elsewhere(self, setback: ApiError, kept: tuple[WorkerSequence, Transfer] | None = None) -> None:
        """The placement is of no use any more: what is left of the request is placed again, in one leg. It is the
        second one, if what the first one left is `kept`.

        Raises:
            ApiError: the policy does not allow that.
        """
        two_legs = self._two_legs
        self._setback = setback
        if self._set_back_at is None:
            self._set_back_at = time.monotonic()
        self._give_up_place(setback.message, kept)
        if two_legs and not self._strict and kept is None:
            self._one_leg = True
            self._live.stats.fell_back()
        self._metrics.migrations.labels(self._task.model).inc()

    def _give_up_place(self, reason: str, kept: tuple[WorkerSequence, Transfer] | None = None) -> None:
        """
        Raises:
            ApiError: the client has heard something, and the policy does not allow to go on with that in one leg.
        """
        if kept is not None:
            self._unclaimed = None
        self.close()
        self._unclaimed = kept
        if not self._progress.begun:
            return
        if self._two_legs and self._strict and kept is None:
            raise errors.not_handed_over(reason)
        self._one_leg = True

    async def _place(self) -> Lease:
        """
        Raises:
            ApiError: there is no place.
        """
        task, progress, stats = self._task, self._progress, self._live.stats
        stats.phase = "routing"
        place = Place(
            id=0,
            request_id=stats.request_id,
            model=task.model,
            hashes=progress.hashes,
            prompt_tokens=progress.count,
            pin=task.pin,
            one_leg=self._one_leg,
        )
        began = time.monotonic()
        try:
            lease = await self._placing.place(place, self._losses.names)
        except ApiError as error:
            if self._setback is None:
                raise
            raise errors.nobody_goes_on(self._setback, error, begun=progress.begun) from error
        self._metrics.note_placement(
            task.model,
            lease.placed,
            prompt_blocks=len(place.hashes),
            hashing_ms=self._prompt.hashing_ms,
            round_trip_ms=(time.monotonic() - began) * 1000,
        )
        return lease
