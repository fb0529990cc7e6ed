"""The whole engine on a tiny float64 model, where equal means equal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fakes.tiny_model import IM_END_ID, make_tiny_llama
from native_harness import DEADLINE_S, ISOLATION, Held, RunningEngine, worker_spec
from reference import Reference

from dynamo_box.kv.hashing import chain_digests, isolation_key
from dynamo_box.protocol.request import pack_tokens
from engines.contract import EngineInfo, RequestRejected
from engines.native.runner import Runner

LENGTH = 64
BLOCK_BYTES = 2 * 2 * 2 * 4 * 8 * 16  # layers × (K, V) × heads × head size × float64 × block size


def varied_prompts(count: int = 20, longest: int = 200) -> list[list[int]]:
    """Lengths on, just before and just after block boundaries among them; some share a beginning."""
    rng = random.Random(7)
    shared = [rng.randrange(3, 288) for _ in range(longest)]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, *(rng.randrange(1, longest) for _ in range(count))]
    prompts = []
    for number, length in enumerate(lengths[:count]):
        own = [rng.randrange(3, 288) for _ in range(length)]
        prompts.append(shared[: length // 2] + own[length // 2 :] if number % 2 else own)
    return prompts


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Iterator[list[list[int]]]:
    reference = Reference(tiny_model, torch.float64)
    yield [reference.greedy(prompt, LENGTH).tokens for prompt in varied_prompts()]


@pytest.mark.parametrize("chunk", [32, 2048], ids=["chunked", "whole"])
def test_greedy_is_what_transformers_generates(tiny_model: Path, expected: list[list[int]], chunk: int) -> None:
    """Alone and in a batch, cold and with prefix hits, prompts at once or in chunks."""

    async def scenario() -> None:
        spec = worker_spec(tiny_model, options={"max_batch_tokens": chunk})
        async with RunningEngine(spec) as engine:
            prompts = varied_prompts()
            together = await engine.generate_all(prompts, max_tokens=LENGTH, ignore_eos=True)
            assert [answer.tokens for answer in together] == expected
            again = await engine.generate_all(prompts, max_tokens=LENGTH, ignore_eos=True)
            assert [answer.tokens for answer in again] == expected
            assert [answer.cached_tokens for answer in again] == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]
            for number, prompt in enumerate(prompts):
                other = isolation_key(f"cold {number}", block_size=16, kv_dtype="float64")
                cold = await engine.generate(prompt, max_tokens=LENGTH, ignore_eos=True, isolation=other)
                assert (cold.tokens, cold.cached_tokens) == (expected[number], 0)
                warm = await engine.generate(prompt, max_tokens=LENGTH, ignore_eos=True)
                assert warm.tokens == expected[number]
            assert engine.engine.figures().kv_blocks_used == 0

    asyncio.run(scenario())


def test_a_pool_too_small_for_all_preempts_and_still_gives_every_answer(
    tiny_model: Path, expected: list[list[int]]
) -> None:
    async def scenario() -> None:
        spec = worker_spec(tiny_model, kv_bytes=20 * BLOCK_BYTES)
        async with RunningEngine(spec) as engine:
            assert engine.info.kv_blocks_total == 20
            assert engine.info.context_length == 320
            answers = await engine.generate_all(varied_prompts(), max_tokens=LENGTH, ignore_eos=True)
            assert [answer.tokens for answer in answers] == expected
            assert engine.removed
            assert engine.engine.figures().kv_blocks_used == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "variant",
    [
        {"tied": True},
        {"attention_bias": True, "mlp_bias": True},
        {"kv_heads": 4},
        {"kv_heads": 1, "head_dim": 8},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["tied", "biases", "mha", "mqa", "linear-rope", "llama3-rope"],
)
def test_variants_of_the_architecture(tmp_path: Path, variant: dict[str, object]) -> None:
    path = make_tiny_llama(tmp_path / "model", seed=3, **variant)  # type: ignore[arg-type]
    prompts = varied_prompts(6)
    reference = Reference(path, torch.float64)

    async def scenario() -> None:
        async with RunningEngine(worker_spec(path)) as engine:
            answers = await engine.generate_all(prompts, max_tokens=32, ignore_eos=True)
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.tokens == reference.greedy(prompt, 32).tokens

    asyncio.run(scenario())


def test_a_seed_repeats_whatever_runs_beside_it(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:
            prompts = varied_prompts(12)
            settings: dict[str, Any] = {
                "max_tokens": LENGTH,
                "ignore_eos": True,
                "temperature": 1.2,
                "top_p": 0.95,
                "top_k": 80,
            }
            alone = [(await engine.generate(p, seed=n, **settings)).tokens for n, p in enumerate(prompts)]
            beside = await asyncio.gather(
                *(engine.generate(p, seed=n, **settings) for n, p in enumerate(prompts)),
                *(engine.generate(p, **settings) for p in prompts),
            )
            assert [answer.tokens for answer in beside[: len(prompts)]] == alone
            unseeded = [answer.tokens for answer in beside[len(prompts) :]]
            assert all(one != other for one, other in zip(alone, unseeded, strict=True))

    asyncio.run(scenario())


def test_what_ends_a_sequence(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model, context_length=100)) as engine:
            prompt = [53, 81, 79, 71]
            free = (await engine.generate(prompt, max_tokens=40, ignore_eos=True)).tokens
            stop = free[10]
            first = free.index(stop)

            stopped = await engine.generate(prompt, max_tokens=40, stop_token_ids=(stop,))
            assert (stopped.tokens, stopped.finish) == (free[: first + 1], "stop")
            ignored = await engine.generate(prompt, max_tokens=40, stop_token_ids=(stop,), ignore_eos=True)
            assert (ignored.tokens, ignored.finish) == (free, "length")
            later = await engine.generate(prompt, max_tokens=40, stop_token_ids=(stop,), min_tokens=first + 5)
            assert len(later.tokens) >= first + 5
            assert stop not in later.tokens[: first + 5]
            full = await engine.generate([5] * 90, max_tokens=40, ignore_eos=True)
            assert (len(full.tokens), full.finish) == (10, "length")

    asyncio.run(scenario())


def test_the_models_own_end_of_sequence_stops_it(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model", seed=1)

    async def scenario() -> None:
        async with RunningEngine(worker_spec(path)) as engine:
            prompts = [[token] for token in range(3, 120)]
            answers = await engine.generate_all(prompts, max_tokens=200, temperature=1.0)
            ended = [answer for answer in answers if answer.finish == "stop"]
            assert ended
            assert all(answer.tokens.index(IM_END_ID) == len(answer.tokens) - 1 for answer in ended)
            assert all(IM_END_ID not in answer.tokens for answer in answers if answer.finish == "length")

    asyncio.run(scenario())


def test_cancelling_frees_blocks_and_leaves_the_others_alone(tiny_model: Path, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model, max_batch=4)) as engine:
            started = [engine.submit([9, 10, 11], max_tokens=2000, ignore_eos=True) for _ in range(8)]
            _, kept = engine.submit(varied_prompts()[4], max_tokens=LENGTH, ignore_eos=True)
            for key, _ in started:
                engine.engine.cancel(key)
                engine.engine.cancel(key)
            engine.engine.cancel(12345)
            for _, answer in started:
                await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
                assert answer.finish == "cancelled"
            await asyncio.wait_for(kept.ended.wait(), DEADLINE_S)
            assert kept.tokens == expected[4]
            assert engine.engine.figures().kv_blocks_used == 0
            assert engine.engine.figures().running == engine.engine.figures().waiting == 0

    asyncio.run(scenario())


def test_events_name_the_blocks_by_the_boxs_hash(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:
            prompt = varied_prompts()[5] + [7] * 20
            answer = await engine.generate(prompt, max_tokens=30, ignore_eos=True)
            computed = prompt + answer.tokens[:-1]
            digests = chain_digests(pack_tokens(computed), 16, ISOLATION)
            assert set(engine.engine.cached_blocks()) == set(digests)
            assert engine.stored[0].parent == b""
            assert engine.stored[0].digests == tuple(digests[: len(prompt) // 16])
            continued = await engine.generate(computed + [3] * 5, max_tokens=1)
            assert continued.cached_tokens == len(computed) // 16 * 16

    asyncio.run(scenario())


def test_a_higher_priority_is_admitted_first(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model, max_batch=1)) as engine:
            ended: list[str] = []
            held = Held(monkeypatch, "step", Runner)

            async def run(name: str, priority: int) -> None:
                await engine.generate([4, 5, 6], max_tokens=8, ignore_eos=True, priority=priority)
                ended.append(name)

            async with asyncio.TaskGroup() as group:
                for name, priority in (("first", 9), ("low", 0), ("low too", 0), ("high", 5)):
                    group.create_task(run(name, priority))
                await held.until_reached()
                held.go()
            assert ended == ["first", "high", "low", "low too"]

    asyncio.run(scenario())


def test_what_can_never_be_served_is_refused_at_once(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model, kv_bytes=4 * BLOCK_BYTES)) as engine:
            for tokens, settings, complaint in (
                ([], {}, "empty"),
                ([1] * 64, {}, "at most 63"),
                ([288], {}, "vocabulary"),
                ([-1], {}, "vocabulary"),
                ([1], {"max_tokens": 0}, "max_tokens"),
                ([1], {"temperature": -1.0}, "temperature"),
                ([1], {"temperature": float("nan")}, "temperature"),
                ([1], {"top_p": 0.0}, "top_p"),
                ([1], {"isolation": b"x" * 65}, "isolation"),
            ):
                with pytest.raises(RequestRejected, match=complaint):
                    engine.submit(tokens, **settings)
            assert len((await engine.generate([1] * 63, max_tokens=9, ignore_eos=True)).tokens) == 1

    asyncio.run(scenario())


def test_figures_count_what_happened(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model, kv_bytes=100 * BLOCK_BYTES + 5)) as engine:
            await engine.generate([8] * 40, max_tokens=10, ignore_eos=True)
            await engine.generate([8] * 40, max_tokens=10, ignore_eos=True)
            figures = engine.engine.figures()
            assert figures.weights_bytes == 13904 * 8
            assert figures.kv_bytes == 100 * BLOCK_BYTES
            assert (figures.kv_blocks_total, figures.kv_blocks_used, figures.kv_blocks_cached) == (100, 0, 3)
            assert (figures.requests, figures.errors, figures.steps) == (2, 0, 20)
            assert (figures.prompt_tokens, figures.cached_tokens, figures.output_tokens) == (80, 32, 20)
            with pytest.raises(ValueError, match="temperature"):
                engine.engine.set_option("temperature", "1")

    asyncio.run(scenario())


def test_a_start_tells_its_progress_and_then_what_it_is(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:
            size = (tiny_model / "model.safetensors").stat().st_size
            assert ("weights", size, size, "bytes") in engine.progress
            assert engine.progress[-1] == ("warm-up", None, None, "")
            assert engine.info.versions["torch"]
            assert msgspec.json.decode(msgspec.json.encode(engine.info), type=EngineInfo) == engine.info

    asyncio.run(scenario())


def test_a_failure_of_the_compute_thread_is_fatal_with_its_cause(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.native.model import Llama

    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:

            def broken(*_: object) -> torch.Tensor:
                raise RuntimeError("out of memory")

            monkeypatch.setattr(Llama, "forward", broken)
            engine.submit([1, 2, 3])
            assert await asyncio.wait_for(engine.fatal_cause, DEADLINE_S) == "RuntimeError: out of memory"

    asyncio.run(scenario())
