"""Timing, vocabulary and options of the mock."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from worker_process import asks, worker, worker_spec

from engines.contract import EngineError
from engines.mock.options import MockOptions, parse_options, pool_blocks
from engines.mock.timing import Step, step_seconds
from engines.mock.tokens import ordinary_tokens


def test_a_step_takes_its_prompt_tokens_and_one_token_time() -> None:
    options = MockOptions(prefill_tokens_per_s=1000, decode_ms=20)
    assert step_seconds(options, Step()) == 0
    assert step_seconds(options, Step(100)) == pytest.approx(0.1)
    assert step_seconds(options, Step(0, 7, kv_tokens=7000)) == pytest.approx(0.02)
    assert step_seconds(options, Step(100, 1)) == pytest.approx(0.12)
    assert step_seconds(MockOptions(prefill_tokens_per_s=1000, speedup=10), Step(100)) == pytest.approx(0.01)
    assert step_seconds(MockOptions(speedup="infinite"), Step(100, 5)) == 0


def test_a_worker_keeps_to_its_rates(tmp_path: Path) -> None:
    timing = {"speedup": 1, "decode_ms": 5, "prefill_tokens_per_s": 10_000}
    with worker(tmp_path / "run", options=timing) as process, process.peer() as peer:
        started = time.monotonic()
        for number in range(2):
            peer.run(list(range(number, number + 2000)), stream=number, max_tokens=101)
        figures = process.figures(lambda figures: figures.output_tokens == 202)
        assert figures.busy_s == pytest.approx(2 * (0.2 + 100 * 0.005))
        assert time.monotonic() - started >= figures.busy_s - 0.01, "never faster"


def test_neighbours_share_a_step(tmp_path: Path) -> None:
    timing = {"speedup": 1, "decode_ms": 5}
    with worker(tmp_path / "run", options=timing) as process, process.peer() as peer:
        started = time.monotonic()
        peer.send_together(asks(stream, [stream] * 10, max_tokens=60) for stream in range(20))
        peer.finish(*range(20))
        assert time.monotonic() - started >= 0.29, "never faster"
        assert process.figures(lambda each: each.output_tokens == 1200).busy_s < 3, "one after the other takes 6 s"


def test_tokens_are_ordinary_ones_of_the_models_vocabulary(tmp_path: Path) -> None:
    assert ordinary_tokens(tmp_path, 32_000) == range(256, 32_000)
    assert ordinary_tokens(tmp_path, 100) == range(100)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50_000, "more": {}}))
    assert ordinary_tokens(tmp_path, 100) == range(256, 50_000)
    special = [{"id": number, "content": f"<{number}>", "special": True} for number in (0, 1, 2, 49_990, 60_000)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": special, "model": {}}))
    assert ordinary_tokens(tmp_path, 100) == range(3 + 256, 49_990)


def test_the_output_stays_within_the_vocabulary(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options={"vocab_size": 50}) as process, process.peer() as peer:
        tokens, _ = peer.run([1, 2, 3], max_tokens=500)
        assert set(tokens) <= set(range(50))
        assert len(set(tokens)) > 25, "and is not the same token over and over"


def test_stop_after_ends_every_sequence_by_itself(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options={"stop_after": 3}) as process, process.peer() as peer:
        tokens, last = peer.run([1, 2, 3], max_tokens=500)
        assert (len(tokens), last.finish) == (3, "stop")


def test_the_pool_is_as_large_as_the_option_or_the_plan_says(tmp_path: Path) -> None:
    spec = worker_spec(tmp_path, kv_bytes=1_000_000)
    assert pool_blocks(MockOptions(kv_blocks=7), spec) == 7
    assert pool_blocks(MockOptions(kv_bytes_per_token=1000), spec) == 1_000_000 // (1000 * 16)
    with pytest.raises(EngineError, match="not even one block"):
        pool_blocks(MockOptions(kv_bytes_per_token=1_000_000), spec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decode_msec": 3}, "no option 'decode_msec'"),
        ({"decode_ms": "fast"}, "decode_ms"),
        ({"speedup": 0}, "speedup must be above 0"),
        ({"speedup": "finite"}, "speedup"),
        ({"prefill_tokens_per_s": -1}, "prefill_tokens_per_s"),
        ({"kv_blocks": 0}, "kv_blocks must be above 0, not 0"),
        ({"width": -1}, "width must be at least 0, not -1"),
        ({"memory_efficiency": 1.5}, "memory_efficiency must be at most 1, not 1.5"),
        ({"tensor_parallel": 0}, "tensor_parallel must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_for_good(options: dict[str, str | int], says: str) -> None:
    with pytest.raises(EngineError, match=says) as raised:
        parse_options(options)
    assert raised.value.permanent
