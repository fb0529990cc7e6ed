"""What a plan holds: processes, devices, cores and bytes, for any hardware one can think up."""

# ruff: noqa: E501 (an expected text is one line)

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Gpu, Hardware
from dynamo_box.plan.awake import Standing, make_room, needs_of
from dynamo_box.plan.cores import share_among, share_cores
from dynamo_box.plan.make import make_plan
from dynamo_box.plan.render import plan_json, plan_text, planned_bytes
from dynamo_box.plan.tiers import without_tiers
from dynamo_box.plan.types import Following, ModelPolicy, Plan
from dynamo_box.profile.catalogue import CATALOGUE
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.load import load_profile, load_text
from dynamo_box.profile.schema import Profile
from dynamo_box.protocol.spec import Disagg, FrontendSpec, GmsSpec, RouterSpec, WorkerSpec
from dynamo_box.snapshot import Targets

GIB = 1 << 30
MIB = 1 << 20


def cpu(cores: int = 2, gib: float = 8) -> CpuDevice:
    size = int(gib * GIB)
    return CpuDevice(name="test", cores=tuple(range(cores)), memory_total=size, memory_available=size)


def plan_of(text_or_name: str, hardware: Hardware | None = None, **facts: ModelFacts) -> Plan:
    profile = load_text(text_or_name, "test", {}) if ":" in text_or_name else load_profile(text_or_name, {})
    return make_plan(
        profile, hardware or Hardware(cpu=cpu()), facts, run_dir="/run/box", snapshots="/cache/snapshots/box"
    )


def refusal(text_or_name: str, hardware: Hardware | None = None) -> tuple[str, ...]:
    with pytest.raises(PlanRefused) as caught:
        plan_of(text_or_name, hardware)
    return caught.value.details


def workers(plan: Plan) -> list[WorkerSpec]:
    return [process.spec for process in plan.processes if isinstance(process.spec, WorkerSpec)]


def test_smollm2() -> None:
    plan = plan_of("smollm2")
    assert [process.name for process in plan.processes] == [
        "gms@cpu", "kvstore", "router", "smollm2.aggregated.0", "frontend",
    ]  # fmt: skip
    gms, _, router, worker, frontend = plan.processes
    assert (gms.kind, gms.program, gms.device, gms.model) == ("gms", ("python", "-m", "dynamo_box.gms"), "cpu", None)
    device, host = plan.devices
    assert gms.spec == GmsSpec(
        name="gms@cpu",
        run_dir="/run/box",
        device="cpu",
        capacity_bytes=device.capacity_bytes,
        host_capacity_bytes=host.capacity_bytes - planned_bytes(plan, "host"),
        snapshots="/cache/snapshots/box",
        layouts=("smollm2",),
    )
    assert (plan.awake, plan.policies) == (("smollm2",), {"smollm2": ModelPolicy(gms="gms@cpu")})
    assert worker.program == ("python", "-m", "engines.native")
    assert (worker.device, worker.cores, worker.threads) == ("cpu", (), 2)
    assert worker.env == {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x40000",
    }
    assert all(process.after == () for process in plan.processes)
    assert isinstance(router.spec, RouterSpec) and router.spec.mode == "kv"
    assert isinstance(frontend.spec, FrontendSpec) and frontend.spec.port == plan.port == 8000
    assert plan.endpoint == "http://127.0.0.1:8000"
    (spec,) = workers(plan)
    assert (spec.gms, spec.layout) == ("gms@cpu", "smollm2")
    assert (spec.role, spec.threads, spec.max_batch, spec.run_dir) == ("aggregated", 2, 32, "/run/box")
    assert (spec.model.context_length, spec.model.block_size, spec.model.path) == (8192, 16, "")
    assert spec.kv_bytes == 728 * 16 * 30 * 2 * 3 * 64 * 4
    weights = next(item for item in worker.memory if item.purpose == "weights")
    assert (weights.bytes, weights.device) == (538_060_032, "cpu")
    assert weights.arithmetic == "134,515,008 × 4 B (float32), shared through gms@cpu"


