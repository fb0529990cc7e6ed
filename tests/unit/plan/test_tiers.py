"""KV tiers in a plan: the store, its bytes, who knows of it, what refuses it, and what a dry run says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Hardware
from dynamo_box.plan.make import make_plan
from dynamo_box.plan.render import plan_text
from dynamo_box.plan.types import Plan
from dynamo_box.profile.aliases import with_aliases
from dynamo_box.profile.load import load_profile, load_text
from dynamo_box.protocol.spec import GmsSpec, KvStoreSpec, Offload, RouterSpec, WorkerSpec

GIB = 1 << 30
MIB = 1 << 20
BLOCK = 16 * 30 * 2 * 3 * 64 * 4
"""Bytes of a block of SmolLM2 in float32."""

TIERED = """
model: smollm2
memory: {tiers: {host: 1GiB, disk: 4GiB}}
"""


def planned(text: str, gib: float = 8, environ: Mapping[str, str] | None = None) -> Plan:
    size = int(gib * GIB)
    profile, variables = with_aliases(load_text(text, "test", {}), environ or {})
    cpu = CpuDevice(name="test", cores=(0, 1), memory_total=size, memory_available=size)
    return make_plan(
        profile, Hardware(cpu=cpu), {}, run_dir="/run/box", tiers_directory="/home/kv", variables=variables
    )


def refusal(text: str, gib: float = 8, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(PlanRefused) as caught:
        planned(text, gib, environ)
    return caught.value.details


def store(plan: Plan) -> KvStoreSpec | None:
    return next((process.spec for process in plan.processes if isinstance(process.spec, KvStoreSpec)), None)


def specs(plan: Plan, kind: type) -> list:
    return [process.spec for process in plan.processes if isinstance(process.spec, kind)]


def test_the_store_starts_before_those_who_use_it_and_nobody_waits_for_it() -> None:
    plan = planned(TIERED)
    assert [process.name for process in plan.processes] == [
        "gms@cpu", "kvstore", "router", "smollm2.aggregated.0", "frontend",
    ]  # fmt: skip
    process = plan.processes[1]
    assert (process.kind, process.program, process.model) == ("kvstore", ("python", "-m", "dynamo_box.kv.store"), None)
    assert process.spec == KvStoreSpec(
        name="kvstore", run_dir="/run/box", host_bytes=GIB, disk_bytes=4 * GIB, directory="/home/kv", layouts=1
    )
    assert all(one.after == () for one in plan.processes)
    (worker,), (router,) = specs(plan, WorkerSpec), specs(plan, RouterSpec)
    assert (worker.kvstore, worker.offload, router.kvstore) == ("kvstore", Offload(), "kvstore")


def test_what_the_profile_says_of_offload_and_disk_reaches_workers_and_store() -> None:
    plan = planned(
        TIERED.replace("4GiB", "4GiB, directory: /mnt/kv")
        + "kv: {disk_admission: second_hit, "
        + "offload: {min_priority: 40, continue_after_filter: true, queue_blocks: 9}}"
    )
    spec = store(plan)
    assert spec is not None and (spec.directory, spec.disk_admission) == ("/mnt/kv", "second_hit")
    (worker,) = specs(plan, WorkerSpec)
    assert worker.offload == Offload(min_priority=40, continue_after_filter=True, queue_blocks=9)


def test_its_memory_is_the_hosts_and_counted() -> None:
    without, plan = planned("model: smollm2"), planned(TIERED)
    mine = {item.purpose: item.bytes for item in plan.processes[1].memory}
    assert {item.device for item in plan.processes[1].memory} == {"host"}
    assert mine["KV tier"] == GIB
    blocks = 5 * GIB // BLOCK
    assert plan.processes[1].memory[-1].arithmetic == f"tables of {blocks:,} blocks at most × 512 B"
    (before,), (after,) = specs(without, GmsSpec), specs(plan, GmsSpec)
    shared = before.capacity_bytes - after.capacity_bytes, before.host_capacity_bytes - after.host_capacity_bytes
    assert sum(shared) == sum(item.bytes for item in plan.processes[1].memory)
    assert after.host_capacity_bytes > 538_060_032, "it is set aside first, so weights that sleep find room as before"


def test_kinds_of_blocks_share_it() -> None:
    def layouts(*models: str) -> int:
        spec = store(planned(f"models: [{', '.join(models)}]\nmemory: {{tiers: {{host: 64MiB}}}}", gib=64))
        assert spec is not None
        return spec.layouts

    small = "source: smollm2, context_length: 512"
    one = f"{{name: a, {small}, workers: 2}}"
    assert layouts(one) == 1
    assert layouts(one, f"{{name: b, {small}}}") == 1, "the same content under another name"
    assert layouts(one, f"{{name: b, {small}, options: {{dtype: bfloat16}}}}") == 2
    assert layouts(one, f"{{name: b, {small}, options: {{dtype: float32}}}}") == 1, "as it is anyway"
    assert layouts(one, f"{{name: b, {small}, block_size: 32}}") == 2
    assert layouts(one, f"{{name: m, {small}, engine: mock}}") == 1


def test_without_a_host_tier_there_is_nothing() -> None:
    plan = planned("model: smollm2")
    assert (store(plan), plan.origins) == (None, {})
    assert [spec.kvstore for spec in (*specs(plan, WorkerSpec), *specs(plan, RouterSpec))] == ["", ""]
    assert "KV tiers" not in plan_text(plan)


def test_tiers_that_no_engine_uses_are_none_and_said_to_be() -> None:
    plan = planned(TIERED.replace("smollm2", "{name: smollm2, engine: mock}"))
    assert store(plan) is None
    assert "memory.tiers.host: no tiers, since the mock engine keeps no KV there" in plan.warnings
    mixed = planned(f"models: [smollm2, {{name: m, source: smollm2, engine: mock}}]{TIERED.split('smollm2')[1]}")
    assert [(spec.engine, spec.kvstore) for spec in specs(mixed, WorkerSpec)] == [("native", "kvstore"), ("mock", "")]


def test_an_engine_without_priorities_refuses_a_threshold() -> None:
    text = "model: {name: m, source: smollm2, engine: mock}\nkv: {offload: {min_priority: 40}}"
    reason = "kv.offload.min_priority{} is 40, but requests of m (mock) have no priorities there: no block would pass; "
    assert refusal(text)[0].startswith(reason.format(""))
    by_variable = {"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "40"}
    assert refusal(text.split("\n")[0], environ=by_variable)[0].startswith(
        reason.format(" (DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY)")
    )
    assert "no effect without tiers" in planned("model: smollm2", environ=by_variable).warnings[-1]


def test_a_host_tier_below_one_block_is_refused_with_the_arithmetic() -> None:
    least = 4096 + -(-BLOCK // 4096) * 4096
    (reason,) = refusal(f"model: smollm2\nmemory: {{tiers: {{host: {least - 1}}}}}")
    assert reason == (
        "memory.tiers.host is 724 KiB, too little for a block of smollm2 (720 KiB = 16 tokens × 30 layers × 2 × "
        "3 heads × 64 × 4 B): 1 B missing"
    )
    assert store(planned(f"model: smollm2\nmemory: {{tiers: {{host: {least}}}}}")) is not None
    two = "models: [smollm2, {name: b, source: smollm2, options: {dtype: bfloat16}}]\n"
    (reason,) = refusal(f"{two}memory: {{tiers: {{host: {least}}}}}", gib=16)
    assert ", for each of 2 models and data types: 724 KiB missing" in reason


def test_a_tier_that_does_not_fit_is_named_as_the_reason() -> None:
    (reason,) = refusal("model: smollm2\nmemory: {host: 3GiB, cpu: 2GiB, tiers: {host: 1GiB}}")
    assert "+ 1.00 GiB for the host tier of KV), may use 1.00 GiB: " in reason
    with pytest.raises(PlanRefused) as caught:
        planned(TIERED, gib=2)
    assert caught.value.remedy is not None and caught.value.remedy.startswith("without KV tiers it would fit: ")
    with pytest.raises(PlanRefused) as caught:
        planned(TIERED, gib=1)
    assert caught.value.remedy is None, "nor without"


def test_a_dry_run_says_what_came_from_where() -> None:
    def line(text: str, **environ: str) -> str:
        return plan_text(planned(text, environ=environ)).splitlines()[1]

    assert line(TIERED) == (
        "KV tiers: 1.00 GiB of host memory (profile), 4.00 GiB on disk (profile) in /home/kv (default)"
    )
    assert line("model: smollm2", DYN_KVBM_CPU_CACHE_GB="1") == (
        "KV tiers: 954 MiB of host memory (DYN_KVBM_CPU_CACHE_GB), none on disk (default)"
    )
    everything = line(
        TIERED + "kv: {disk_admission: second_hit}",
        DYN_KVBM_DISK_CACHE_GB="2",
        DYN_KVBM_DISK_CACHE_DIR="/mnt/kv",
        DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY="40",
    )
    assert everything == (
        "KV tiers: 1.00 GiB of host memory (profile), 1.86 GiB on disk (DYN_KVBM_DISK_CACHE_GB) in /mnt/kv "
        "(DYN_KVBM_DISK_CACHE_DIR), to disk at the second hit (profile), blocks of priority 40 and above "
        "(DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY)"
    )


@pytest.mark.parametrize("name", ["smollm2", "smollm2-duo", "smollm2-disagg", "two-models"])
def test_every_native_profile_has_both_tiers_on_a_machine_with_8_gib_free(name: str) -> None:
    profile = load_profile(name, {})
    cpu = CpuDevice(cores=(0, 1), memory_total=8 * GIB, memory_available=8 * GIB)
    plan = make_plan(profile, Hardware(cpu=cpu), {}, run_dir="/r", tiers_directory="/home/kv")
    spec = store(plan)
    assert spec is not None and spec.disk_bytes > spec.host_bytes >= GIB // 2
    assert spec.layouts == len(profile.served)
    assert all(worker.kvstore for worker in specs(plan, WorkerSpec))
