"""The KV tiers of a plan: whether there are any, how many layouts share them, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.plan.memory import BLOCK_ENTRY_BYTES, HOST, KVSTORE_BYTES, WorkerMemory, host_item
from dynamo_box.plan.types import ByteItem, ProcessPlan
from dynamo_box.profile.units import format_size
from dynamo_box.protocol.kv import SLOT_ALIGNMENT, arena_headers_bytes
from dynamo_box.protocol.spec import DiskAdmission, KvStoreSpec, Offload, TierRehearsal

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile
    from dynamo_box.profile.tiers import Tiers

KVSTORE = "kvstore"
KVSTORE_DEADLINE_S = 60.0
"""Without progress; reading the index of a disk tier goes on behind a store that serves."""

TIERED_ENGINES = frozenset({"native"})
"""Their workers store blocks in the tiers and load them from there, and requests carry priorities."""


def tiered_engines(profile: Profile) -> frozenset[str]:
    """As `TIERED_ENGINES`. On simulated hardware there are mock engines only, and they act as if."""
    return TIERED_ENGINES if profile.simulate is None else frozenset({"mock"})


@dataclass(frozen=True)
class TierPlan:
    """`layouts` is how many kinds of blocks share the host tier evenly, `blocks` how many there can be in both tiers.
    `origins` says where each setting is from: the name of a variable, "profile" or "default". Workers of
    `engines` use the tiers. In a `rehearsal` no memory is taken for blocks, and no disk.
    """

    tiers: Tiers
    directory: str
    layouts: int
    blocks: int
    offload: Offload
    disk_admission: DiskAdmission
    origins: Mapping[str, str]
    engines: frozenset[str]
    rehearsal: TierRehearsal | None = None

    @property
    def host_bytes(self) -> int:
        """What the host tier takes of this machine's memory, at most."""
        return self.tiers.host if self.rehearsal is None else 0


def tier_plan(
    profile: Profile, memories: Sequence[WorkerMemory], directory: str, variables: Mapping[str, str]
) -> TierPlan | None:
    """None where the profile has no tiers, or no worker could use them. `directory` is that of the disk tier unless the
    profile has one; `variables` are the settings that the environment gave.
    """
    layouts = _layouts(profile, memories)
    tiers = profile.memory.tiers
    if not tiers.host or not layouts:
        return None
    offload, simulated = profile.kv.offload, profile.simulate is not None
    return TierPlan(
        tiers=tiers,
        directory=(tiers.directory or directory) if tiers.disk and not simulated else "",
        layouts=len(layouts),
        blocks=(tiers.host + tiers.disk) // min(memory.whole_block for memory in layouts.values()),
        offload=Offload(
            min_priority=offload.min_priority,
            continue_after_filter=offload.continue_after_filter,
            queue_blocks=offload.queue_blocks,
        ),
        disk_admission=profile.kv.disk_admission,
        origins=_origins(profile, variables),
        engines=tiered_engines(profile),
        rehearsal=TierRehearsal(
            disk_read_bytes_per_s=tiers.simulated.read_bytes_per_s,
            disk_write_bytes_per_s=tiers.simulated.write_bytes_per_s,
        )
        if simulated
        else None,
    )


def tier_reasons(profile: Profile, memories: Sequence[WorkerMemory], variables: Mapping[str, str]) -> list[str]:
    """What stands against the tiers that a profile asks for."""
    reasons = []
    threshold = profile.kv.offload.min_priority
    without = [model for model in profile.served if model.engine not in tiered_engines(profile)]
    if threshold and without:
        names = ", ".join(f"{model.name} ({model.engine})" for model in without)
        reasons.append(
            f"{_named('kv.offload.min_priority', variables)} is {threshold}, but requests of {names} have no "
            "priorities there: no block would pass; take the threshold out"
        )
    layouts = _layouts(profile, memories)
    host = profile.memory.tiers.host
    if host and layouts:
        largest = max(layouts.values(), key=lambda memory: memory.whole_block)
        least = _arena_bytes(largest.whole_block) * len(layouts)
        if host < least:
            each = f", for each of {len(layouts)} models and data types" if len(layouts) > 1 else ""
            size = f"{format_size(largest.whole_block)} = {largest.whole_block_arithmetic}"
            reasons.append(
                f"{_named('memory.tiers.host', variables)} is {format_size(host)}, too little for a block of "
                f"{largest.worker.model.name} ({size}){each}: "
                f"{format_size(least - host)} missing"
            )
    return reasons


