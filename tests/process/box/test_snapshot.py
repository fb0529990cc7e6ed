"""What a running box says of its machine and its models."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from box_under_test import Box, eventually
from mock_box import PROFILE, MockBox


def ask(client: openai.OpenAI, number: int, tokens: int) -> None:
    client.completions.create(model="tiny", prompt=f"{number} word", max_tokens=tokens, extra_body={"ignore_eos": True})


def test_host_and_disks_are_read_in_the_background(mock_box: Box) -> None:
    state = eventually(lambda: (now := mock_box.ps())["host"] and now["disks"] and now, "they were read")
    host = state["host"]
    assert 0 < host["box_bytes"] < host["used_bytes"] <= state["host_memory_bytes"]
    assert sum(disk["purpose"].count("models") for disk in state["disks"]) == 1
    assert all(device["figures"] is None for device in state["devices"] if device["kind"] in ("host", "simulated"))


def test_a_model_is_idle_since_its_last_request_ended(mock_box: Box) -> None:
    def idle_s() -> float | None:
        idle: float | None = mock_box.ps()["models"][0]["idle_s"]
        return idle

    with mock_box.client(timeout=120).completions.create(
        model="tiny", prompt="1 word", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ):
        eventually(lambda: idle_s() == 0.0, "a request runs")
    before = eventually(idle_s, "it is idle")
    os.kill(mock_box.process("frontend")["pid"], signal.SIGKILL)
    eventually(lambda: mock_box.process("frontend")["restarts"] == 1, "its end was noticed")
    mock_box.wait_ready()
    after = idle_s()
    assert after is not None and after > before, "another frontend doesn't make it forget"


@pytest.fixture
def small_box(tmp_path: Path, tiny_model: Path) -> Iterator[MockBox]:
    """KV pools that four long answers fill, and that take their time to be given back."""
    profile = PROFILE.replace("decode_ms: 2", "decode_ms: 20").replace("kv_blocks: 1024", "kv_blocks: 256")
    box = MockBox(tmp_path, profile.format(source=tiny_model))
    box.start_again()
    yield box
    box.destroy()


def test_a_full_kv_pool_that_requests_wait_for_is_an_event(small_box: MockBox) -> None:
    client = small_box.client(timeout=100)

    def events() -> list[dict[str, str]]:
        return [each for each in small_box.ps()["events"] if each["text"].startswith("KV pool ")]

    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(ask, client, number, 1000) for number in range(64)]
        (event, *_) = eventually(events, "the pool was full for a while")
        small_box.dynbox("down", "--drain", "0")
        for each in asked:
            each.exception(120)
    assert event["level"] == "warning"
    assert str(event["process"]).startswith("tiny.aggregated.")
    assert event["text"].endswith("requests wait")
