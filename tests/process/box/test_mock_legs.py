"""A box of mock workers that answers in two legs: whatever befalls one on the way, the client reads the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_under_test import eventually
from mock_box import PROFILE, MockBox

TWO_LEGS = """
  workers: {{prefill: {{replicas: 2}}, decode: {{replicas: 2}}}}
"""
PROMPT = list(range(100, 141))
DEADLY = ("prefill", "first_token", "handover", "takeover")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[MockBox]:
    profile = PROFILE.replace("\n  workers: 2\n", TWO_LEGS)
    made = MockBox(tmp_path_factory.mktemp("box"), profile.format(source=tiny_model))
    made.start_again()
    made.wait_routed()
    yield made
    made.destroy()


def ask(box: MockBox, *annotations: str, **settings: Any) -> tuple[str, dict[str, str]]:
    """The answer, and who gave it."""
    nvext = {"annotations": list(annotations), "ignore_eos": True, "extra_fields": ["worker_id"]}
    wanted = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, **settings}
    answer = box.client().completions.create(**wanted, extra_body={"nvext": nvext})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 30)
    return answer.choices[0].text, (answer.model_extra or {})["nvext"]


def workers(box: MockBox) -> list[dict[str, Any]]:
    return [each for each in box.ps()["processes"] if each["kind"] == "worker"]


def pids(box: MockBox) -> set[int]:
    return {worker["pid"] for worker in workers(box)}


def in_use(box: MockBox) -> bool:
    reports = [worker["figures"] for worker in workers(box)]
    return any(report is None or report["running"] or report["kv_blocks_used"] for report in reports)


@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "seed": 6}], ids=["greedy", "seeded"])
def test_the_client_reads_the_same_whatever_befalls_a_leg(box: MockBox, way: dict[str, Any]) -> None:
    undisturbed, by = ask(box, **way)
    assert ".prefill." in by["prefill_worker_id"]
    assert ".decode." in by["worker_id"]
    for fault in ("fail_handover", "fail_takeover", *(f"crash:at={point}" for point in DEADLY)):
        before, deaths = pids(box), int(fault.startswith("crash"))
        assert ask(box, f"mock:{fault}", **way)[0] == undisturbed, fault
        eventually(lambda before=before, deaths=deaths: len(before - pids(box)) == deaths, f"{fault} took place")
        box.wait_ready()
    eventually(lambda: not in_use(box), "nothing is held")
