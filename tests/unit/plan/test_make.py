"""What a plan holds: processes, devices, cores and bytes, for any hardware one can think up."""

# ruff: noqa: E501 (an expected text is one line)

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import CpuDevice, Gpu, Hardware, SimulatedGpus, simulate
from dynamo_box.plan.cores import share_cores
from dynamo_box.plan.make import make_plan
from dynamo_box.plan.render import plan_json, plan_text, planned_bytes
from dynamo_box.plan.types import Plan
from dynamo_box.profile.catalogue import CATALOGUE
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.load import load_profile, load_text
from dynamo_box.profile.schema import Profile
from dynamo_box.protocol.spec import FrontendSpec, RouterSpec, WorkerSpec

GIB = 1 << 30
MIB = 1 << 20


def cpu(cores: int = 2, gib: float = 8) -> CpuDevice:
    size = int(gib * GIB)
    return CpuDevice(name="test", cores=tuple(range(cores)), memory_total=size, memory_available=size)


def plan_of(text_or_name: str, hardware: Hardware | None = None, **facts: ModelFacts) -> Plan:
    profile = load_text(text_or_name, "test", {}) if ":" in text_or_name else load_profile(text_or_name, {})
    return make_plan(profile, hardware or Hardware(cpu=cpu()), facts, run_dir="/run/box")


def refusal(text_or_name: str, hardware: Hardware | None = None) -> tuple[str, ...]:
    with pytest.raises(PlanRefused) as caught:
        plan_of(text_or_name, hardware)
    return caught.value.details


def workers(plan: Plan) -> list[WorkerSpec]:
    return [process.spec for process in plan.processes if isinstance(process.spec, WorkerSpec)]


def test_smollm2() -> None:
    plan = plan_of("smollm2")
    assert [process.name for process in plan.processes] == ["router", "smollm2.aggregated.0", "frontend"]
    router, worker, frontend = plan.processes
    assert worker.program == ("python", "-m", "engines.native")
    assert (worker.device, worker.cores, worker.threads) == ("cpu", (), 2)
    assert worker.env == {
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert all(process.after == () for process in plan.processes)
    assert isinstance(router.spec, RouterSpec) and router.spec.mode == "kv"
    assert isinstance(frontend.spec, FrontendSpec) and frontend.spec.port == plan.port == 8000
    assert plan.endpoint == "http://127.0.0.1:8000"
    (spec,) = workers(plan)
    assert (spec.role, spec.threads, spec.max_batch, spec.run_dir) == ("aggregated", 2, 32, "/run/box")
    assert (spec.model.context_length, spec.model.block_size, spec.model.path) == (8192, 16, "")
    assert spec.kv_bytes == 728 * 16 * 30 * 2 * 3 * 64 * 4
    weights = next(item for item in worker.memory if item.purpose == "weights")
    assert (weights.bytes, weights.device) == (538_060_032, "cpu")
    assert weights.arithmetic == "134,515,008 × 4 B (float32), the mapped file"


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
        "the same mapped file as smollm2.aggregated.0: counted there"
    )


def test_a_copy_in_another_dtype_is_nobody_elses() -> None:
    text = "model: {name: smollm2, options: {dtype: float64}, workers: 2, context_length: 512}"
    sizes = [item.bytes for item in plan_of(text).memory if item.purpose == "weights"]
    assert sizes == [2 * 538_060_032] * 2


def test_mock_8gpu_runs_anywhere_on_devices_that_are_not_there() -> None:
    plan = plan_of("mock-8gpu", Hardware(cpu=cpu(cores=1, gib=2)))
    assert [spec.device for spec in workers(plan)] == [f"SIM-{n:02d}" for n in range(8)]
    assert {device.kind for device in plan.devices} == {"simulated", "host"}
    assert {spec.kv_bytes for spec in workers(plan)} == {40 * GIB}
    assert not any(item.purpose == "weights" for item in plan.memory)
    assert "simulated" in plan.warnings[0]


def test_a_port_of_ones_own() -> None:
    plan = make_plan(load_profile("smollm2", {}), Hardware(cpu=cpu()), {}, run_dir="/r", port=9123)
    assert plan.port == 9123
    spec = plan.processes[-1].spec
    assert isinstance(spec, FrontendSpec) and spec.port == 9123


def test_kv_shrinks_to_what_is_there_but_not_below_one_context() -> None:
    roomy, tight = (workers(plan_of("smollm2", Hardware(cpu=cpu(gib=gib))))[0].kv_bytes for gib in (8, 1.6))
    one_context = 8192 * 30 * 2 * 3 * 64 * 4
    assert roomy > tight >= one_context
    assert tight % (16 * 30 * 2 * 3 * 64 * 4) == 0


