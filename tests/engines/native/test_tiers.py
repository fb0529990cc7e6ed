"""The native engine on a real store, with the tiny float64 model: equal means equal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from native_harness import RunningEngine, worker_spec
from store_peers import Store

from dynamo_box.protocol.spec import Offload, WorkerSpec

BLOCK_BYTES = 2 * 2 * 2 * 4 * 8 * 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


def spec_on(store: Store, model: Path, name: str = "worker", blocks: int = 128, **changes: Any) -> WorkerSpec:
    return worker_spec(
        model, name=name, run_dir=str(store.run.root), kvstore="kvstore", kv_bytes=blocks * BLOCK_BYTES, **changes
    )


def prompts(count: int, length: int = 200, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 288) for _ in range(length)] for _ in range(count)]


def test_what_one_worker_computed_another_loads(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        asked = prompts(4)
        settings: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
        async with RunningEngine(spec_on(store, tiny_model, "first")) as first:
            await first.until(lambda tiers: not tiers.connected, "it is connected")
            expected = await first.generate_all(asked, **settings)
            told = await first.settled()
            assert told.offloaded == 4 * 14
            assert told.offloaded_bytes == 4 * 14 * BLOCK_BYTES
            assert not any(answer.cached_tokens for answer in expected)
        async with RunningEngine(spec_on(store, tiny_model, "second")) as second:
            await second.until(lambda tiers: not tiers.connected, "it is connected")
            answers = await second.generate_all(asked, **settings)
            assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
            assert [answer.cached_tokens for answer in answers] == [192] * 4
            tiers = second.tiers
            assert (tiers.host.matched, tiers.host.loaded) == (4 * 192, 4 * 192)
            assert (tiers.host.failed, tiers.host.wasted, tiers.loads) == (0, 0, 4)
            assert second.engine.figures().cached_tokens == 4 * 192

    asyncio.run(scenario())
