"""A placement of which the test moves the clock, and the workers that it places on."""

from __future__ import annotations

import random

from dynamo_box.discovery.instances import Instance
from dynamo_box.protocol.figures import Candidate, Decision
from dynamo_box.protocol.route import Place, Placed, Unplaced
from dynamo_box.protocol.spec import Disagg, ModelSpec
from dynamo_box.router.cost import Knobs, Mode, TierCosts
from dynamo_box.router.placement import Placement
from dynamo_box.router.pool import Pool

BLOCK = 16
SPEC = ModelSpec("smollm2", "/models/smollm2", "f00", context_length=8192, block_size=BLOCK)
OTHER = ModelSpec("other", "/models/other", "0ff", context_length=1024, block_size=32)
FRONTEND = 1
STORE = "kvstore"


def instance(number: int, model: ModelSpec = SPEC, role: str = "aggregated", pid: int = 1) -> Instance:
    return Instance(
        name=f"{model.name}.{role}.{number}",
        model=model.name,
        role=role,
        engine="mock",
        socket=f"/run/{number}.sock",
        pid=pid,
        start_time=1,
        fingerprint=model.fingerprint,
        block_size=model.block_size,
        kv_blocks_total=1000,
        kv_dtype="float32",
        context_length=model.context_length,
    )


A, B = instance(0), instance(1)


class Rig:
    """A placement with a clock that the test moves."""

    def __init__(
        self,
        *instances: Instance,
        mode: Mode = "kv",
        knobs: Knobs | None = None,
        disagg: Disagg | None = None,
    ) -> None:
        self.now = 0.0
        self.placement = Placement(
            (SPEC, OTHER),
            mode=mode,
            knobs=knobs or Knobs(),
            lease_ttl_s=300.0,
            rng=random.Random(0),
            clock=lambda: self.now,
            tier_costs=TierCosts(host=0.25, disk=0.5),
            kvstore=STORE,
            disagg=disagg or Disagg(),
        )
        for each in instances or (A, B):
            self.join(each)
        self.next_id = 0

    def join(self, each: Instance) -> None:
        assert self.placement.join(each) == ""
        self.placement.pools[each.model].connect(each.name)

    def place(self, hashes: tuple[int, ...] = (), **changes: object) -> Placed | Unplaced:
        self.next_id += 1
        fields = {
            "id": self.next_id,
            "request_id": f"req-{self.next_id}",
            "model": "smollm2",
            "hashes": hashes,
            "prompt_tokens": max(len(hashes) * BLOCK, 1),
        }
        return self.placement.place(FRONTEND, Place(**{**fields, **changes}))  # type: ignore[arg-type]

    def placed(self, hashes: tuple[int, ...] = (), **changes: object) -> Placed:
        reply = self.place(hashes, **changes)
        assert isinstance(reply, Placed), reply
        return reply

    def unplaced(self, hashes: tuple[int, ...] = (), **changes: object) -> Unplaced:
        reply = self.place(hashes, **changes)
        assert isinstance(reply, Unplaced), reply
        return reply

    def keep(self, hashes: tuple[int, ...], tier: str) -> None:
        """The box's tiers hold these."""
        self.placement.tiers.index.store(STORE, hashes, tier)

    @property
    def pool(self) -> Pool:
        return self.placement.pools["smollm2"]

    @property
    def decision(self) -> Decision:
        """The last one."""
        return self.placement.figures().decisions[-1]

    def candidate(self, worker: Instance) -> Candidate:
        """The worker as it was weighed in the last decision, for what follows a prefill leg if there is one."""
        return next(candidate for candidate in self.decision.candidates if candidate.worker == worker.name)

    def prefill_candidate(self, worker: Instance) -> Candidate:
        return next(candidate for candidate in self.decision.prefill_candidates if candidate.worker == worker.name)


def prompt(seed: int, blocks: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.getrandbits(64) for _ in range(blocks))
