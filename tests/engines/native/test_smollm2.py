"""The embedded model, in float32 and in bfloat16: token for token what transformers generates.

Near ties, where rounding decides, are excused, counted and printed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from native_harness import MIB, Answer, RunningEngine, worker_spec
from reference import NEAR_TIE, Greedy, Reference, divergence
from tokenizers import Tokenizer

from dynamo_box.kv.hashing import isolation_key
from engines.native.sampler import draw, keep_nucleus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEAR_BOUNDARY = 1e-4
"""float32 only: a draw closer than this to a boundary of the distribution may fall on either side."""

BFLOAT16_NEAR_TIE = 0.5
"""Two steps of a logit between 32 and 64, where this model's best ones are."""

PROMPTS = (
    "The capital of France is",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
    "List three fruits and their colours.",
    "Once upon a time, in a village by the river,",
    "What is 17 times 3?",
    "SELECT name, age FROM users WHERE",
    "Der schnelle braune Fuchs springt über",
    "日本の首都は",
    '{"name": "Ada", "born":',
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "x",
    "Q: Who wrote Hamlet?\nA:",
    "🙂 means",
    "Repeat after me: repeat after me: repeat after me:",
    "Summarise: " + "The engine keeps its keys and values in blocks of sixteen tokens. " * 12,
)


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> list[list[int]]:
    """Every other one as a chat, whose system prompt they share."""
    tokenizer = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    chat = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    texts = [chat.replace("{}", text) if number % 2 else text for number, text in enumerate(PROMPTS)]
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    return Reference(smollm2_path, torch.float32)


def cold(name: str) -> bytes:
    """An isolation key under which nothing is cached yet."""
    return isolation_key(name, block_size=16, kv_dtype="float32")


def excused(case: str, reference: Reference, prompts: Sequence[list[int]], answers: Sequence[Answer]) -> int:
    """How many answers hold a token that isn't the reference's best but ties with it nearly; any other token fails."""
    count = 0
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        shortfalls = reference.shortfalls(prompt, answer.tokens)
        if any(shortfalls):
            print(
                f"{case}: prompt {number} differs by {max(shortfalls):.2e} at token {shortfalls.index(max(shortfalls))}"
            )
            assert max(shortfalls) < NEAR_TIE
            count += 1
    return count


@pytest.mark.parametrize(("count", "length"), [(8, 24), pytest.param(len(PROMPTS), 64, marks=pytest.mark.soak)])
def test_greedy_is_what_transformers_generates(
    smollm2_path: Path, prompts: list[list[int]], reference: Reference, count: int, length: int
) -> None:
    """Prompts in a batch, every fifth of them alone as well, each cold and with prefix hits; the longest is one."""
    prompts = prompts[-count:]
    hits = [(len(prompt) - 1) // 16 * 16 for prompt in prompts]
    lone = range(1, len(prompts), 5)
    with_hits = [number for number in lone if hits[number]]
    settings: dict[str, Any] = {"max_tokens": length, "ignore_eos": True}

    async def scenario() -> None:
        async with RunningEngine(worker_spec(smollm2_path, kv_bytes=600 * MIB)) as engine:
            together = await engine.generate_all(prompts, isolation=cold("batch"), **settings)
            again = await engine.generate_all(prompts, isolation=cold("batch"), **settings)
            alone = [await engine.generate(prompts[number], isolation=cold(str(number)), **settings) for number in lone]
            warm = [
                await engine.generate(prompts[number], isolation=cold(str(number)), **settings) for number in with_hits
            ]
        assert {len(answer.tokens) for answer in (*together, *again, *alone, *warm)} == {length}
        assert not any(answer.cached_tokens for answer in (*together, *alone))
        assert [answer.cached_tokens for answer in again] == hits
        assert [answer.cached_tokens for answer in warm] == [hits[number] for number in with_hits]
        counts = {
            "batch": excused("batch", reference, prompts, together),
            "batch, hits": excused("batch, hits", reference, prompts, again),
            "alone": excused("alone", reference, [prompts[number] for number in lone], alone),
            "alone, hits": excused("alone, hits", reference, [prompts[number] for number in with_hits], warm),
        }
        print(f"excused near ties of {len(prompts)} prompts ({len(lone)} alone, {len(with_hits)} with hits): {counts}")

    asyncio.run(scenario())


def test_greedy_in_bfloat16_is_what_transformers_generates_in_it(smollm2_path: Path, prompts: list[list[int]]) -> None:
    """In a batch and alone: bfloat16 rounds so much that few tokens of another arithmetic
    would be the same.
    """
    chosen, settings = [prompts[number] for number in (0, 4, 16)], {"max_tokens": 12, "ignore_eos": True}

    async def scenario() -> list[Answer]:
        async with RunningEngine(worker_spec(smollm2_path, kv_bytes=100 * MIB, options={"dtype": "bfloat16"})) as one:
            together = await one.generate_all(chosen, isolation=cold("batch"), **settings)
            return [*together, await one.generate(chosen[1], isolation=cold("alone"), **settings)]

    answers = asyncio.run(scenario())
    reference = Reference(smollm2_path, torch.bfloat16)
    short = [reference.shortfalls(p, a.tokens) for p, a in zip((*chosen, chosen[1]), answers, strict=True)]
    print(f"short of the best one by, where they differ: {[[gap for gap in each if gap] for each in short]}")
    assert max(max(each) for each in short) <= BFLOAT16_NEAR_TIE
    assert sum(gap > 0 for each in short for gap in each) <= 4, "of 48 tokens"


def test_a_seed_repeats_among_neighbours(smollm2_path: Path, prompts: list[list[int]], reference: Reference) -> None:
    """The same tokens alone and in a batch, but for draws that fall on a boundary."""
    temperature, top_p = 0.8, 0.9
    settings: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
    settings |= {"temperature": temperature, "top_p": top_p}

    def distance(tokens: list[int], seed: int) -> float:
        """From the draw for the token after `tokens` to the nearest boundary."""
        probabilities = torch.softmax(reference.next_logits(tokens) / temperature, dim=-1)
        keep_nucleus(probabilities, top_p)
        cumulative = probabilities.cumsum(dim=0, dtype=torch.float64)
        return float((cumulative / cumulative[-1] - draw(seed, len(tokens))).abs().min())

    async def scenario() -> None:
        async with RunningEngine(worker_spec(smollm2_path, kv_bytes=600 * MIB)) as engine:
            chosen = prompts[:6]
            alone = [await engine.generate(p, seed=n, **settings) for n, p in enumerate(chosen)]
            beside = await asyncio.gather(
                *(engine.generate(p, seed=n, **settings) for n, p in enumerate(chosen)),
                *(engine.generate(p, **settings) for p in prompts[6:]),
            )
        near = 0
        for seed, (prompt, one, other) in enumerate(zip(chosen, alone, beside, strict=False)):
            place = divergence(Greedy(one.tokens, []), other.tokens)
            if place is not None:
                assert distance(prompt + one.tokens[:place], seed) < NEAR_BOUNDARY
                near += 1
        print(f"excused draws on a boundary: {near} of {len(chosen)}")

    asyncio.run(scenario())


def test_the_capital_of_france_is_paris(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    prompt = "<|im_start|>user\nThe capital of France is<|im_end|>\n<|im_start|>assistant\n"

    async def scenario() -> Answer:
        async with RunningEngine(worker_spec(smollm2_path, kv_bytes=100 * MIB)) as engine:
            return await engine.generate(tokenizer.encode(prompt, add_special_tokens=False).ids)

    answer = asyncio.run(scenario())
    assert tokenizer.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.finish == "stop"