def test_what_the_store_knows_counts_before_the_catalogue() -> None:
    stored = ModelFacts(**{**{f: getattr(CATALOGUE["smollm2"], f) for f in CATALOGUE["smollm2"].__struct_fields__},
                           "path": "/store/smollm2", "fingerprint": "f00d", "context_length": 4096})  # fmt: skip
    (spec,) = workers(plan_of("smollm2", smollm2=stored))
    assert (spec.model.path, spec.model.fingerprint, spec.model.context_length) == (
        "/store/smollm2",
        "f00d",
        4096,
    )


def test_two_workers_share_weights_and_split_cores() -> None:
    plan = plan_of("smollm2-duo", Hardware(cpu=cpu(cores=5)))
    first, second = (process for process in plan.processes if process.kind == "worker")
    assert (first.cores, second.cores) == ((0, 1, 2), (3, 4))
    assert (first.threads, second.threads) == (3, 2)
    sizes = [item.bytes for item in plan.memory if item.purpose == "weights"]
    assert sizes == [538_060_032, 0]
    assert next(item for item in second.memory if item.purpose == "weights").arithmetic == (
        "the same layout as smollm2.aggregated.0: counted there"
    )


def test_smollm2_disagg() -> None:
    plan = plan_of("smollm2-disagg")
    prefill, decode = (process for process in plan.processes if process.kind == "worker")
    assert [(one.name, one.role) for one in (prefill, decode)] == [
        ("smollm2.prefill.0", "prefill"),
        ("smollm2.decode.0", "decode"),
    ]
    assert {(spec.role, spec.gms, spec.kvstore) for spec in workers(plan)} == {
        ("prefill", "gms@cpu", "kvstore"),
        ("decode", "gms@cpu", "kvstore"),
    }
    assert (prefill.cores, decode.cores) == ((0,), (1,))
    assert plan.targets == {"smollm2": Targets(ttft_s=2.0, itl_s=0.1)}
    (router,) = (process.spec for process in plan.processes if isinstance(process.spec, RouterSpec))
    assert router.disagg == Disagg(policy="fallback")
    assert "prefill here, decode there: every request while both are there (policy fallback)" in plan_text(plan)


def test_thresholds_and_the_longest_generation_reach_router_and_frontend() -> None:
    plan = plan_of(
        """
model: {name: smollm2, engine: mock, workers: {prefill: 2, decode: 1}}
disagg:
  policy: conditional
  min_uncached_tokens: 100
  min_uncached_share: 0.25
  max_prefill_tokens: 5000
  transfer_lease: 5s
frontend: {max_generation: 90s}
"""
    )
    specs = {process.kind: process.spec for process in plan.processes}
    assert isinstance(specs["router"], RouterSpec) and isinstance(specs["frontend"], FrontendSpec)
    assert specs["router"].disagg == Disagg("conditional", 100, 0.25, 5000)
    assert (specs["frontend"].max_generation_s, specs["frontend"].transfer_ttl_s) == (90, 5)
    assert "prompts with 100 tokens to compute and more, which are 25% of it at least, unless 5,000 wait" in plan_text(
        plan
    )
    assert plan.targets == {} and not plan.following.auto
    followed = plan_of("model: smollm2\nadvise: {auto: true, settle: 20s}").following
    assert followed == Following(auto=True, settle_s=20, reverse_s=100)


def test_one_copy_in_another_dtype_is_shared_too() -> None:
    text = "model: {name: smollm2, options: {dtype: float64}, workers: 2, context_length: 512}"
    sizes = [item.bytes for item in plan_of(text).memory if item.purpose == "weights"]
    assert sizes == [2 * 538_060_032, 0]
    weights = next(item for item in plan_of(text).memory if item.purpose == "weights")
    assert weights.arithmetic == "134,515,008 × 8 B (float64 from float32), shared through gms@cpu"


def test_mock_8gpu_runs_anywhere_on_devices_that_are_not_there() -> None:
    plan = plan_of("mock-8gpu", Hardware(cpu=cpu(cores=1, gib=2)))
    assert [spec.device for spec in workers(plan)] == [f"SIM-{n:02d}" for n in range(8)]
    assert {device.kind for device in plan.devices} == {"simulated", "host"}
    assert {spec.kv_bytes for spec in workers(plan)} == {40 * GIB}
    assert not any(item.purpose == "weights" for item in plan.memory)
    assert "simulated" in plan.warnings[0]


