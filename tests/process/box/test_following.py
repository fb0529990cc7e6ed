"""A real box that follows advice by itself: prompts wait for prefill, and a decode worker that rests turns to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from box_under_test import eventually
from mock_box import MockBox

PROFILE = """
model:
  name: tiny
  source: {source}
  engine: mock
  workers: {{prefill: 1, decode: 2}}
  options: {{decode_ms: 1, prefill_tokens_per_s: 600, kv_blocks: 4096}}
  targets: {{ttft: 5ms}}
advise: {{auto: true, lasting: 6s, settle: 1h}}
"""


@pytest.fixture
def box(tmp_path: Path, tiny_model: Path) -> Iterator[MockBox]:
    box = MockBox(tmp_path, PROFILE.format(source=tiny_model))
    box.start_again()
    yield box
    box.destroy()


@pytest.mark.slow
def test_a_decode_worker_that_rests_turns_to_prompts(box: MockBox) -> None:
    over = threading.Event()

    def work(which: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            prompt = [1 + (which * 7919 + number * 104_729 + place * 31) % 200 for place in range(400)]
            box.client().completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(6)]
    for thread in threads:
        thread.start()
    try:
        eventually(
            lambda: [each["role"] for each in box.ps()["processes"] if each["kind"] == "worker"].count("prefill") == 2,
            "a second worker computes prompts",
        )
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    (event,) = [each["text"] for each in box.ps()["events"] if each["text"].startswith("by itself")]
    assert event.startswith("by itself: dynbox role tiny.decode.") and "the target is 5 ms" in event
