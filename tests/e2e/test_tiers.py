"""KV tiers of real boxes with the real model: what comes back after sleep, restart and death; who keeps out whom."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from box_under_test import Box, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODEL = "smollm2"
WORKER = "smollm2.aggregated.0"
BLOCK = 16
PROMPT = "A story about numbers, told one after the other: " + " ".join(map(str, range(100, 150)))
THRESHOLD = "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY"


def ask(box: Box, prompt: str = PROMPT, **more: Any) -> tuple[str, int, int]:
    """(answer, prompt tokens, cached of them)."""
    with box.client(timeout=120) as client:
        done = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=4, temperature=0, extra_body={"ignore_eos": True, **more}
        )
    usage = done.usage
    assert usage is not None and usage.completion_tokens == 4
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return done.choices[0].text, usage.prompt_tokens, cached or 0


def kv(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(box.dynbox("kv", "--json").stdout)
    return found


def tiers_of_worker(box: Box) -> dict[str, Any]:
    figures = box.process(WORKER)["figures"]
    return dict(figures["tiers"]) if figures and figures["tiers"] else {}


def store(box: Box) -> dict[str, Any]:
    figures = box.process("kvstore")["figures"]
    return dict(figures) if figures else {}


def held(box: Box, tier: str) -> int:
    """Blocks that the store says it has there."""
    figures = store(box)
    return int(figures[tier]["blocks"]) if figures else 0


def until_on_disk(box: Box, blocks: int) -> None:
    """Whatever was offloaded has gone through."""
    eventually(lambda: held(box, "host") >= blocks, f"{blocks} blocks in host memory")
    eventually(lambda: held(box, "disk") >= blocks, f"{blocks} blocks on disk")


@pytest.fixture
def neighbour(tmp_path: Path, box: Box) -> Iterator[Box]:
    """A second box with the home of `box`."""
    made = Box(tmp_path / "neighbour", box.home)
    yield made
    made.destroy()


def test_a_prompt_is_computed_once_whatever_happens_to_the_box(box: Box, neighbour: Box) -> None:
    box.up()
    eventually(lambda: tiers_of_worker(box).get("connected") == "", "the worker has its tiers")
    answer, prompt_tokens, cached = ask(box)
    whole = prompt_tokens // BLOCK * BLOCK
    assert (cached, whole > 10 * BLOCK) == (0, True)
    until_on_disk(box, whole // BLOCK)

    box.dynbox("sleep", MODEL)
    box.dynbox("wake", MODEL)
    assert ask(box) == (answer, prompt_tokens, whole), "from host memory: the pool was given back"
    eventually(lambda: tiers_of_worker(box)["host"]["loaded"] == whole, "the worker says where it came from")
    assert ask(box, cache_salt="another tenant")[2] == 0

    with ThreadPoolExecutor(4) as many:
        running = [many.submit(ask, box, f"{number}: {PROMPT}") for number in range(8)]
        running[0].result()
        os.kill(box.process("kvstore")["pid"], signal.SIGKILL)
        assert all(len(one.result()[0]) for one in running), "requests go on without the store"
    eventually(lambda: box.process("kvstore")["restarts"] == 1, "its end was noticed")
    box.wait_ready()
    eventually(lambda: held(box, "disk") >= whole // BLOCK, "the new store has read what is on disk")
    eventually(lambda: tiers_of_worker(box).get("connected") == "", "the worker has its tiers again")

    neighbour.env[THRESHOLD] = "50"
    neighbour.up()
    holder = f"pid {box.process('kvstore')['pid']}"
    eventually(lambda: (now := store(neighbour)) and holder in now["disk"]["reason"], "it names the holder")
    words = neighbour.dynbox("ps").stdout
    assert "the disk tier of KV is suspended: " in words, words
    eventually(lambda: tiers_of_worker(neighbour).get("connected") == "", "the worker has a tier")
    assert ask(neighbour, priority=20) == (answer, prompt_tokens, 0), "and serves"
    kept_out = eventually(lambda: (now := tiers_of_worker(neighbour))["filtered"] and now, "blocks were kept out")
    assert kept_out["terminated"]["priority"] == 1
    assert held(neighbour, "host") == 0
    ask(neighbour, priority=50)
    eventually(lambda: held(neighbour, "host") >= whole // BLOCK, "a higher priority is judged anew")
    neighbour.down()

    box.down()
    box.up()
    eventually(lambda: held(box, "disk") >= whole // BLOCK, "the store has read what is on disk")
    eventually(lambda: tiers_of_worker(box).get("connected") == "", "the worker has its tiers")
    assert ask(box) == (answer, prompt_tokens, whole), "from disk: everything else was lost"
    eventually(lambda: tiers_of_worker(box)["disk"]["loaded"] == whole, "the worker says where it came from")
    eventually(lambda: store(box)["disk"]["hits"] >= whole // BLOCK, "the store says so too")
    found = kv(box)
    assert found["tiers"]["disk"]["hit_rate"] == 1.0
    assert (found["workers"][0]["disk"]["loaded"], found["workers"][0]["host"]["loaded"]) == (whole, 0)

    assert "blocks gone from disk" in box.dynbox("kv", "clear").stdout
    eventually(lambda: store(box) and not held(box, "host") + held(box, "disk"), "both tiers are empty")
    assert ask(box)[2] == whole, "what the worker has of its own stays"
