"""Profiles rehearsed on GPUs that aren't there: the topology taken, what mock engines are told, what is refused."""

from __future__ import annotations

import re

import pytest

from dynamo_box.errors import PlanRefused, UsageError
from dynamo_box.hardware import CpuDevice, Hardware
from dynamo_box.plan.make import make_plan
from dynamo_box.plan.render import plan_text
from dynamo_box.plan.simulate import simulated, simulated_devices
from dynamo_box.plan.types import Plan
from dynamo_box.profile.catalogue import CATALOGUE
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.load import load_profile, load_text, shipped_profiles
from dynamo_box.profile.schema import Profile
from dynamo_box.protocol.spec import FrontendSpec, KvStoreSpec, RouterSpec, TierRehearsal, WorkerSpec

GIB = 1 << 30
LAPTOP = Hardware(cpu=CpuDevice("test", (0, 1), memory_total=8 * GIB, memory_available=8 * GIB))
SHIPPED = sorted(shipped_profiles({}))


def rehearsed(text_or_name: str, gpus: str, **stored: ModelFacts) -> Plan:
    profile = load_text(text_or_name, "test", {}) if ":" in text_or_name else load_profile(text_or_name, {})
    profile = simulated(profile, simulated_devices([gpus]), stored)
    return make_plan(profile, LAPTOP, stored, run_dir="/run", shipped=lambda: shipped_profiles({}))


def workers(plan: Plan) -> list[WorkerSpec]:
    return [process.spec for process in plan.processes if isinstance(process.spec, WorkerSpec)]


@pytest.mark.parametrize(
    ("gpus", "topology", "passed_over", "devices"),
    [
        (
            "gpu=8x80GiB",
            "2 prefill and 2 decode workers, each on 2 H100",
            2,
            ["SIM-00,SIM-01", "SIM-02,SIM-03", "SIM-04,SIM-05", "SIM-06,SIM-07"],
        ),
        (
            "gpu=4x141GiB",
            "1 prefill and 1 decode worker, each on 2 H200",
            1,
            ["SIM-00,SIM-01", "SIM-02,SIM-03"],
        ),
        (
            "gpu=4x80GiB",
            "1 prefill and 1 decode worker, each on 2 H100",
            3,
            ["SIM-00,SIM-01", "SIM-02,SIM-03"],
        ),
    ],
)
def test_llama70b_is_laid_out_in_the_first_way_that_fits(
    gpus: str, topology: str, passed_over: int, devices: list[str]
) -> None:
    plan = rehearsed("llama70b-disagg", gpus)
    assert (plan.topology, len(plan.passed_over)) == (topology, passed_over)
    assert [spec.device for spec in workers(plan)] == devices
    text = plan_text(plan)
    assert text.splitlines()[1] == "SIMULATED: these GPUs are not there; speeds are a model's, and answers are not"
    assert f"topology: {topology}\n  not 2 prefill and 2 decode workers, each on 2 H200: " in text


def test_the_mock_engine_is_told_what_it_stands_in_for() -> None:
    spec = workers(rehearsed("llama70b-disagg", "gpu=8x80GiB"))[0]
    assert (spec.engine, spec.role, spec.model.context_length) == ("mock", "prefill", 32768)
    options = spec.options
    assert (options["parameters"], options["width"], options["tensor_parallel"]) == (70.6e9, 80 * 8192, 2)
    assert (options["memory_bytes_per_s"], options["flops_per_s"]) == (3.35e12, 989.5e12)
    assert workers(rehearsed("llama70b-disagg", "gpu=4x141GiB"))[0].options["memory_bytes_per_s"] == 4.8e12
    token = options["kv_bytes_per_token"]
    assert token == 80 * 2 * 8 * 128 * 2
    room = 2 * (int(80 * GIB * 0.95) - 70_600_000_000 - 3 * GIB)
    assert 0 <= room - spec.kv_bytes < 32 * 327_680, "whole blocks of what weights and overhead leave"


