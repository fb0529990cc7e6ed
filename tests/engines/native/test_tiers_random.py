"""Random requests with shared prefixes on tiny tiers, token for token what an engine without tiers answers.

A thousand on the tiny float64 model in each run of the suite, ten thousand under the mark `soak`; on SmolLM2 thirty and
two hundred, where near ties are excused as in `test_smollm2.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from native_harness import DEADLINE_S, MIB, Answer, RunningEngine, worker_spec
from reference import NEAR_TIE, Reference
from store_peers import Store, room_for
from tokenizers import Tokenizer

from dynamo_box.kv.hashing import isolation_key
from dynamo_box.protocol.figures import WorkerFigures, WorkerTiers
from dynamo_box.protocol.kv import KvLayout
from dynamo_box.protocol.spec import WorkerSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

BLOCK = 16
AT_ONCE = 12
TINY_BLOCK_BYTES = 2 * 2 * 2 * 4 * 8 * BLOCK
SMOLLM2_BLOCK_BYTES = 30 * 2 * 3 * 64 * 4 * BLOCK
AT_LEAST = 0.2
"""Of all prompt tokens, from host memory and from disk each."""


@dataclass(frozen=True)
class Ask:
    """`cancel_after` tokens the client goes away."""

    prompt: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    cancel_after: int | None = None


def tree_of_prompts(
    rng: random.Random, vocabulary: Sequence[int], fan_out: Sequence[int], blocks: int
) -> list[list[int]]:
    """Every level adds so many different continuations of `blocks` blocks to each chain of the level before."""
    chains: list[list[int]] = [[]]
    for count in fan_out:
        chains = [chain + rng.choices(vocabulary, k=blocks * BLOCK) for chain in chains for _ in range(count)]
    return chains


def random_asks(rng: random.Random, count: int) -> list[Ask]:
    """Prompts are chains of a tree, cut anywhere, mostly with something of their own at the end."""
    chains = tree_of_prompts(rng, range(3, 288), (6, 5, 4), 3)
    isolations = [
        isolation_key("random", block_size=BLOCK, kv_dtype="float64", cache_salt=salt) for salt in (None, "s")
    ]
    asks = []
    for number in range(count):
        chain = rng.choice(chains)
        cut = len(chain) if rng.random() < 0.7 else rng.randrange(1, len(chain))
        prompt = chain[:cut] + rng.choices(range(3, 288), k=rng.randrange(20) or 1)
        settings: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 20),
            "isolation": isolations[rng.random() < 0.1],
            "priority": rng.randrange(3),
            "kv_priority": rng.choice((None, 0, 50, 100)),
            "ignore_eos": True,
        }
        if rng.random() < 0.3:
            settings |= {"temperature": 1.1, "seed": number, "top_p": 0.9}
        asks.append(Ask(prompt, settings, rng.randrange(6) if rng.random() < 0.05 else None))
    return asks


async def answer_all(engine: RunningEngine, asks: Sequence[Ask], at_once: int) -> list[Answer]:
    gate = asyncio.Semaphore(at_once)

    async def answer(ask: Ask) -> Answer:
        async with gate:
            key, answer = engine.submit(ask.prompt, **ask.settings)
            if ask.cancel_after is not None:
                while len(answer.tokens) < ask.cancel_after and not answer.ended.is_set():
                    await asyncio.sleep(0)
                engine.engine.cancel(key)
            await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
            return answer

    return list(await asyncio.gather(*(answer(ask) for ask in asks)))


async def with_tiers(spec: WorkerSpec, asks: Sequence[Ask], at_once: int) -> tuple[list[Answer], WorkerFigures]:
    async with RunningEngine(spec) as engine:
        await engine.until(lambda tiers: not tiers.connected, "they are connected")
        answers = await answer_all(engine, asks, at_once)
        await engine.settled()
        await engine.until(all_counted, "what became of every lease is counted")
        return answers, engine.engine.figures()


async def without_tiers(spec: WorkerSpec, asks: Sequence[Ask], at_once: int) -> list[Answer]:
    async with RunningEngine(spec) as engine:
        return await answer_all(engine, asks, at_once)


def all_counted(tiers: WorkerTiers) -> bool:
    return all(use.matched == use.loaded + use.failed + use.wasted for use in (tiers.host, tiers.disk))


def supplied(figures: WorkerFigures, asks: Sequence[Ask]) -> str:
    """Check that both tiers had their part, and put it into words."""
    tiers = figures.tiers
    assert tiers is not None
    total = sum(len(ask.prompt) for ask in asks)
    parts = {"host": tiers.host.loaded / total, "disk": tiers.disk.loaded / total}
    words = f"{len(asks)} requests, {total} prompt tokens, loaded {parts}, reused {figures.cached_tokens / total:.2f}"
    print(f"{words}; dropped {tiers.dropped}, failed {tiers.host.failed} + {tiers.disk.failed}")
    assert min(parts.values()) >= AT_LEAST, words
    assert figures.kv_blocks_used == 0
    return words


def store_for(tmp_path: Path, block_bytes: int, host_blocks: int, disk_blocks: int) -> Store:
    """Tiers of so many blocks."""
    layout = KvLayout("", "", BLOCK, block_bytes, "")
    return Store(
        tmp_path,
        host_bytes=room_for(host_blocks, layout),
        disk_bytes=disk_blocks * (layout.slot_bytes + 8192),
        directory=str(tmp_path / "disk"),
    )


@pytest.mark.usefixtures("loads_whatever_there_is")
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_tiny_tiers_change_no_token(tiny_model: Path, tmp_path: Path, count: int) -> None:
    """The pool holds two or three prompts, host memory a tenth of all, the disk most."""
    asks = random_asks(random.Random(count), count)
    alone = worker_spec(tiny_model, threads=1, kv_bytes=3000 * TINY_BLOCK_BYTES)
    expected = asyncio.run(without_tiers(alone, asks, AT_ONCE))
    store = store_for(tmp_path, TINY_BLOCK_BYTES, host_blocks=150, disk_blocks=1000)
    try:
        place = {"run_dir": str(store.run.root), "kvstore": "kvstore"}
        spec = worker_spec(tiny_model, threads=1, kv_bytes=40 * TINY_BLOCK_BYTES, **place)
        answers, figures = asyncio.run(with_tiers(spec, asks, AT_ONCE))
    finally:
        store.close()
    for ask, wanted, answer in zip(asks, expected, answers, strict=True):
        length = min(len(answer.tokens), len(wanted.tokens)) if ask.cancel_after is not None else len(wanted.tokens)
        assert answer.tokens[:length] == wanted.tokens[:length]
        assert ask.cancel_after is not None or answer.finish == "length"
    supplied(figures, asks)


@pytest.mark.usefixtures("loads_whatever_there_is")
@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.soak)])
def test_smollm2_says_the_same_but_for_near_ties(smollm2_path: Path, tmp_path: Path, count: int) -> None:
    rng = random.Random(count)
    tokenizer = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    words = [word for word in sorted(tokenizer.get_vocab()) if word.startswith("Ġ") and word[1:].isalpha()]
    vocabulary = [tokenizer.token_to_id(word) for word in words]
    chains = tree_of_prompts(rng, vocabulary, (6,), 6)
    asks = [
        Ask(rng.choice(chains) + rng.choices(vocabulary, k=rng.randrange(1, 20)), {"max_tokens": 8, "ignore_eos": True})
        for _ in range(count)
    ]
    store = store_for(tmp_path, SMOLLM2_BLOCK_BYTES, host_blocks=20, disk_blocks=100)
    try:
        place = {"run_dir": str(store.run.root), "kvstore": "kvstore"}
        spec = worker_spec(smollm2_path, kv_bytes=9 * SMOLLM2_BLOCK_BYTES, **place)
        answers, figures = asyncio.run(with_tiers(spec, asks, 1))
    finally:
        store.close()
    expected = asyncio.run(without_tiers(worker_spec(smollm2_path, kv_bytes=300 * MIB), asks, 2))
    supplied(figures, asks)
    differ = [(ask, answer) for ask, answer, wanted in zip(asks, answers, expected, strict=True)
              if answer.tokens != wanted.tokens]  # fmt: skip
    if differ:
        reference = Reference(smollm2_path, torch.float32)
        shortfalls = [max(reference.shortfalls(ask.prompt, answer.tokens)) for ask, answer in differ]
        print(f"excused near ties: {len(differ)} of {count}, by at most {max(shortfalls):.2e}")
        assert max(shortfalls) < NEAR_TIE