def test_two_models_take_turns() -> None:
    plan = plan_of("two-models")
    assert plan.awake == ("smollm2",)
    assert {name: (policy.keep, policy.gms) for name, policy in plan.policies.items()} == {
        "smollm2": ("host", "gms@cpu"),
        "smollm2-bf16": ("host", "gms@cpu"),
    }
    gms = plan.processes[0].spec
    assert isinstance(gms, GmsSpec) and gms.layouts == ("smollm2", "smollm2-bf16")
    for name in plan.policies:
        assert sum(needs_of(plan, name).awake.values()) < gms.capacity_bytes
    assert sum(sum(needs_of(plan, name).awake.values()) for name in plan.policies) > gms.capacity_bytes
    assert gms.host_capacity_bytes > 538_060_032 + 269_030_016, "while they change places, both are in host memory"
    first, second = (process for process in plan.processes if process.kind == "worker")
    assert (first.threads, first.cores) == (second.threads, second.cores) == (2, ()), "each has the machine to itself"
    assert plan_text(plan).splitlines()[1] == "after up: smollm2 awake; smollm2-bf16 asleep in host"
    assert planned_bytes(plan, "cpu") == sum(needs_of(plan, "smollm2").awake.values())


def test_a_laptop_carries_two_models() -> None:
    device = CpuDevice(cores=(0, 1), memory_total=8 * GIB, memory_available=4 * GIB)
    assert plan_of("two-models", Hardware(cpu=device)).awake == ("smollm2",)


TURNS = """
models:
  - {{name: a, source: smollm2, context_length: 1024, max_batch: 8, options: {{max_batch_tokens: 256}}{a}}}
  - {{name: b, source: smollm2, context_length: 1024, max_batch: 8, options: {{max_batch_tokens: 256, dtype: bfloat16}}{b}}}
  - {{name: c, source: smollm2, context_length: 1024, max_batch: 8, options: {{max_batch_tokens: 256, dtype: bfloat16}}{c}}}
memory: {{cpu: {cpu}}}
{rest}
"""
"""a takes 570 MiB at least, b and c 285 MiB each."""


def turns(cpu: str, *, a: str = "", b: str = "", c: str = "", rest: str = "") -> str:
    return TURNS.format(cpu=cpu, a=a and f", {a}", b=b and f", {b}", c=c and f", {c}", rest=rest)


@pytest.mark.parametrize(
    ("text", "awake"),
    [
        (turns("4GiB"), ("a", "b", "c")),
        (turns("1GiB"), ("a", "b")),
        (turns("700MiB"), ("a",)),
        (turns("1GiB", c="sleep: {pin: true}"), ("a", "c")),
        (turns("1GiB", b="sleep: {pin: true}", c="sleep: {pin: true}"), ("b", "c")),
        (turns("1100MiB", b="sleep: {keep: device}", c="sleep: {keep: device}"), ("a",)),
    ],
)  # fmt: skip
def test_awake_are_the_pinned_ones_then_as_many_as_fit_in_order(text: str, awake: tuple[str, ...]) -> None:
    if awake == ("b", "c"):
        assert refusal(text)[0].startswith("cpu: a beside b, c (pinned) needs"), "a could never wake"
        return
    assert plan_of(text).awake == awake


def test_kv_is_what_is_left_to_those_who_are_awake_together() -> None:
    alone, beside, _ = (spec.kv_bytes for spec in workers(plan_of(turns("640MiB"))))
    assert alone < beside, "b and c have what a's weights leave when it sleeps"
    plan = plan_of(turns("4GiB"))
    assert len({spec.kv_bytes for spec in workers(plan)}) == 1