def test_too_few_and_too_small_gpus_are_refused_with_what_fits() -> None:
    with pytest.raises(PlanRefused) as caught:
        rehearsed("llama70b-disagg", "gpu=2x24GiB")
    assert caught.value.what == "these GPUs can't carry profile llama70b-disagg"
    assert any("this machine has 2: 2 missing; each needs at least 77.6 GiB" in each for each in caught.value.details)
    assert (
        caught.value.remedy == "shipped profiles that fit these GPUs: smollm2, smollm2-disagg, smollm2-duo, two-models"
    )
    with pytest.raises(PlanRefused) as caught:
        rehearsed("llama70b-disagg", "gpu=8x48GiB")
    assert any(re.search(r"GPU 0 \(SIM-00\): needs 73\.\d GiB .* missing$", each) for each in caught.value.details)
    assert not any("not built" in each for each in caught.value.details)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_can_be_rehearsed(name: str) -> None:
    plan = rehearsed(name, "gpu=8x141GiB")
    assert plan.simulated
    assert {spec.engine for spec in workers(plan)} == {"mock"}
    assert all(spec.device.startswith("SIM-") for spec in workers(plan))
    (frontend,) = (process.spec for process in plan.processes if isinstance(process.spec, FrontendSpec))
    assert frontend.simulated
    tiers = load_profile(name, {}).memory.tiers
    kinds = {"router", "worker", "frontend", *(("kvstore",) if tiers.host else ())}
    assert {process.kind for process in plan.processes} == kinds


def test_tiers_that_are_rehearsed_take_nothing_of_this_machine() -> None:
    plan = rehearsed("llama70b-disagg", "gpu=8x80GiB")
    (process,) = (each for each in plan.processes if each.kind == "kvstore")
    assert isinstance(process.spec, KvStoreSpec)
    assert (process.spec.host_bytes, process.spec.disk_bytes) == (512 * GIB, 3584 * GIB)
    assert (process.spec.directory, process.spec.rehearsal) == ("", TierRehearsal(6.5e9, 3.5e9))
    assert {item.purpose: item.bytes for item in process.memory if item.purpose != "overhead"} == {"KV tier": 0}
    blocks = 4096 * GIB // (32 * 327_680)
    assert process.memory[-1].arithmetic == f"tables of {blocks:,} blocks at most × 512 B", "on all GPUs of a worker"
    assert {spec.kvstore for spec in workers(plan)} == {"kvstore"}
    (router,) = (each.spec for each in plan.processes if isinstance(each.spec, RouterSpec))
    assert router.kvstore == "kvstore"
    shown = "simulated KV tiers: 512 GiB of host memory (profile), 3.50 TiB on disk (profile)"
    assert shown in plan_text(plan).splitlines()


def test_what_a_profile_keeps_out_of_its_tiers_stays_out_in_a_rehearsal() -> None:
    text = "model: {name: smollm2, engine: native}\nmemory: {tiers: {host: 1GiB}}\nkv: {offload: {min_priority: 40}}"
    assert {spec.offload.min_priority for spec in workers(rehearsed(text, "gpu=1x24GiB"))} == {40}


def test_models_that_borrow_the_same_files_share_no_kv() -> None:
    plan = rehearsed("two-models", "gpu=2x24GiB")
    assert len({spec.model.fingerprint for spec in workers(plan)}) == len(plan.models) == 2
    tiered = "models: [{name: a, source: smollm2}, {name: b, source: smollm2}]\nmemory: {tiers: {host: 1GiB}}"
    (store,) = (each.spec for each in rehearsed(tiered, "gpu=2x24GiB").processes if isinstance(each.spec, KvStoreSpec))
    assert store.layouts == 2


def test_a_simulated_host_tier_below_one_block_is_refused_with_the_arithmetic() -> None:
    text = "model: {name: llama-3.3-70b-instruct, engine: vllm}\nmemory: {tiers: {host: 1MiB}}"
    with pytest.raises(PlanRefused) as caught:
        rehearsed(text.replace("vllm", "vllm, workers: {aggregated: {tensor_parallel: 4}}"), "gpu=4x80GiB")
    (reason,) = caught.value.details
    assert "too little for a block of llama-3.3-70b-instruct (5.00 MiB = 16 tokens × 327680 B, modelled)" in reason


def test_a_box_that_is_real_says_nothing_of_the_kind() -> None:
    plan = make_plan(load_profile("smollm2", {}), LAPTOP, {}, run_dir="/run")
    assert not plan.simulated and "SIMULATED" not in plan_text(plan)
    (frontend,) = (process.spec for process in plan.processes if isinstance(process.spec, FrontendSpec))
    assert not frontend.simulated