def tier_warnings(profile: Profile, memories: Sequence[WorkerMemory], variables: Mapping[str, str]) -> list[str]:
    """Settings that have no effect."""
    host = profile.memory.tiers.host
    if host and memories and not _layouts(profile, memories):
        engines = ", ".join(sorted({memory.worker.model.engine for memory in memories}))
        return [f"{_named('memory.tiers.host', variables)}: no tiers, since the {engines} engine keeps no KV there"]
    if not host and profile.kv.offload.min_priority:
        return [f"{_named('kv.offload.min_priority', variables)} has no effect without tiers: memory.tiers.host is 0"]
    return []


def without_tiers(profile: Profile) -> Profile:
    tiers = profile.memory.tiers.model_copy(update={"host": 0, "disk": 0})
    return profile.model_copy(update={"memory": profile.memory.model_copy(update={"tiers": tiers})})


def host_bytes(plan: TierPlan | None) -> tuple[ByteItem, ...]:
    """What the store takes of the host's memory."""
    if plan is None:
        return ()
    shared = f"shared by {plan.layouts} kinds of blocks" if plan.layouts > 1 else "for one kind of blocks"
    tier = ByteItem(HOST, "KV tier", plan.host_bytes, f"host tier, {shared}; pages are taken as blocks come")
    if plan.rehearsal is not None:
        tier = ByteItem(
            HOST, "KV tier", plan.host_bytes, f"host tier of {format_size(plan.tiers.host)}, modelled: none"
        )
    return (
        tier,
        host_item("overhead", KVSTORE_BYTES, "Python"),
        ByteItem(
            HOST,
            "overhead",
            plan.blocks * BLOCK_ENTRY_BYTES,
            f"tables of {plan.blocks:,} blocks at most × {BLOCK_ENTRY_BYTES} B",
        ),
    )


def kvstore_process(plan: TierPlan, run_dir: str) -> ProcessPlan:
    """Its workers and the router wait for it by themselves, and go on without it."""
    return ProcessPlan(
        name=KVSTORE,
        kind="kvstore",
        program=("python", "-m", "dynamo_box.kv.store"),
        spec=KvStoreSpec(
            name=KVSTORE,
            run_dir=run_dir,
            host_bytes=plan.tiers.host,
            disk_bytes=plan.tiers.disk,
            directory=plan.directory,
            layouts=plan.layouts,
            disk_admission=plan.disk_admission,
            rehearsal=plan.rehearsal,
        ),
        start_deadline_s=KVSTORE_DEADLINE_S,
        memory=host_bytes(plan),
    )


def _layouts(profile: Profile, memories: Sequence[WorkerMemory]) -> dict[tuple[str, str, int, int], WorkerMemory]:
    """A worker for each kind of blocks: by content of the model, data type, tokens and bytes."""
    found: dict[tuple[str, str, int, int], WorkerMemory] = {}
    for memory in memories:
        model = memory.worker.model
        if model.engine in tiered_engines(profile):
            content = memory.worker.facts.fingerprint or model.origin if profile.simulate is None else model.name
            found.setdefault((content, memory.dtype, model.block_size, memory.whole_block), memory)
    return found


def _arena_bytes(block: int) -> int:
    """For one block."""
    return arena_headers_bytes(1) + -(-block // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def _named(setting: str, variables: Mapping[str, str]) -> str:
    return f"{setting} ({variables[setting]})" if setting in variables else setting


def _origins(profile: Profile, variables: Mapping[str, str]) -> dict[str, str]:
    tiers, kv = profile.memory.tiers, profile.kv
    sections = {
        "memory.tiers.host": tiers,
        "memory.tiers.disk": tiers,
        "memory.tiers.directory": tiers,
        "kv.offload.min_priority": kv.offload,
        "kv.disk_admission": kv,
    }
    found = {}
    for setting, section in sections.items():
        given = setting.rpartition(".")[2] in section.model_fields_set
        found[setting] = variables.get(setting, "profile" if given else "default")
    return found