def test_who_never_meets_shares_the_cores() -> None:
    def cores(text: str) -> list[tuple[int, ...]]:
        plan = plan_of(text, Hardware(cpu=cpu(cores=6)))
        return [process.cores for process in plan.processes if process.kind == "worker"]

    assert cores(turns("4GiB")) == [(0, 1), (2, 3), (4, 5)]
    small = turns("700MiB", a="kv_memory: 100MiB", b="kv_memory: 40MiB", c="kv_memory: 40MiB")
    assert cores(small) == [(), (0, 1, 2), (3, 4, 5)], "a alone with all, or b with c"
    pinned = turns("1000MiB", a="kv_memory: 100MiB, sleep: {pin: true}", b="kv_memory: 40MiB", c="kv_memory: 40MiB")
    assert cores(pinned) == [(0, 1, 2), (3, 4, 5), (3, 4, 5)], "a always, b or c"


def test_a_model_that_does_not_fit_alone_is_named_with_the_arithmetic() -> None:
    (reason,) = refusal(turns("500MiB"))
    assert reason == (
        "cpu: a needs 570 MiB (weights 513 MiB + KV 45.0 MiB + overhead 12.0 MiB), may use 500 MiB: 70.1 MiB missing"
    )


def test_weights_that_sleep_on_the_device_count_there() -> None:
    (reason,) = refusal(turns("700MiB", b="sleep: {keep: device}"))
    assert "weights asleep there 257 MiB" in reason and reason.endswith("with keep: host for those asleep it would fit")


def test_host_memory_must_hold_what_sleeps() -> None:
    device = CpuDevice(cores=(0, 1), memory_total=4 * GIB, memory_available=2 * GIB)
    profile = without_tiers(load_profile("two-models", {}))
    with pytest.raises(PlanRefused) as caught:
        make_plan(profile, Hardware(cpu=device), {}, run_dir="/r")
    assert caught.value.details == (
        "host: needs 1.48 GiB (744 MiB for interpreters and libraries + 772 MiB for the weights of smollm2, smollm2-bf16 "
        "while they sleep), may use 1.02 GiB: 473 MiB missing; with keep: disk they need none",
    )
    on_disk = profile.model_copy(update={"sleep": profile.sleep.model_copy(update={"keep": "disk"})})
    assert make_plan(on_disk, Hardware(cpu=device), {}, run_dir="/r").awake == ("smollm2",)


def test_an_open_split_leaves_host_memory_for_what_sleeps() -> None:
    text = """
models:
  - {name: a, source: smollm2, kv_memory: 2GiB}
  - {name: b, source: smollm2, kv_memory: 2GiB, options: {dtype: bfloat16}}
"""
    plan = plan_of(text, Hardware(cpu=cpu(gib=4.7)))
    gms = plan.processes[0].spec
    assert plan.awake == ("a",)
    assert isinstance(gms, GmsSpec) and gms.host_capacity_bytes >= 538_060_032 + 269_030_016


def test_weights_that_stay_on_a_device_too_small_for_them_are_refused() -> None:
    text = """
models:
  - {name: a, source: smollm2, context_length: 64, max_batch: 1, sleep: {keep: device}}
  - {name: b, source: smollm2, engine: mock, context_length: 64}
memory: {cpu: 500MiB}
"""
    assert refusal(text) == (
        "cpu: needs 513 MiB (weights 0 B + KV 0 B + overhead 0 B + weights asleep there 513 MiB), may use 500 MiB: "
        "13.1 MiB missing",
    )


def test_a_model_that_could_not_go_to_sleep_is_warned_of() -> None:
    plan = plan_of("model: smollm2\nmemory: {host: 2GiB, cpu: 1500MiB}\nsleep: {idle_ttl: 5m}")
    assert any("with keep: disk it could" in warning for warning in plan.warnings)
    assert plan_text(plan).splitlines()[1] == "later: smollm2 sleeps in host after 5m00s without requests"


def test_mock_workers_are_stopped_and_need_no_service() -> None:
    plan = plan_of("mock-8gpu")
    assert not any(process.kind == "gms" for process in plan.processes)
    assert plan.policies == {"mock": ModelPolicy()}
    text = """
models:
  - {name: a, source: smollm2, engine: mock, kv_memory: 6GiB, workers: {aggregated: {devices: [0]}}}
  - {name: b, source: smollm2, engine: mock, kv_memory: 6GiB, workers: {aggregated: {devices: [0]}}}
simulate: {devices: [{memory: 10GiB}]}
"""
    assert plan_text(plan_of(text)).splitlines()[2] == "after up: a awake; b stopped"


