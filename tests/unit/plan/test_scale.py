"""More workers beside those that were planned, and what is planned with them."""

# ruff: noqa: E501 (a profile, or an expected text, is one line)

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Hardware
from dynamo_box.plan.cores import crowding
from dynamo_box.plan.make import make_plan
from dynamo_box.plan.render import planned_bytes
from dynamo_box.plan.scale import as_of_now, grow
from dynamo_box.plan.types import Plan, ProcessPlan
from dynamo_box.profile.load import load_profile, load_text
from dynamo_box.protocol.spec import WorkerSpec

GIB = 1 << 30
WEIGHTS = 538_060_032


def plan_of(text_or_name: str, gib: float = 8) -> Plan:
    profile = load_text(text_or_name, "test", {}) if ":" in text_or_name else load_profile(text_or_name, {})
    cpu = CpuDevice("test", (0, 1), memory_total=int(gib * GIB), memory_available=int(gib * GIB))
    return make_plan(profile, Hardware(cpu=cpu), {}, run_dir="/run/box")


def workers(processes: Sequence[ProcessPlan]) -> list[ProcessPlan]:
    return [process for process in processes if process.kind == "worker"]


def without(plan: Plan, *names: str) -> list[ProcessPlan]:
    return [process for process in plan.processes if process.name not in names]


def test_a_clone_differs_in_its_name_and_in_whose_the_weights_are() -> None:
    plan = plan_of("smollm2-disagg")
    decode = next(process for process in plan.processes if process.name == "smollm2.decode.0")
    (clone,) = grow(plan, plan.processes, "smollm2", "decode", 1)
    assert isinstance(clone.spec, WorkerSpec) and isinstance(decode.spec, WorkerSpec)
    assert clone.spec == msgspec.structs.replace(decode.spec, name="smollm2.decode.1")
    assert (clone.name, clone.role, clone.cores) == ("smollm2.decode.1", "decode", decode.cores)
    assert sum(item.bytes for item in clone.memory) == sum(item.bytes for item in decode.memory)
    assert clone.memory[0].arithmetic == "the layout of its model: counted there"


def test_two_more_and_a_role_that_nobody_has() -> None:
    plan = plan_of("smollm2-disagg", gib=16)
    assert [one.name for one in grow(plan, plan.processes, "smollm2", "prefill", 2)] == [
        "smollm2.prefill.1",
        "smollm2.prefill.2",
    ]
    (both,) = grow(plan, plan.processes, "smollm2", "aggregated", 1)
    assert (both.name, both.role, both.kind) == ("smollm2.aggregated.0", "aggregated", "worker")
    assert isinstance(both.spec, WorkerSpec) and both.spec.role == "aggregated"


def test_a_clone_has_the_cores_of_one_that_is_gone_and_else_shares_some_and_says_so() -> None:
    plan = plan_of("smollm2-disagg", gib=16)
    cores = {process.name: process.cores for process in workers(plan.processes)}
    assert cores == {"smollm2.prefill.0": (0,), "smollm2.decode.0": (1,)}
    assert crowding(plan, plan.processes, ()) == ""
    left = without(plan, "smollm2.prefill.0")
    (instead,) = grow(plan, left, "smollm2", "decode", 1)
    assert (instead.name, instead.cores, instead.threads) == ("smollm2.decode.1", (0,), 1)
    assert crowding(plan, [*left, instead], ()) == ""
    more = grow(plan, plan.processes, "smollm2", "decode", 3)
    assert [one.cores for one in more] == [(1,), (0,), (1,)], "those of its role first, and none on more than others"
    said = "3 workers share 2 cores: they will slow each other down"
    assert crowding(plan, [*plan.processes, more[0]], ()) == said
    assert crowding(plan, [*plan.processes, more[0]], ("smollm2",)) == "", "who sleeps computes nothing"

    alone = plan_of("model: {name: smollm2}")
    (second,) = grow(alone, alone.processes, "smollm2", "aggregated", 1)
    assert (second.cores, second.threads) == ((), 2)
    assert crowding(alone, [*alone.processes, second], ()) == said.replace("3", "2", 1)
    assert crowding(alone, alone.processes, ()) == ""


