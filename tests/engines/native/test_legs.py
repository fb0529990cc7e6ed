"""Requests in two legs: a prefill engine, a decode engine and a real store between them; equal means equal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from native_harness import Answer, RunningEngine, worker_spec
from store_peers import Store
from test_tiers import engine_on, prompts, store, tokens_of  # noqa: F401  `store` is a fixture

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import Transfer
from engines.contract import DISAGG

pytestmark = pytest.mark.slow

GREEDY: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 1.1, "top_p": 0.9, "seed": 7}


@asynccontextmanager
async def two(store: Store, model: Path, **changes: Any) -> AsyncIterator[tuple[RunningEngine, RunningEngine]]:  # noqa: F811
    async with (
        engine_on(store, model, "prefill", **changes) as first,
        engine_on(store, model, "decode", **changes) as second,
    ):
        yield first, second


async def whole(model: Path, asked: list[list[int]], **settings: Any) -> list[list[int]]:
    async with RunningEngine(worker_spec(model, threads=1)) as alone:
        return tokens_of(await alone.generate_all(asked, **settings))


def figures(engine: RunningEngine) -> WorkerFigures:
    return engine.engine.figures()


async def prefill(engine: RunningEngine, prompt: list[int], **settings: Any) -> Transfer:
    answer = await engine.generate(prompt, leg="prefill", **settings)
    return handed_over(answer, prompt)


def handed_over(answer: Answer, prompt: list[int]) -> Transfer:
    first, last = answer.outputs
    assert (len(first.tokens), first.finish, first.transfer) == (1, None, None)
    assert (last.tokens, last.finish, last.error) == ((), "prefilled", "")
    assert last.transfer is not None
    assert last.transfer.tokens == len(prompt)
    assert bool(last.transfer.partial) == bool(len(prompt) % 16)
    return last.transfer


async def in_two_legs(
    first: RunningEngine, second: RunningEngine, prompt: list[int], **settings: Any
) -> tuple[list[int], Answer]:
    """The tokens of both, and the second answer."""
    answer = await first.generate(prompt, leg="prefill", **settings)
    transfer = handed_over(answer, prompt)
    rest = {**settings, "max_tokens": settings["max_tokens"] - 1}
    going_on = await second.generate(prompt + answer.tokens, leg="decode", transfer=transfer, **rest)
    return answer.tokens + going_on.tokens, going_on


@pytest.mark.parametrize("settings", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_two_legs_say_what_one_would(tiny_model: Path, store: Store, settings: dict[str, Any]) -> None:  # noqa: F811
    lengths = [1, 15, 16, 17, 31, 32, 33, 200, 700]
    asked = [prompts(1, length=length, seed=length)[0] for length in lengths]

    async def scenario() -> None:
        expected = await whole(tiny_model, asked, **settings)
        async with two(store, tiny_model, options={"max_batch_tokens": 96}) as (first, second):
            assert DISAGG in first.info.capabilities
            for prompt, wanted in zip(asked, expected, strict=True):
                tokens, going_on = await in_two_legs(first, second, prompt, must_transfer=True, **settings)
                assert tokens == wanted
                assert going_on.cached_tokens == len(prompt)
            prefilling, decoding = figures(first), figures(second)
            total = sum(lengths)
            assert (prefilling.computed_prompt_tokens, decoding.computed_prompt_tokens) == (total, 0)
            assert (prefilling.handed_over, prefilling.transfers_failed) == (len(asked), 0)
            assert (decoding.taken_over, decoding.transfers_failed) == (len(asked), 0)
            assert (decoding.prompt_tokens, decoding.cached_tokens) == (total, total)
            assert prefilling.handover_seconds > 0
            assert prefilling.busy_s > 0
            assert prefilling.kv_blocks_used == decoding.kv_blocks_used == 0
        store.figures_when(lambda figures: figures.leases == 0)

    asyncio.run(scenario())