def test_a_port_of_ones_own() -> None:
    plan = make_plan(load_profile("smollm2", {}), Hardware(cpu=cpu()), {}, run_dir="/r", port=9123)
    assert plan.port == 9123
    spec = plan.processes[-1].spec
    assert isinstance(spec, FrontendSpec) and spec.port == 9123


def test_kv_shrinks_to_what_is_there_but_not_below_one_context() -> None:
    roomy, tight = (workers(plan_of("model: smollm2", Hardware(cpu=cpu(gib=gib))))[0].kv_bytes for gib in (8, 1.6))
    one_context = 8192 * 30 * 2 * 3 * 64 * 4
    assert roomy > tight >= one_context
    assert tight % (16 * 30 * 2 * 3 * 64 * 4) == 0


def test_every_plan_is_quick_and_the_same_twice() -> None:
    for name in ("smollm2", "smollm2-duo", "smollm2-disagg", "mock-8gpu"):
        profile, hardware = load_profile(name, {}), Hardware(cpu=cpu())
        started = time.thread_time()
        first = make_plan(profile, hardware, {}, run_dir="/r")
        assert time.thread_time() - started < 0.05
        assert first.digest == make_plan(profile, hardware, {}, run_dir="/r").digest


def test_what_changes_the_plan_changes_its_digest() -> None:
    profile, hardware = load_profile("smollm2", {}), Hardware(cpu=cpu())
    digests = {make_plan(profile, hardware, {}, run_dir="/r", port=port).digest for port in (1, 2, 3)}
    assert len(digests) == 3


# GPUs: placement is planned for engines to come, so it is looked at before a plan is refused for them


def test_a_span_stays_within_what_is_linked() -> None:
    from dynamo_box.plan.placement import demands, place

    links = {0: 2, 1: 3, 2: 0, 3: 1}
    gpus = tuple(Gpu(f"GPU-{n}", n, "G", 80 * GIB, 80 * GIB, links=(f"GPU-{links[n]}",)) for n in range(4))
    text = "model: {name: smollm2, engine: vllm, workers: {aggregated: {replicas: 2, tensor_parallel: 2}}}"
    profile, hardware = load_text(text, "t", {}), Hardware(cpu=cpu(), gpus=gpus)
    placed, missing = place(demands(profile, hardware), CATALOGUE, hardware)
    assert [worker.devices for worker in placed] == [("GPU-0", "GPU-2"), ("GPU-1", "GPU-3")]
    assert missing == []


def test_named_devices_are_left_alone_by_the_others() -> None:
    text = """
models:
  - {name: a, source: smollm2, engine: mock, kv_memory: 1GiB, workers: {aggregated: {replicas: 2, devices: 2}}}
  - {name: b, source: smollm2, engine: mock, kv_memory: 1GiB, workers: {aggregated: {replicas: 2, devices: [0]}}}
simulate: {devices: [{count: 3, memory: 8GiB}]}
"""
    assert [spec.device for spec in workers(plan_of(text))] == ["SIM-01", "SIM-02", "SIM-00", "SIM-00"]


# refusals


def test_llama70b_disagg_says_what_is_missing_for_each_topology() -> None:
    reasons = refusal("llama70b-disagg")
    assert reasons[0] == (
        "2 prefill and 2 decode workers, each on 2 H200: needs 8 GPUs (llama-3.3-70b-instruct.prefill 4, "
        "llama-3.3-70b-instruct.decode 4), this machine has none: 8 missing; each needs at least 77.6 GiB of memory"
    )
    assert len(reasons) == 4 + 1
    assert reasons[-1] == "llama-3.3-70b-instruct: the trtllm engine is not built yet", "once"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_an_engine_that_is_not_built_is_named_beside_the_gpu_it_lacks(engine: str) -> None:
    missing, not_built = refusal(f"model: {{name: smollm2, engine: {engine}}}")
    assert missing.startswith("needs 1 GPU (smollm2.aggregated 1), this machine has none: 1 missing")
    assert not_built == f"smollm2: the {engine} engine is not built yet"


