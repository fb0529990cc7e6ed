"""A box of eight GPUs that aren't there, with a 70B model that nobody computes. All else is real, and it says so."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from box_under_test import Box, eventually

pytestmark = pytest.mark.timeout(240)

MODEL = "llama-3.3-70b-instruct"
PREFILL, DECODE = f"{MODEL}.prefill", f"{MODEL}.decode"
GPUS = ("--simulate", "gpu=8x80GiB")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Box]:
    """In its store a tiny model stands for the one whose tokenizer is borrowed."""
    root = tmp_path_factory.mktemp("rehearsal")
    (root / "home").mkdir()
    box = Box(root / "run", root / "home")
    box.dynbox("pull", str(tiny_model), "--name", "smollm2")
    box.up("llama70b-disagg", *GPUS)
    box.wait_routed()
    yield box
    box.destroy()


def health(box: Box) -> dict[str, Any]:
    with urlopen(f"http://127.0.0.1:{box.port}/health", timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def metrics(box: Box) -> str:
    with urlopen(f"http://127.0.0.1:{box.port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def ask(box: Box, words: int, max_tokens: int = 4, text: str = "one two three ") -> Any:
    return box.client().completions.create(
        model=MODEL, prompt=text * (words // 3), max_tokens=max_tokens, temperature=0
    )


def computed(box: Box, name: str) -> int:
    count: int = (box.process(name)["figures"] or {}).get("computed_prompt_tokens", 0)
    return count


def kv(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(box.dynbox("kv", "--json").stdout)
    return found


def there(box: Box) -> int:
    """Blocks that are in both tiers."""
    tiers = kv(box)["tiers"]
    return min(tiers["host"]["blocks"], tiers["disk"]["blocks"])


def tokens_loaded(box: Box, *, but_by: str = "") -> int:
    """By those that live: a worker that is started again counts from 0."""
    return sum(each["host"]["loaded"] for each in kv(box)["workers"] if each["name"] != but_by)


def decision(box: Box) -> dict[str, Any]:
    """The router's latest."""
    found: dict[str, Any] = box.process("router")["figures"]["decisions"][-1]
    return found


def roles(box: Box) -> dict[str, str]:
    return {each["name"]: each["role"] for each in box.ps()["processes"] if each["kind"] == "worker"}


def test_it_is_marked_wherever_somebody_looks(box: Box) -> None:
    assert "SIMULATED: these GPUs are not there" in box.dynbox("ps").stdout.splitlines()[1]
    assert health(box)["simulated"] is True
    assert {device["kind"] for device in box.ps()["devices"]} == {"simulated", "host"}
    assert not any("KV" in disk["purpose"] for disk in box.ps()["disks"])
    assert "SIMULATED" in box.dynbox("top", "--once").stdout.splitlines()[0]
    again = box.up("llama70b-disagg", *GPUS)
    assert "already up" in again.stderr and "SIMULATED" in again.stdout
    assert "(simulated)" in box.dynbox("up", "--profile", "smollm2", "--port", str(box.port), code=1).stderr


def test_a_long_prompt_is_computed_here_and_answered_there(box: Box) -> None:
    eventually(lambda: any(computed(box, name) for name in roles(box)), "what the box has proved itself with counts")
    before = [computed(box, f"{DECODE}.{number}") for number in (0, 1)]
    assert ask(box, 6000).usage.completion_tokens == 4
    eventually(lambda: sum(computed(box, f"{PREFILL}.{number}") for number in (0, 1)) >= 2000, "computed in prefill")
    assert [computed(box, f"{DECODE}.{number}") for number in (0, 1)] == before


def test_tiers_are_rehearsed_and_a_prompt_that_is_there_is_loaded(box: Box) -> None:
    assert box.dynbox("kv").stdout.startswith("SIMULATED: these GPUs are not there")
    before = kv(box)
    assert before["simulated"] and before["directory"] == ""
    assert before["tiers"]["host"]["capacity_bytes"] == 512 << 30
    assert {layout["block_bytes"] for layout in before["layouts"]} == {32 * 327_680}
    ask(box, 6000)
    eventually(lambda: there(box) >= 60, "its blocks are in host memory and on disk")
    eventually(lambda: (box.process("router")["figures"] or {}).get("host_blocks", 0) >= 60, "the router knows of them")
    eventually(lambda: kv(box)["workers"][0]["connected"] == "", "a worker has its tiers")
    ask(box, 6000)
    by_worker: dict[str, Any] = {}

    def decided() -> bool:
        by_worker.update({each["worker"]: each for each in decision(box)["candidates"]})
        return any(each["host_blocks"] >= 60 for each in by_worker.values())

    eventually(decided, "whoever hasn't got it has credit for it")
    owner = max(by_worker, key=lambda name: by_worker[name]["overlap_blocks"])
    assert by_worker[owner]["overlap_blocks"] >= 60 and by_worker[owner]["host_blocks"] == 0
    loaded = tokens_loaded(box, but_by=owner)
    os.kill(box.process(owner)["pid"], signal.SIGKILL)
    ask(box, 6000)
    eventually(lambda: tokens_loaded(box) >= loaded + 60 * 32, "it was loaded")
    box.wait_ready()
    eventually(lambda: 'dynbox_kv_tier_hits_total{tier="host"}' in metrics(box), "the frontend has heard of hits")
    assert "dynbox_simulated 1.0" in metrics(box)