def test_every_plan_is_quick_and_the_same_twice() -> None:
    for name in ("smollm2", "smollm2-duo", "mock-8gpu"):
        profile, hardware = load_profile(name, {}), Hardware(cpu=cpu())
        started = time.perf_counter()
        first = make_plan(profile, hardware, {}, run_dir="/r")
        assert time.perf_counter() - started < 0.05
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


def test_llama70b_disagg_says_what_is_missing() -> None:
    assert refusal("llama70b-disagg") == (
        "needs 8 GPUs (llama-3.3-70b-instruct.prefill 4, llama-3.3-70b-instruct.decode 4), this machine has none: "
        "8 missing; each needs at least 77.6 GiB of memory",
        "llama-3.3-70b-instruct: the trtllm engine is not built yet",
        "llama-3.3-70b-instruct.prefill: prefill workers are not built yet; use aggregated ones",
        "llama-3.3-70b-instruct.decode: decode workers are not built yet; use aggregated ones",
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_an_engine_that_is_not_built_is_named_beside_the_gpu_it_lacks(engine: str) -> None:
    missing, not_built = refusal(f"model: {{name: smollm2, engine: {engine}}}")
    assert missing.startswith("needs 1 GPU (smollm2.aggregated 1), this machine has none: 1 missing")
    assert not_built == f"smollm2: the {engine} engine is not built yet"


def test_llama70b_disagg_on_enough_gpus_says_what_is_not_built() -> None:
    gpus = simulate((SimulatedGpus("H100", 8, 81559 * MIB),), cpu()).gpus
    assert refusal("llama70b-disagg", Hardware(cpu=cpu(gib=256), gpus=gpus)) == (
        "llama-3.3-70b-instruct: the trtllm engine is not built yet",
        "llama-3.3-70b-instruct.prefill: prefill workers are not built yet; use aggregated ones",
        "llama-3.3-70b-instruct.decode: decode workers are not built yet; use aggregated ones",
    )


def test_llama70b_disagg_on_small_gpus_says_how_much_too_small() -> None:
    gpus = simulate((SimulatedGpus("L40S", 8, 48 * GIB),), cpu()).gpus
    reasons = refusal("llama70b-disagg", Hardware(cpu=cpu(gib=256), gpus=gpus))
    assert len(reasons) == 8 + 3  # and what is not built
    assert reasons[0] == (
        "GPU 0 (SIM-00): needs 73.7 GiB (weights 65.7 GiB + KV 5.00 GiB + overhead 3.00 GiB), may use 45.6 GiB: "
        "28.1 GiB missing"
    )


def test_gpus_that_others_use_are_not_free() -> None:
    text = "model: {name: smollm2, engine: mock, kv_memory: 2GiB, workers: {aggregated: {devices: 1}}}"
    hardware = Hardware(cpu=cpu(), gpus=(Gpu("GPU-a", 0, "G", 8 * GIB, 1 * GIB, simulated=True),))
    assert refusal(text, hardware) == (
        "GPU 0 (GPU-a): needs 2.00 GiB (weights 0 B + KV 2.00 GiB + overhead 0 B), may use 1.00 GiB: 1.00 GiB missing",
    )


def test_too_little_memory_says_how_much_and_what_would_do() -> None:
    assert refusal("smollm2", Hardware(cpu=cpu(gib=1.5))) == (
        "cpu: needs 957 MiB (weights 513 MiB + KV 360 MiB + overhead 84.0 MiB), may use 926 MiB: 30.7 MiB missing; "
        "with context_length: 7488 it would fit",
    )
    plan_of("model: {name: smollm2, context_length: 7488}", Hardware(cpu=cpu(gib=1.5)))


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
        ("model: smollm2\nsleep: {after_idle: 5m}", "sleep.after_idle: sleeping models are not built yet; leave it out"),
        ("model: smollm2\nmemory: {tiers: {disk: 1GiB}}", "memory.tiers: KV tiers are not built yet; leave them out"),
        ("model: smollm2\nmemory: {host: 80GiB}", "memory.host is 80.0 GiB, 8.00 GiB are available: 72.0 GiB missing"),
        ("model: {name: smollm2, engine: mock, workers: {aggregated: {devices: [5]}}}\nsimulate: {devices: [{memory: 1GiB}]}",
         "smollm2.aggregated asks for GPU 5; this machine has 0"),
        ("model: {name: smollm2, engine: mock, workers: {prefill: 1, decode: 1}}",
         "smollm2.prefill: prefill workers are not built yet; use aggregated ones"),
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
        }
        models.append(model)
    return Profile.model_validate({"name": "p", "models": tuple(models)})


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
    pinned = [core for process in plan.processes for core in process.cores]
    assert len(pinned) == len(set(pinned)) and set(pinned) <= set(hardware.cpu.cores)
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