def test_llama70b_disagg_on_enough_gpus_says_what_is_not_built() -> None:
    gpus = tuple(Gpu(f"GPU-{n}", n, "H200", 143771 * MIB, 143771 * MIB) for n in range(8))
    reasons = refusal("llama70b-disagg", Hardware(cpu=cpu(gib=256), gpus=gpus))
    assert reasons == ("llama-3.3-70b-instruct: the trtllm engine is not built yet",)


def test_llama70b_disagg_on_small_gpus_says_how_much_too_small() -> None:
    gpus = tuple(Gpu(f"GPU-{n}", n, "L40S", 48 * GIB, 48 * GIB) for n in range(8))
    reasons = refusal("llama70b-disagg", Hardware(cpu=cpu(gib=256), gpus=gpus))
    assert reasons[0] == (
        "2 prefill and 2 decode workers, each on 2 H200: for GPUs with at least 120 GiB; they have 48.0 GiB"
    )
    assert (
        "2 prefill and 2 decode workers, each on 2 H100: GPU 7 (GPU-7): needs 73.7 GiB (weights 65.7 GiB + KV 5.00 GiB "
        "+ overhead 3.00 GiB), may use 45.6 GiB: 28.1 GiB missing"
    ) in reasons


def test_gpus_that_others_use_are_not_free() -> None:
    text = "model: {name: smollm2, engine: mock, kv_memory: 2GiB, workers: {aggregated: {devices: 1}}}"
    hardware = Hardware(cpu=cpu(), gpus=(Gpu("GPU-a", 0, "G", 8 * GIB, 1 * GIB, simulated=True),))
    assert refusal(text, hardware) == (
        "GPU 0 (GPU-a): needs 2.00 GiB (weights 0 B + KV 2.00 GiB + overhead 0 B), may use 1.00 GiB: 1.00 GiB missing",
    )


def test_too_little_memory_says_how_much_and_what_would_do() -> None:
    assert refusal("model: smollm2", Hardware(cpu=cpu(gib=1.5))) == (
        "cpu: needs 957 MiB (weights 513 MiB + KV 360 MiB + overhead 84.0 MiB), may use 886 MiB: 70.7 MiB missing; "
        "with context_length: 6576 it would fit",
    )
    plan_of("model: {name: smollm2, context_length: 6576}", Hardware(cpu=cpu(gib=1.5)))


def test_kv_below_one_context_names_both_ways_out() -> None:
    (reason,) = refusal("model: {name: smollm2, kv_memory: 64MiB}")
    assert reason == (
        "smollm2.aggregated.0: 64.0 MiB of KV hold 1456 tokens, a context has 8192: 296 MiB missing; "
        "raise kv_memory to 360 MiB, or set context_length: 1456"
    )


def test_advice_never_names_a_context_beyond_the_models() -> None:
    refused, missing = refusal("model: {name: smollm2, context_length: 99999999, kv_memory: 1TiB}")
    assert refused == "smollm2: context_length 99999999 is beyond the model's 8192: 99991807 tokens too many"
    assert missing.startswith("cpu: needs 1.00 TiB ") and "context_length" not in missing
    _, missing = refusal("model: {name: smollm2, context_length: 99999999, kv_memory: 64MiB}")
    assert missing.endswith("raise kv_memory to 360 MiB, or set context_length: 1456")