def test_the_store_dies_and_comes_back_empty_and_no_request_fails(box: Box) -> None:
    lives = box.process("kvstore")["restarts"]
    os.kill(box.process("kvstore")["pid"], signal.SIGKILL)
    assert ask(box, 3000, text="four five six ").usage.completion_tokens == 4
    eventually(lambda: box.process("kvstore")["restarts"] > lives, "it was started again")
    box.wait_ready()
    numbers = itertools.count()

    def stored() -> bool:
        """A prompt that is computed before its worker has the store again isn't."""
        ask(box, 3000, text=f"seven eight {next(numbers)} ")
        return there(box) > 0

    eventually(stored, "blocks are stored again")
    eventually(lambda: all(not each["connected"] for each in kv(box)["workers"]), "its workers are back")
    texts = [event["text"] for event in box.ps()["events"]]
    assert sum("it begins empty" in text for text in texts) == 2


def test_policy_and_roles_change_while_it_runs(box: Box) -> None:
    shown = box.dynbox("disagg").stdout
    assert "policy conditional: in two legs go prompts with 1,024 tokens to compute and more" in shown
    assert f"{PREFILL}.0" in shown and "HANDED OVER" in shown
    assert box.dynbox("disagg", "--policy", "strict").stdout == "policy strict, for requests from now on\n"
    eventually(lambda: "policy strict" in box.dynbox("disagg").stdout, "the policy is shown")
    assert "has no thresholds" in box.dynbox("disagg", "--min-uncached-tokens", "5", code=2).stderr
    assert "there is no policy 'sometimes'" in box.dynbox("disagg", "--policy", "sometimes", code=2).stderr
    set_ = json.loads(box.dynbox("disagg", "--policy", "conditional", "--min-uncached-tokens", "64", "--json").stdout)
    assert set_["disagg"].startswith("conditional:min_uncached_tokens=64,")
    eventually(lambda: "with 64 tokens" in box.dynbox("disagg").stdout, "the threshold is shown")

    done = box.dynbox("role", f"{DECODE}.1", "prefill")
    assert done.stdout == f"{DECODE}.1 serves as prefill, was decode\n"
    assert roles(box)[f"{DECODE}.1"] == "prefill"
    both = json.loads(box.dynbox("role", f"{DECODE}.1", "both", "--json").stdout)
    assert (both["role"], both["state"]) == ("aggregated", "ready")
    box.dynbox("role", f"{DECODE}.1", "decode")
    assert "only workers have" in box.dynbox("role", "router", "decode", code=2).stderr
    assert "no process is called" in box.dynbox("role", "nobody", "decode", code=3).stderr


def test_workers_go_and_come_back_to_the_gpus_that_they_left(box: Box) -> None:
    text = box.dynbox("scale", MODEL, "decode", "3", code=2).stderr
    assert "there is no room for 1 more decode worker" in text and "missing" in text
    assert box.dynbox("scale", MODEL, "decode", "1").stdout == f"{MODEL} has 1 decode worker: {DECODE}.1 gone\n"
    assert f"{DECODE}.1" not in roles(box)
    assert box.dynbox("scale", MODEL, "prefill", "3").stdout.endswith(f"{PREFILL}.2 ready\n")
    assert box.process(f"{PREFILL}.2")["device"] == "SIM-06,SIM-07"
    box.dynbox("scale", MODEL, "prefill", "2")
    back = json.loads(box.dynbox("scale", MODEL, "decode", "2", "--json").stdout)
    assert {each["name"]: each["state"] for each in back}[f"{DECODE}.1"] == "ready"
    assert "no model is called" in box.dynbox("scale", "huge", "decode", "2", code=3).stderr


def test_advice_is_measured_and_names_its_command(box: Box) -> None:
    shown = box.dynbox("advise", "--seconds", "1")
    assert shown.stdout.startswith(f"{MODEL}: leave it as it is\n  ") and "measuring" in shown.stderr
    (advice,) = json.loads(box.dynbox("advise", MODEL, "--seconds", "1", "--json").stdout)
    assert (advice["model"], advice["kind"], advice["command"]) == (MODEL, "none", None), "it rests"
    assert any("prefill 0% busy (2 workers), decode 0% busy (2 workers)" in reason for reason in advice["reasons"])
    assert "no model is called" in box.dynbox("advise", "huge", "--seconds", "1", code=3).stderr
    (model,) = box.ps()["models"]
    assert model["targets"] == {"ttft_s": 2.0, "itl_s": 0.05}


def test_a_prefill_worker_dies_and_no_request_does(box: Box) -> None:
    box.dynbox("disagg", "--policy", "fallback")
    answers: list[int] = []

    def work() -> None:
        answers.extend(ask(box, 3000 + number, 8).usage.completion_tokens for number in range(6))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(answers) >= 4, "some have been answered")
    for number in (0, 1):
        os.kill(box.process(f"{PREFILL}.{number}")["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert answers == [8] * 24
    box.wait_ready()