def test_models_of_the_catalogue_have_the_timing_of_their_size_and_a_borrowed_tokenizer() -> None:
    text = "model: {name: llama-3.1-8b-instruct, engine: vllm, workers: {aggregated: {devices: [0]}}}"
    profile = simulated(load_text(text, "p", {}), simulated_devices(["gpu=1x80GiB"]), {})
    (model,) = profile.served
    assert (model.name, model.origin, model.context_length) == ("llama-3.1-8b-instruct", "smollm2", 131_072)
    facts = CATALOGUE["llama-3.1-8b-instruct"]
    assert model.simulated == {
        "parameters": facts.weights_bytes / 2,
        "weights_bytes": facts.weights_bytes,
        "width": 32 * 4096,
        "kv_bytes_per_token": 131_072,
        "flops_per_s": 989.5e12,
    }
    (spec,) = workers(rehearsed(text, "gpu=1x80GiB"))
    assert spec.options["tensor_parallel"] == 1


def test_what_lies_in_the_store_keeps_its_tokenizer() -> None:
    facts = CATALOGUE["llama-3.1-8b-instruct"]
    stored = ModelFacts(**{name: getattr(facts, name) for name in facts.__struct_fields__} | {"path": "/store/8b"})
    plan = rehearsed("model: {name: llama-3.1-8b-instruct, engine: vllm}", "gpu=1x80GiB", **{facts.name: stored})
    assert plan.models[0].path == "/store/8b"


def test_a_model_that_is_too_large_for_its_gpu_is_refused_as_a_real_one_would_be() -> None:
    with pytest.raises(PlanRefused) as caught:
        rehearsed("model: {name: llama-3.1-8b-instruct, engine: vllm, context_length: 8192}", "gpu=1x16GiB")
    assert re.match(r"GPU 0 \(SIM-00\): needs 19\.0 GiB \(weights 15\.0 GiB", caught.value.details[0])


def test_several_kinds_of_gpus() -> None:
    groups = simulated_devices(["gpu=2x80GiB,gpu=1×24GB", "gpu=1x1TiB"])
    assert [(one.count, one.memory) for one in groups] == [(2, 80 * GIB), (1, 24 * 10**9), (1, 1 << 40)]
    assert [one.name for one in groups] == ["80.0 GiB GPU", "22.4 GiB GPU", "1.00 TiB GPU"]


@pytest.mark.parametrize(
    "text", ["8x80GiB", "gpu=", "gpu=0x80GiB", "gpu=8x0", "gpu=8x80", "gpu=999x1GiB", "tpu=1x1GiB", ""]
)
def test_what_can_not_be_understood_is_shown_how_to(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--simulate {text!r}: ")) as caught:
        simulated_devices([text])
    assert caught.value.remedy == "for example --simulate gpu=8x80GiB"


def refused(text: str) -> str:
    from dynamo_box.errors import ProfileError

    with pytest.raises(ProfileError) as caught:
        load_text(text, "p.yaml", {})
    return caught.value.details[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "models: [a]\ntopologies: [{name: x, workers: 1}]\n",
            "p.yaml:2:13: topologies lay out the workers of one model; say `model`, not `models`",
        ),
        (
            "model: {name: a, workers: 1}\ntopologies: [{name: x, workers: 1}]\n",
            "p.yaml:1:27: the workers are said twice: here and in `topologies`; take one out",
        ),
        (
            "model: a\ntopologies: [{name: x, workers: 1}, {name: x, workers: 2}]\n",
            'p.yaml:2:44: two topologies are called "x"',
        ),
        (
            "model: a\ntopologies: [{name: x, workers: {aggregated: {tensor_parallel: 2}}}]\n",
            "p.yaml:2:64: the native engine has no tensor parallelism",
        ),
        (
            "model: {name: a, simulated: {parametres: 1}}\n",
            'p.yaml:1:30: unknown key "parametres"; did you mean "parameters"?',
        ),
        (
            "model: a\ntopologies: [{name: x, workers: 1, simulated: {width: -1}}]\n",
            'p.yaml:2:55: "width" must be at least 0, not -1',
        ),
    ],
)
def test_topologies_that_can_not_be(text: str, problem: str) -> None:
    assert refused(text) == problem


def test_a_profile_without_topologies_has_none_in_its_plan() -> None:
    profile: Profile = load_profile("mock-8gpu", {})
    plan = make_plan(profile, LAPTOP, {}, run_dir="/run")
    assert (plan.topology, plan.passed_over) == ("", ())