def test_the_mock_engine_needs_no_cores() -> None:
    plan = plan_of("model: {name: smollm2, engine: mock, workers: 3}")
    assert crowding(plan, plan.processes, ()) == ""


def test_names_that_are_free_again_are_taken_first() -> None:
    plan = plan_of("model: {name: smollm2, engine: mock, workers: 3}")
    present = without(plan, "smollm2.aggregated.1")
    assert [one.name for one in grow(plan, present, "smollm2", "aggregated", 2)] == [
        "smollm2.aggregated.1",
        "smollm2.aggregated.3",
    ]


def test_shared_weights_stay_when_the_worker_goes_that_they_were_counted_with() -> None:
    plan = plan_of("smollm2-disagg")
    left = without(plan, "smollm2.prefill.0")
    (again,) = grow(plan, left, "smollm2", "prefill", 1)
    assert again.name == "smollm2.prefill.0"
    for present in (left, without(plan, "smollm2.prefill.0", "smollm2.decode.0"), list(plan.processes)):
        items = [item for process in as_of_now(plan, present).processes for item in process.memory]
        assert sum(item.bytes for item in items if item.purpose == "weights") == WEIGHTS
    assert planned_bytes(as_of_now(plan, plan.processes), "cpu") == planned_bytes(plan, "cpu")


def test_what_has_no_room_is_refused_with_how_much_is_missing() -> None:
    plan = plan_of("model: {name: smollm2, kv_memory: 1GiB, workers: 2}\nmemory: {cpu: 4GiB}")
    (third,) = grow(plan, plan.processes, "smollm2", "aggregated", 1)
    with pytest.raises(PlanRefused) as caught:
        grow(plan, [*plan.processes, third], "smollm2", "aggregated", 1)
    assert caught.value.what == "there is no room for 1 more aggregated worker of smollm2"
    kv = next(item.bytes for item in third.memory if item.purpose == "KV")
    overhead = next(item.bytes for item in third.memory if item.purpose == "overhead" and item.device == "cpu")
    missing = WEIGHTS + 4 * (kv + overhead) - 4 * GIB
    assert caught.value.details == (
        f"cpu: smollm2.aggregated.3 needs 1.08 GiB, 260 MiB of 4.00 GiB are free: {missing / (1 << 20):.0f} MiB missing",
    )
    with pytest.raises(PlanRefused, match="there is no room for 2 more aggregated workers"):
        grow(plan, plan.processes, "smollm2", "aggregated", 2)


def test_devices_with_fewer_workers_come_first() -> None:
    text = """
model:
  {name: smollm2, engine: mock, kv_memory: 3GiB, workers: {prefill: {replicas: 1, devices: [0]}, decode: {replicas: 2, devices: [1, 2]}}}
simulate: {devices: [{count: 3, memory: 8GiB}]}
"""
    plan = plan_of(text)
    present = without(plan, "smollm2.decode.1")
    devices = [one.device for one in grow(plan, present, "smollm2", "prefill", 4)]
    assert devices == ["SIM-02", "SIM-00", "SIM-01", "SIM-02"]
    with pytest.raises(PlanRefused, match="no room for 5 more"):
        grow(plan, present, "smollm2", "prefill", 5)


def test_models_that_sleep_are_in_nobodys_way() -> None:
    text = """
models:
  - {name: a, source: smollm2, kv_memory: 1GiB}
  - {name: b, source: smollm2, kv_memory: 1GiB, options: {dtype: bfloat16}}
memory: {cpu: 3500MiB}
"""
    plan = plan_of(text)
    with pytest.raises(PlanRefused):
        grow(plan, plan.processes, "a", "aggregated", 1)
    grow(plan, plan.processes, "a", "aggregated", 1, {"b": "host"})
    kept = grow(plan, plan.processes, "a", "aggregated", 1, {"b": "device"})
    assert kept[0].name == "a.aggregated.1"
