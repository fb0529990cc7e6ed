"""Index, load, predictions and cost put together for the models of a box. No sockets, no clock of its own.

Workers come and go twice over: `join` and `leave` follow the instance directory, `connect` and `disconnect`
the connection. Only a connected worker is placed on. A lost connection drops what is known of the worker's
cache but keeps its load: the requests that run there don't end with our connection.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.figures import Decision, RouterFigures
from dynamo_box.protocol.route import Adopt, Place, Placed, RouteReply, Unplaced
from dynamo_box.protocol.spec import ModelSpec
from dynamo_box.router.cost import DEFAULT_COSTS, Choice, Knobs, Mode, Option, TierCosts, decide
from dynamo_box.router.credit import BoxTiers, Credit, credit_each
from dynamo_box.router.decisions import DecisionLog
from dynamo_box.router.index import KvIndex
from dynamo_box.router.load import LeaseKey, Leases, WorkerLoad
from dynamo_box.router.predictions import Predictions


@dataclass(slots=True)
class Worker:
    """One life of a worker process."""

    instance: Instance
    load: WorkerLoad = field(default_factory=WorkerLoad)
    predictions: Predictions = field(default_factory=Predictions)
    connected: bool = False


class Pool:
    """One model: its workers and what they hold."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.index = KvIndex()
        self.workers: dict[str, Worker] = {}
        self.last_in_turn = ""

    def candidates(self, place: Place) -> list[Worker]:
        """Connected workers that this request may go to."""
        return [
            worker
            for name, worker in self.workers.items()
            if worker.connected
            and worker.instance.role == place.role
            and name not in place.exclude
            and place.pin in (None, name)
        ]


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
    ) -> None:
        """`kvstore` is the process that owns the tiers, "" for none."""
        self.mode: Mode = mode
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
        if instance.block_size != pool.spec.block_size:
            return (
                f"{instance.name} has blocks of {instance.block_size} tokens, "
                f"the model {instance.model} of {pool.spec.block_size}"
            )
        if instance.fingerprint != pool.spec.fingerprint:
            return f"{instance.name} serves other weights under the name {instance.model}"
        pool.workers[instance.name] = Worker(instance)
        return ""

    def leave(self, instance: Instance) -> None:
        """Forget a worker, its cache and its load, in a time that doesn't depend on their size."""
        pool = self.pools[instance.model]
        pool.index.forget(instance.name)
        del pool.workers[instance.name]

    def connect(self, instance: Instance) -> None:
        self.pools[instance.model].workers[instance.name].connected = True

    def disconnect(self, instance: Instance) -> None:
        pool = self.pools[instance.model]
        worker = pool.workers[instance.name]
        worker.connected = False
        worker.predictions = Predictions()
        pool.index.forget(instance.name)

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
            return _nobody(place, pool)
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
        choice = decide(
            self.mode,
            _options(place, pool, workers, credit),
            prompt_tokens=place.prompt_tokens,
            block_size=pool.spec.block_size,
            knobs=knobs,
            rng=self._rng,
            last=pool.last_in_turn,
            pinned=place.pin is not None,
            tier_costs=self._tier_costs,
        )
        self._count(key, place, pool, choice)
        winner = choice.option
        return Placed(
            id=place.id,
            worker=winner.worker,
            overlap_blocks=winner.overlap_blocks,
            reason=choice.reason,
            took_us=(time.perf_counter() - started) * 1e6,
            match_us=match_us,
            host_blocks=winner.host_blocks,
            disk_blocks=winner.disk_blocks,
        )

    def _count(self, key: LeaseKey, place: Place, pool: Pool, choice: Choice) -> None:
        """Enter a decision everywhere: as load, as a prediction, in the record.

        Load is what is computed. A block that is loaded keeps nobody's prefill waiting, so it counts as cached here,
        and in the hit rate.
        """
        now = self._clock()
        name, spared = choice.option.worker, choice.option.spared_blocks
        worker = pool.workers[name]
        private_blocks = _private_blocks(place, pool.spec)
        self.leases.add(
            key,
            worker.load,
            place.hashes,
            private_blocks=private_blocks,
            prefill_tokens=place.prompt_tokens - spared * pool.spec.block_size,
            now=now,
        )
        worker.predictions.note(place.hashes, now)
        if place.pin is None:
            pool.last_in_turn = name
        self._decisions.add(
            Decision(
                request_id=place.request_id,
                model=place.model,
                at=time.time(),
                mode=self.mode,
                winner=name,
                reason=choice.reason,
                prompt_blocks=len(place.hashes) + private_blocks,
                candidates=choice.candidates,
            ),
            spared,
        )

    def adopt(self, connection: int, adopt: Adopt) -> str:
        """Count a request that runs already; "" or why it can't be counted.

        Its prompt counts whole as prefill unless that is done: nobody knows any more how much was cached.
        """
        pool = self.pools.get(adopt.model)
        worker = pool.workers.get(adopt.worker) if pool is not None else None
        if pool is None or worker is None:
            return f"no worker {adopt.worker} for {adopt.model}"
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
                prefill_tokens=0 if adopt.prefill_done else adopt.prompt_tokens,
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
            workers=tuple(
                sorted(
                    name for pool in self.pools.values() for name, worker in pool.workers.items() if worker.connected
                )
            ),
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
        )

    def _key_problem(self, key: LeaseKey) -> str:
        return f"id {key[1]} is in use on this connection" if key in self.leases else ""


def _options(place: Place, pool: Pool, workers: list[Worker], credit: list[Credit]) -> list[Option]:
    private_blocks = _private_blocks(place, pool.spec)
    options = []
    for worker, its in zip(workers, credit, strict=True):
        # What is awaited is being computed for a sibling. It counts in the worker's prefill already, but this
        # request doesn't add to it, nor would another worker spare it.
        awaited_tokens = its.awaited * pool.spec.block_size
        options.append(
            Option(
                worker=worker.instance.name,
                overlap_blocks=its.own,
                prefill_tokens=max(worker.load.prefill_tokens - awaited_tokens, 0),
                decode_blocks=worker.load.blocks_with(place.hashes, private_blocks),
                indexed_blocks=pool.index.blocks(worker.instance.name),
                host_blocks=its.host,
                disk_blocks=its.disk,
            )
        )
    return options


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


def _nobody(place: Place, pool: Pool) -> Unplaced:
    if place.pin is not None:
        reason = f"worker {place.pin} doesn't serve {place.model} as {place.role} now"
        return Unplaced(place.id, "pinned_worker_gone", reason)
    connected = sum(worker.connected and worker.instance.role == place.role for worker in pool.workers.values())
    reason = f"{connected} {place.role} workers serve {place.model} now"
    if connected:
        reason += ", all of them excluded by the request"
    return Unplaced(place.id, "no_workers", reason)
