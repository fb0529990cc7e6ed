"""The router as a child of the supervisor: frontends on one side, workers on the other."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from dynamo_box.child_life import Life
from dynamo_box.discovery.instances import read_instances
from dynamo_box.discovery.watch import watch_instances
from dynamo_box.errors import BoxError, UsageError
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.protocol.spec import ChildSpec, RouterSpec
from dynamo_box.router import disagg
from dynamo_box.router.cost import Knobs, TierCosts, parse_mode
from dynamo_box.router.frontends import Frontends
from dynamo_box.router.placement import Placement
from dynamo_box.router.slices import Slices
from dynamo_box.router.store import StoreLink
from dynamo_box.router.workers import Workers

TICK_S = 0.25
LOOK_AGAIN_S = 0.01
"""Requests that find no worker have the instance directory read at most this often."""

log = get_logger()


class RouterService:
    """See `child_life.Service`."""

    def __init__(self, spec: RouterSpec, life: Life) -> None:
        """Raises:
        UsageError: the mode or a knob of the spec can't be used.
        """
        self._spec = spec
        self._life = life
        self._loop = asyncio.get_running_loop()
        self._run_dir = RunDir(Path(spec.run_dir))
        self._placement = _placement(spec)
        self._slices = Slices()
        self._workers = Workers(self._placement, self._slices, self._notify)
        self._store: StoreLink | None = None
        self._frontends = Frontends(self._placement, self._slices, self._on_release, self._look_again)
        self._drained = asyncio.Event()
        self._looked_at = 0.0
        self._ticker: asyncio.TimerHandle | None = None

    async def start(self) -> dict[str, str]:
        """Listen, and follow the instance directory from now on.

        The directory is read before anyone may connect, so that a frontend that announces running requests
        finds their workers known.

        Raises:
            OSError: the socket can't be opened.
        """
        self._life.send(status.Starting("instances"))
        self._workers.update(read_instances(self._run_dir.instances))
        if self._spec.kvstore:
            self._store = StoreLink(self._run_dir, self._placement, self._slices, self._notify)
        self._life.send(status.Starting("listen"))
        await self._frontends.listen(self._run_dir.router_socket)
        models = ", ".join(self._placement.pools)
        policy = disagg.describe(self._placement.disagg)
        log.info("ready", mode=self._placement.mode, disagg=policy, models=models)
        self._tick()
        self._life.keep(self._follow_instances())
        return {"mode": self._placement.mode, "disagg": policy, "models": models}

    async def _follow_instances(self) -> None:
        async for instances in watch_instances(self._run_dir.instances):
            self._workers.update(instances)

    def figures(self) -> RouterFigures:
        return self._placement.figures()

    async def command(self, message: status.ParentMessage) -> None:
        match message:
            case status.Set():
                self._life.send(self._set(message))
            case status.CancelRequest():
                self._life.send(status.Answer(message.id, error="the router runs no requests; the frontend does"))
            case _:
                log.warning("a message that is for another kind of process", message=type(message).__name__)

    async def drain(self, deadline_s: float, life: Life) -> None:
        """Place nothing more; return when nothing that was placed runs."""
        self._frontends.draining = True
        self._on_release()
        await self._drained.wait()

    def _set(self, message: status.Set) -> status.Answer:
        try:
            return status.Answer(message.id, text=self._set_option(message.key, message.value))
        except ValueError as error:
            return status.Answer(message.id, error=str(error))

    def _set_option(self, key: str, value: str) -> str:
        """Change a setting, for what is placed from now on, and say what is in force.

        Raises:
            ValueError: no such key or value.
        """
        if key == "mode":
            self._placement.mode = parse_mode(value)
            now = value
        elif key == "disagg":
            before, after = self._placement.disagg, disagg.parse(value, self._placement.disagg)
            self._placement.disagg = after
            if after.policy != before.policy:
                self._frontends.tell_policy()
            now = disagg.describe(after)
        else:
            raise ValueError(f"the router has no setting {key!r}; there are mode and disagg")
        log.info("setting changed", key=key, value=now)
        return f"{key} {now}"

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self._frontends.close()
        self._workers.close()
        if self._store is not None:
            self._store.close()

    def _tick(self) -> None:
        """Four times a second: expire leases, and have figures looked at."""
        self._ticker = self._loop.call_later(TICK_S, self._tick)
        expired = self._placement.expire()
        if expired:
            log.warning("leases expired", leases=expired)
            self._slices.add(self._placement.leases.settle_one)
            self._on_release()
        self._life.changed()

    def _look_again(self) -> None:
        """A worker may have come a moment ago, as when its model has woken; the watch needs some 20 ms to notice."""
        now = self._loop.time()
        if now >= self._looked_at + LOOK_AGAIN_S:
            self._looked_at = now
            self._workers.update(read_instances(self._run_dir.instances))

    def _on_release(self) -> None:
        if self._frontends.draining:
            in_flight = len(self._placement.leases)
            self._life.draining(in_flight)
            if in_flight == 0:
                self._drained.set()

    def _notify(self, level: str, text: str) -> None:
        write: Any = getattr(log, level)
        write(text)
        self._life.note(level, text)


def _placement(spec: RouterSpec) -> Placement:
    knobs = Knobs(spec.overlap_weight, spec.temperature)
    tier_costs = TierCosts(spec.host_block_cost, spec.disk_block_cost)
    problem = knobs.problem() or tier_costs.problem() or disagg.problem(spec.disagg)
    try:
        mode = parse_mode(spec.mode)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UsageError(f"the router's settings can't be used: {problem}", remedy="correct the profile")
    rng = random.Random(spec.seed)  # noqa: S311 - it breaks ties between workers
    return Placement(
        spec.models,
        mode=mode,
        knobs=knobs,
        lease_ttl_s=spec.lease_ttl_s,
        rng=rng,
        tier_costs=tier_costs,
        kvstore=spec.kvstore,
        disagg=spec.disagg,
    )


def make(spec: ChildSpec, life: Life) -> RouterService:
    if not isinstance(spec, RouterSpec):
        raise BoxError(f"a router was handed the spec of {spec.name}, which is no router")
    return RouterService(spec, life)