def test_a_source_is_echoed_on_one_line() -> None:
    (reason,) = refusal('model: {name: x, source: "hf:a/b\\n\\e[31m"}')
    assert reason == r"nothing is known of hf:a/b\n\x1b[31m yet: run `dynbox pull hf:a/b\n\x1b[31m` first"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {name: x, source: 'hf:a/b'}", "nothing is known of hf:a/b yet: run `dynbox pull hf:a/b` first"),
        ("model: {name: smollm2, context_length: 9000}",
         "smollm2: context_length 9000 is beyond the model's 8192: 808 tokens too many"),
        ("model: smollm2\nmemory: {host: 80GiB}", "memory.host is 80.0 GiB, 8.00 GiB are available: 72.0 GiB missing"),
        ("model: {name: smollm2, engine: mock, workers: {aggregated: {devices: [5]}}}\nsimulate: {devices: [{memory: 1GiB}]}",
         "smollm2.aggregated asks for GPU 5; this machine has 0"),
        ("model: {name: smollm2, workers: {prefill: 1, decode: 1}}",
         "smollm2: prefill workers hand KV to decode workers through the host tier, and there is none; set memory.tiers.host"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    assert refusal(text)[0] == reason


def test_all_reasons_at_once() -> None:
    text = "models: [{name: a, source: x-1}, {name: smollm2, context_length: 9000}, {name: b, source: smollm2, engine: vllm}]"
    assert len(refusal(text)) >= 3


def test_native_on_a_gpu_is_not_built() -> None:
    hardware = Hardware(cpu=cpu(), gpus=(Gpu("GPU-a", 0, "G", 80 * GIB, 80 * GIB),))
    assert refusal("model: {name: smollm2, workers: {aggregated: {devices: 1}}}", hardware) == (
        "smollm2.aggregated: the native engine on GPUs is not built yet; set devices: cpu",
    )


def test_a_refusal_names_the_shipped_profiles_that_fit() -> None:
    shipped = {name: load_profile(name, {}) for name in ("llama70b-disagg", "mock-8gpu", "smollm2", "smollm2-duo")}
    with pytest.raises(PlanRefused) as caught:
        make_plan(shipped["llama70b-disagg"], Hardware(cpu=cpu()), {}, run_dir="/r", shipped=lambda: shipped)
    assert caught.value.remedy == "shipped profiles that fit this machine: smollm2, smollm2-duo, mock-8gpu"
    assert caught.value.exit_code == 2


def test_memory_that_cannot_be_read_is_asked_for() -> None:
    hardware = Hardware(cpu=CpuDevice())
    assert refusal("smollm2", hardware)[0] == "this machine's memory can't be read: set memory.host in the profile"
    plan = plan_of("model: smollm2\nmemory: {host: 4GiB}", hardware)
    assert plan.devices[0].memory_bytes is None


# properties


def could_be_awake(plan: Plan) -> list[tuple[str, ...]]:
    """All sets of models that fit on the devices together, by what the plan gives their workers."""
    capacity = {device.id: device.capacity_bytes for device in plan.devices}
    needs = {name: needs_of(plan, name).awake for name in plan.policies}
    found = []
    for count in range(1, len(needs) + 1):
        for names in combinations(needs, count):
            used = Counter[str]()
            for name in names:
                used.update(needs[name])
            if all(size <= capacity[device] for device, size in used.items()):
                found.append(names)
    return found


def standing(plan: Plan, name: str, state: Literal["awake", "asleep"]) -> Standing:
    policy = plan.policies[name]
    place = "device" if state == "awake" else "host"
    needs = needs_of(plan, name)
    return Standing(name, needs, state, place, policy.keep, pin=policy.pin, used_s=99, awake_s=99)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    models = []
    for index in range(draw(st.integers(1, 3))):
        engine = draw(st.sampled_from(["native", "mock"]))
        model: dict[str, object] = {
            "name": f"m{index}",
            "source": "smollm2",
            "engine": engine,
            "block_size": draw(st.sampled_from([8, 16, 64])),
            "context_length": draw(st.integers(64, 8192)),
            "max_batch": draw(st.integers(1, 64)),
            "kv_memory": draw(st.none() | st.integers(1 << 20, 4 << 30)),
            "workers": {"aggregated": {"replicas": draw(st.integers(1, 4))}},
            "sleep": {"pin": draw(st.booleans()) and draw(st.booleans())},
        }
        if engine == "native" and draw(st.booleans()):
            model["sleep"] = {"keep": draw(st.sampled_from(["device", "host", "disk"]))}
        models.append(model)
    host = draw(st.just(0) | st.integers(1 << 20, 4 << 30))
    tiers = {"host": host, "disk": draw(st.integers(0, 64 << 30)) if host else 0}
    return Profile.model_validate({"name": "p", "models": tuple(models), "memory": {"tiers": tiers}})


@given(profiles(), st.integers(1, 9), st.floats(0.5, 64))
def test_no_plan_gives_away_more_than_there_is(profile: Profile, cores: int, gib: float) -> None:
    hardware = Hardware(cpu=cpu(cores, gib))
    try:
        plan = make_plan(profile, hardware, {}, run_dir="/r")
    except PlanRefused as error:
        assert error.details and all("missing" in reason for reason in error.details)
        return
    for device in plan.devices:
        assert planned_bytes(plan, device.id) <= device.capacity_bytes
    assert sum(device.capacity_bytes for device in plan.devices) <= hardware.cpu.memory_available
    assert {item.device for item in plan.memory} <= {device.id for device in plan.devices}
    assert all(process.threads >= 1 for process in plan.processes)
    for awake in could_be_awake(plan):
        used = [core for process in plan.processes if process.model in awake for core in process.cores]
        assert len(used) == len(set(used)) and set(used) <= set(hardware.cpu.cores)
    assert plan.awake in could_be_awake(plan)
    for name in plan.policies:
        room = make_room(
            standing(plan, name, "asleep"),
            [standing(plan, other, "awake") for other in plan.policies if other != name],
            {device.id: device.capacity_bytes for device in plan.devices},
        )
        assert not room.missing, "whoever is asked for can wake"
    names = Counter(process.name for process in plan.processes)
    assert max(names.values()) == 1
    for spec in workers(plan):
        if spec.engine == "native":
            block = spec.model.block_size * 30 * 2 * 3 * 64 * 4
            assert spec.kv_bytes % block == 0
            assert spec.kv_bytes // block * spec.model.block_size >= spec.model.context_length
    assert plan_text(plan) and plan_json(plan)["digest"] == plan.digest


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 24))
def test_no_device_twice(replicas: int, span: int, gpus: int) -> None:
    text = f"""
model:
  {{name: m, source: smollm2, engine: mock, kv_memory: 2GiB, workers: {{aggregated: {{replicas: {replicas}, tensor_parallel: {span}}}}}}}
simulate: {{devices: [{{count: {gpus}, memory: 8GiB}}]}}
"""
    if replicas * span > gpus:
        assert f"{replicas * span - gpus} missing" in refusal(text)[0]
        return
    devices = [device for spec in workers(plan_of(text)) for device in spec.device.split(",")]
    assert len(devices) == len(set(devices)) == replicas * span


