"""Index, load, predictions and cost put together for the models of a box. No sockets, no clock of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.figures import Decision, RouterFigures
from dynamo_box.protocol.route import Adopt, Place, Placed, PrefillLeg, RouteReply, Unplaced
from dynamo_box.protocol.spec import Disagg, ModelSpec
from dynamo_box.router import disagg
from dynamo_box.router.cost import DEFAULT_COSTS, Knobs, Mode, Option, TierCosts
from dynamo_box.router.credit import BoxTiers, Credit, credit_each
from dynamo_box.router.decisions import DecisionLog
from dynamo_box.router.legs import Contender, Legs, Missing, Request, decide_legs
from dynamo_box.router.load import LeaseKey, Leases
from dynamo_box.router.pool import Pool, Worker

DEFAULT_DISAGG = Disagg()


class Placement:
    """`clock` gives seconds that never go back; `rng` breaks ties and draws."""

    def __init__(
        self,
        models: tuple[ModelSpec, ...],
        *,
        mode: Mode,
        knobs: Knobs,
        lease_ttl_s: float,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        tier_costs: TierCosts = DEFAULT_COSTS,
        kvstore: str = "",
        disagg: Disagg = DEFAULT_DISAGG,
    ) -> None:
        """`kvstore` is the process that owns the tiers, "" for none."""
        self.mode: Mode = mode
        self.disagg = disagg
        self.tiers = BoxTiers(kvstore)
        self.pools = {spec.name: Pool(spec) for spec in models}
        self.leases = Leases(lease_ttl_s)
        self.resyncs = 0
        self._knobs = knobs
        self._tier_costs = tier_costs
        self._rng = rng
        self._clock = clock
        self._decisions = DecisionLog()

    # workers

    def join(self, instance: Instance) -> str:
        """Know a worker; "" or why its announcement doesn't fit the model that it names."""
        pool = self.pools.get(instance.model)
        if pool is None:
            return f"{instance.name} serves {instance.model}, which is no model of this box"
        return pool.join(instance)

    # requests

    def place(self, connection: int, place: Place) -> RouteReply:
        """Choose a worker and count the request there."""
        started = time.perf_counter()
        pool = self.pools.get(place.model)
        if pool is None:
            served = ", ".join(sorted(self.pools)) or "none"
            reason = f"no model {place.model!r} in this box; there is {served}"
            return Unplaced(place.id, "unknown_model", reason)
        key = (connection, place.id)
        knobs = self._knobs.overridden(place.overlap_weight, place.temperature)
        problem = knobs.problem() or _prompt_problem(place, pool.spec) or self._key_problem(key)
        if problem:
            return Unplaced(place.id, "bad_request", problem)
        workers = pool.candidates(place)
        if not workers:
            gone = place.pin is not None
            return Unplaced(place.id, "pinned_worker_gone" if gone else "no_workers", pool.why_nobody(place))
        if self.leases.full:
            return Unplaced(place.id, "no_workers", _too_many(self.leases))

        match_started = time.perf_counter()
        now = self._clock()
        credit = credit_each(
            [worker.instance.name for worker in workers],
            [worker.predictions.match(place.hashes, now) for worker in workers],
            pool=pool.index,
            tiers=self.tiers,
            hashes=place.hashes,
        )
        match_us = (time.perf_counter() - match_started) * 1e6
        policy = self.disagg if pool.split else None
        in_force = policy.policy if policy is not None else ""
        legs = decide_legs(
            self.mode,
            _contenders(place, pool, workers, credit),
            Request(place.prompt_tokens, pool.spec.block_size, knobs, place.pin is not None, place.one_leg),
            policy,
            rng=self._rng,
            last=pool.turns,
            tier_costs=self._tier_costs,
        )
        if isinstance(legs, Missing):
            return Unplaced(place.id, "no_workers", pool.why_nobody_for(legs.leg, place), in_force)
        self._count(key, place, pool, legs, in_force)
        winner = legs.decode.option
        return Placed(
            id=place.id,
            worker=winner.worker,
            overlap_blocks=winner.overlap_blocks,
            reason=legs.decode.reason,
            took_us=(time.perf_counter() - started) * 1e6,
            match_us=match_us,
            host_blocks=winner.host_blocks,
            disk_blocks=winner.disk_blocks,
            prefill=_prefill_leg(legs),
            policy=in_force,
        )

    def _count(self, key: LeaseKey, place: Place, pool: Pool, legs: Legs, policy: str) -> None:
        """Enter a decision everywhere: as load, as a prediction, in the record.

        Load is what is computed. A block that is loaded keeps nobody's prefill waiting, so it counts as cached here,
        and in the hit rate. What is computed somewhere is predicted there alone: until it arrives at another worker,
        nobody is better off for following it.
        """
        now = self._clock()
        first, last = legs.prefill or legs.decode, legs.decode
        computing, answering = pool.workers[first.option.worker], pool.workers[last.option.worker]
        spared = first.option.spared_blocks
        private_blocks = _private_blocks(place, pool.spec)
        self.leases.add(
            key,
            answering.load,
            place.hashes,
            private_blocks=private_blocks,
            prefill_tokens=place.prompt_tokens - spared * pool.spec.block_size,
            prefill_load=computing.load,
            now=now,
        )
        computing.predictions.note(place.hashes, now)
        if place.pin is None:
            pool.note_turns(legs)
        self._decisions.add(
            Decision(
                request_id=place.request_id,
                model=place.model,
                at=time.time(),
                mode=self.mode,
                winner=last.option.worker,
                reason=last.reason,
                prompt_blocks=len(place.hashes) + private_blocks,
                candidates=last.candidates,
                policy=policy,
                policy_reason=legs.why,
                prefill=legs.prefill.option.worker if legs.prefill else "",
                prefill_reason=legs.prefill.reason if legs.prefill else "",
                prefill_candidates=legs.prefill.candidates if legs.prefill else (),
            ),
            spared,
        )

    def adopt(self, connection: int, adopt: Adopt) -> str:
        """Count a request that runs already; "" or why it can't be counted.

        Its prompt counts whole as prefill unless that is done: nobody knows any more how much was cached. Where it is
        computed by a worker that is gone, it counts nowhere: the request will be placed again.
        """
        pool = self.pools.get(adopt.model)
        worker = pool.workers.get(adopt.worker) if pool is not None else None
        if pool is None or worker is None:
            return f"no worker {adopt.worker} for {adopt.model}"
        computing = pool.workers.get(adopt.prefill or adopt.worker)
        key = (connection, adopt.id)
        problem = _prompt_problem(adopt, pool.spec) or self._key_problem(key)
        if not problem and self.leases.full:
            problem = _too_many(self.leases)
        if not problem:
            self.leases.add(
                key,
                worker.load,
                adopt.hashes,
                private_blocks=_private_blocks(adopt, pool.spec),
                prefill_tokens=0 if adopt.prefill_done or computing is None else adopt.prompt_tokens,
                prefill_load=computing.load if computing is not None else None,
                now=self._clock(),
            )
        return problem

    def renew(self, connection: int, ids: tuple[int, ...]) -> None:
        self.leases.renew(connection, ids, self._clock())

    def expire(self) -> int:
        return self.leases.expire(self._clock())

    # figures

    def figures(self) -> RouterFigures:
        return RouterFigures(
            mode=self.mode,
            workers=tuple(sorted(worker.instance.name for pool in self.pools.values() for worker in pool.serving())),
            indexed_blocks=sum(pool.index.total_blocks for pool in self.pools.values()),
            host_blocks=self.tiers.host_blocks,
            disk_blocks=self.tiers.disk_blocks,
            tiers_connected=self.tiers.connected,
            active_requests=len(self.leases),
            routed=self._decisions.routed,
            resyncs=self.resyncs,
            expired_leases=self.leases.expired,
            hit_rate=self._decisions.hit_rate,
            decisions=self._decisions.recent(),
            disagg=disagg.describe(self.disagg),
            disagg_settings=self.disagg,
        )

    def _key_problem(self, key: LeaseKey) -> str:
        return f"id {key[1]} is in use on this connection" if key in self.leases else ""