@given(st.integers(1, 16), st.integers(0, 4), st.lists(st.integers(0, 5), max_size=4))
def test_turns_share_cores_and_never_with_those_who_are_always_there(
    cores: int, always: int, counts: list[int]
) -> None:
    fixed = [f"p{index}" for index in range(always)]
    turns = [[f"t{turn}.{index}" for index in range(count)] for turn, count in enumerate(counts)]
    shares, most = share_among(CpuDevice(cores=tuple(range(cores))), fixed, turns)
    assert set(shares) == {*fixed, *(name for turn in turns for name in turn)}
    assert most == always + max(counts, default=0)
    for turn in turns:
        used = [core for name in (*fixed, *turn) for core in shares[name].cores]
        assert len(used) == len(set(used))


@given(st.integers(1, 64), st.integers(0, 80), st.none() | st.floats(0.1, 70))
def test_cores_are_shared_out_once(cores: int, count: int, quota: float | None) -> None:
    device = CpuDevice(cores=tuple(range(3, 3 + cores)), quota=quota)
    shares = share_cores(device, count)
    assert len(shares) == count and all(share.threads >= 1 for share in shares)
    pinned = [core for share in shares for core in share.cores]
    if pinned:
        assert sorted(pinned) == list(device.cores)
        assert all(share.threads == len(share.cores) for share in shares)
        assert max(share.threads for share in shares) - min(share.threads for share in shares) <= 1
    elif count:
        assert sum(share.threads for share in shares) <= max(count, device.parallel)