def _contenders(place: Place, pool: Pool, workers: list[Worker], credit: list[Credit]) -> list[Contender]:
    private_blocks = _private_blocks(place, pool.spec)
    contenders = []
    for worker, its in zip(workers, credit, strict=True):
        # What is awaited is being computed for a sibling. It counts in the worker's prefill already, but this
        # request doesn't add to it, nor would another worker spare it.
        awaited_tokens = its.awaited * pool.spec.block_size
        option = Option(
            worker=worker.instance.name,
            overlap_blocks=its.own,
            prefill_tokens=max(worker.load.prefill_tokens - awaited_tokens, 0),
            decode_blocks=worker.load.blocks_with(place.hashes, private_blocks),
            indexed_blocks=pool.index.blocks(worker.instance.name),
            host_blocks=its.host,
            disk_blocks=its.disk,
        )
        contenders.append(Contender(worker.instance.role, option, worker.load.blocks, worker.load.prefill_tokens))
    return contenders


def _prefill_leg(legs: Legs) -> PrefillLeg | None:
    if legs.prefill is None:
        return None
    option = legs.prefill.option
    return PrefillLeg(option.worker, option.overlap_blocks, legs.prefill.reason, option.host_blocks, option.disk_blocks)


def _prompt_problem(request: Place | Adopt, spec: ModelSpec) -> str:
    if not 0 < request.prompt_tokens <= spec.context_length:
        return f"a prompt of {request.prompt_tokens} tokens; {spec.name} takes from 1 to {spec.context_length}"
    if len(request.hashes) * spec.block_size > request.prompt_tokens:
        return (
            f"{len(request.hashes)} full blocks of {spec.block_size} tokens are more than a prompt of "
            f"{request.prompt_tokens} tokens has"
        )
    return ""


def _private_blocks(request: Place | Adopt, spec: ModelSpec) -> int:
    """Blocks of the prompt that can't be shared: the partial last one, and those that came without a hash."""
    return -(-request.prompt_tokens // spec.block_size) - len(request.hashes)


def _too_many(leases: Leases) -> str:
    return f"{len(leases)} requests are placed, which is as many as the router counts"
