"""Requests in two legs: a prefill engine, a decode engine and a real store between them; equal means equal."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from native_harness import DEADLINE_S, ISOLATION, Answer, Held, RunningEngine, worker_spec
from store_peers import Store, room_for
from test_tiers import BLOCK_BYTES, connected, engine_on, prompts, tokens_of

from dynamo_box.kv.client.outbound import OutboundLane
from dynamo_box.kv.hashing import chain_digests
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.kv import LONGEST_HOLD_S, KvLayout
from dynamo_box.protocol.request import Sampling, Transfer, pack_tokens
from engines.contract import DISAGG, EngineInfo, RequestRejected, SequenceRequest
from engines.native.requests import check
from engines.native.runner import Runner

pytestmark = pytest.mark.slow

LAYOUT = KvLayout("", "", 16, BLOCK_BYTES, "")
GREEDY: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 1.1, "top_p": 0.9, "seed": 7}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


@asynccontextmanager
async def two(store: Store, model: Path, **changes: Any) -> AsyncIterator[tuple[RunningEngine, RunningEngine]]:
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
def test_two_legs_say_what_one_would(tiny_model: Path, store: Store, settings: dict[str, Any]) -> None:
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
            assert (prefilling.prompt_tokens, decoding.prompt_tokens, decoding.cached_tokens) == (total, 0, 0)
            assert prefilling.handover_seconds > 0
            assert prefilling.busy_s > 0
            assert prefilling.kv_blocks_used == decoding.kv_blocks_used == 0
        nothing_is_leased(store)

    asyncio.run(scenario())


def test_what_the_decode_engine_has_already_is_not_loaded_again(tiny_model: Path, store: Store) -> None:
    """The full blocks lie in its own pool; the partial last one must come from the other."""

    async def scenario() -> None:
        (prompt,) = prompts(1)
        async with two(store, tiny_model) as (first, second):
            wanted = await second.generate(prompt, **GREEDY)
            before = figures(second).computed_prompt_tokens
            tokens, going_on = await in_two_legs(first, second, prompt, must_transfer=True, **GREEDY)
            assert tokens == wanted.tokens
            assert going_on.cached_tokens == 200
            tiers = await second.until(lambda tiers: tiers.host.loaded > 0, "it is counted")
            assert (tiers.host.loaded, tiers.host.wasted) == (16, 192)
            assert figures(second).computed_prompt_tokens == before
            tokens, _ = await in_two_legs(second, second, prompt, must_transfer=True, **GREEDY)
            assert tokens == wanted.tokens, "both legs on one"
        nothing_is_leased(store)

    asyncio.run(scenario())


def test_a_first_token_that_ends_the_request_ends_it(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        (prompt,) = prompts(1)
        async with engine_on(store, tiny_model) as engine:
            only = await engine.generate(prompt, leg="prefill", max_tokens=1, ignore_eos=True)
            assert [(len(one.tokens), one.finish) for one in only.outputs] == [(1, "length")]
            stopped = await engine.generate(prompt, leg="prefill", max_tokens=8, stop_token_ids=tuple(only.tokens))
            assert [(one.tokens, one.finish) for one in stopped.outputs] == [(tuple(only.tokens), "stop")]
            assert figures(engine).handed_over == 0
        nothing_is_leased(store)

    asyncio.run(scenario())


def test_bfloat16_goes_on_bit_for_bit(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        (prompt,) = prompts(1, length=300)
        options = {"dtype": "bfloat16"}
        async with RunningEngine(worker_spec(tiny_model, threads=1, options=options)) as alone:
            wanted = await alone.generate(prompt, **SEEDED)
        async with two(store, tiny_model, options=options) as (first, second):
            tokens, _ = await in_two_legs(first, second, prompt, must_transfer=True, **SEEDED)
        assert tokens == wanted.tokens

    asyncio.run(scenario())


def test_many_at_once_through_small_pools(tiny_model: Path, store: Store) -> None:
    """The decode engine's pool is full when blocks arrive; some prompts share a prefix; some clients go away."""

    async def scenario() -> None:
        shared = prompts(1, length=80)[0]
        asked = [shared + prompt for prompt in prompts(20, length=70, seed=3)]
        expected = await whole(tiny_model, asked, **SEEDED)
        rng = random.Random(1)
        async with two(store, tiny_model, blocks=40, max_batch=6) as (first, second):

            async def ask(prompt: list[int]) -> list[int] | None:
                answer = await cancelling(first, prompt, leg="prefill", **SEEDED)
                if answer is None:
                    return None
                rest = {**SEEDED, "max_tokens": 31, "must_transfer": True}
                transfer = handed_over(answer, prompt)
                rest_answer = await cancelling(second, prompt + answer.tokens, leg="decode", transfer=transfer, **rest)
                return None if rest_answer is None else answer.tokens + rest_answer.tokens

            async def cancelling(engine: RunningEngine, prompt: list[int], **request: Any) -> Answer | None:
                key, answer = engine.submit(prompt, **request)
                if rng.random() < 0.1:
                    for _ in range(rng.randrange(200)):
                        await asyncio.sleep(0)
                    engine.engine.cancel(key)
                await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
                return None if answer.finish == "cancelled" else answer

            answers = await asyncio.gather(*(ask(prompt) for prompt in asked))
            assert sum(answer is None for answer in answers) < 10
            for wanted, answer in zip(expected, answers, strict=True):
                assert answer is None or answer == wanted
            assert figures(second).transfers_failed == 0
            assert figures(first).kv_blocks_used == figures(second).kv_blocks_used == 0
        nothing_is_leased(store)

    asyncio.run(scenario())


def test_two_that_compute_the_same_prompt_wait_for_each_other(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one is storing the other can't, and can't hold before it is there."""

    async def scenario() -> None:
        (prompt,) = prompts(1)
        async with two(store, tiny_model) as (first, second):
            held = Held(monkeypatch, "copy_out")
            answers = [first.submit(prompt, leg="prefill", **GREEDY)[1]]
            await held.until_reached()
            answers.append(second.submit(prompt, leg="prefill", **GREEDY)[1])
            while not answers[1].outputs:
                await asyncio.sleep(0.005)
            held.go()
            for answer in answers:
                await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
                handed_over(answer, prompt)

    asyncio.run(scenario())


def test_cancelling_a_prefill_leg_at_each_point(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        computing, copying, holding = prompts(3, length=1500)
        async with engine_on(store, tiny_model, blocks=256, options={"max_batch_tokens": 64}) as engine:
            held = Held(monkeypatch, "step", Runner)
            key, answer = engine.submit(computing, leg="prefill", **GREEDY)
            await held.until_reached()
            engine.engine.cancel(key)
            held.go()
            await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
            assert [one.finish for one in answer.outputs] == ["cancelled"]
            await engine.settled()

            held = Held(monkeypatch, "copy_out")
            key, answer = engine.submit(copying, leg="prefill", **GREEDY)
            await first_token(answer)
            await held.until_reached()
            engine.engine.cancel(key)
            _, other = engine.submit([5] * 40, max_tokens=1)
            await asyncio.wait_for(other.ended.wait(), DEADLINE_S)
            assert not answer.ended.is_set(), "its blocks are being read"
            assert figures(engine).running == 1
            held.go()
            await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
            assert answer.finish == "cancelled"
            await engine.settled()

            held = Held(monkeypatch, "_keep", OutboundLane, when=lambda lane: bool(lane._keeping))
            key, answer = engine.submit(holding, leg="prefill", **GREEDY)
            await held.until_reached()
            engine.engine.cancel(key)
            _, other = engine.submit([5] * 40, max_tokens=1)
            await asyncio.wait_for(other.ended.wait(), DEADLINE_S)
            assert not answer.ended.is_set(), "a hold is on its way"
            held.go()
            await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
            assert answer.finish == "cancelled"
            assert (figures(engine).kv_blocks_used, figures(engine).running) == (0, 0)
            assert figures(engine).handed_over == figures(engine).transfers_failed == 0
            nothing_is_leased(store)

    asyncio.run(scenario())


def nothing_is_leased(store: Store) -> None:
    """Soon: what is given back at the end of a request may still be on its way. Nothing is left in the host tier."""
    give_up_at = time.monotonic() + DEADLINE_S
    while "stay" in (text := store.set("clear", "g2").text):
        assert time.monotonic() < give_up_at, text
        time.sleep(0.01)


async def first_token(answer: Answer) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not answer.outputs:
            await asyncio.sleep(0.005)


def test_cancelling_a_decode_leg_at_each_point(tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        *asked, forgotten = prompts(4)
        async with two(store, tiny_model, max_batch=1) as (first, second):
            unclaimed = await prefill(first, forgotten, transfer_ttl_s=LONGEST_HOLD_S, **GREEDY)
            store.figures_when(lambda figures: figures.leases == 1)
            second.engine.give_up(unclaimed.key)
            second.engine.give_up(unclaimed.key)
            store.figures_when(lambda figures: figures.leases == 0)

            legs = []
            for prompt in asked:
                answer = await first.generate(prompt, leg="prefill", **GREEDY)
                transfer = handed_over(answer, prompt)
                legs.append((prompt + answer.tokens, {"leg": "decode", "transfer": transfer, **GREEDY}))
            store.figures_when(lambda figures: figures.leases == 3)

            store.process.send_signal(signal.SIGSTOP)
            key, sought = second.submit(legs[0][0], **legs[0][1])
            second.engine.cancel(key)
            await asyncio.wait_for(sought.ended.wait(), DEADLINE_S)
            store.process.send_signal(signal.SIGCONT)
            await connected(second)

            held = Held(monkeypatch)
            key, loading = second.submit(legs[1][0], **legs[1][1])
            await held.until_reached()
            other, waiting = second.submit(legs[2][0], **legs[2][1])
            second.engine.cancel(other)
            await asyncio.wait_for(waiting.ended.wait(), DEADLINE_S)
            second.engine.cancel(key)
            held.go()
            await asyncio.wait_for(loading.ended.wait(), DEADLINE_S)
            assert sought.finish == loading.finish == waiting.finish == "cancelled"
            assert (figures(second).kv_blocks_used, figures(second).running) == (0, 0)
            nothing_is_leased(store)

    asyncio.run(scenario())


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("when", ["copied out", "between"])
def test_a_store_that_dies_in_mid_transfer(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch, when: str, must: bool
) -> None:
    async def scenario() -> None:
        (prompt,) = prompts(1)
        ((first_wanted, *_),) = (wanted,) = await whole(tiny_model, [prompt], **GREEDY)
        async with two(store, tiny_model) as (first, second):
            if when == "copied out":
                held = Held(monkeypatch, "copy_out")
                _, answer = first.submit(prompt, leg="prefill", **GREEDY)
                await first_token(answer)
                await held.until_reached()
                store.kill()
                held.go()
                await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
                assert (answer.tokens, answer.finish) == ([first_wanted], "prefilled")
                assert answer.outputs[-1].transfer is None
                assert answer.outputs[-1].error.startswith("the KV of the prompt could not be handed over: ")
                assert figures(first).transfers_failed == 1
                assert figures(first).kv_blocks_used == 0
                return
            answer = await first.generate(prompt, leg="prefill", **GREEDY)
            request = {**GREEDY, "max_tokens": 31, "must_transfer": must, "transfer": handed_over(answer, prompt)}
            store.kill()
            going_on = await second.generate(prompt + answer.tokens, leg="decode", **request)
            settle(second, going_on, answer.tokens, wanted, must=must)

    asyncio.run(scenario())


@pytest.mark.parametrize("must", [True, False])
def test_a_store_that_dies_while_a_prompt_is_loaded(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch, must: bool
) -> None:
    """After the first batch of it."""

    async def scenario() -> None:
        (prompt,) = prompts(1, length=600)
        (wanted,) = await whole(tiny_model, [prompt], **GREEDY)
        async with two(store, tiny_model) as (first, second):
            answer = await first.generate(prompt, leg="prefill", **GREEDY)
            request = {**GREEDY, "max_tokens": 31, "must_transfer": must, "transfer": handed_over(answer, prompt)}
            held = Held(monkeypatch)
            _, going_on = second.submit(prompt + answer.tokens, leg="decode", **request)
            await held.until_reached()
            store.kill()
            held.go()
            await asyncio.wait_for(going_on.ended.wait(), DEADLINE_S)
            assert (figures(second).taken_over, figures(second).transfers_failed) == (0, 1)
            assert figures(second).kv_blocks_used == 0
            if must:
                assert going_on.finish == "error"
                assert re.fullmatch(".* could not be loaded: .* of 600 tokens are there .+", going_on.outputs[-1].error)
            else:
                assert answer.tokens + going_on.tokens == wanted

    asyncio.run(scenario())


def settle(
    engine: RunningEngine, going_on: Answer, begun: list[int], wanted: list[int], *, must: bool, computed: int = 200
) -> None:
    """It went on without all of what was handed over, or failed if it must not."""
    assert figures(engine).taken_over == 0
    assert figures(engine).transfers_failed == 1
    assert figures(engine).kv_blocks_used == 0
    if must:
        assert (going_on.tokens, going_on.finish) == ([], "error")
        missing = f"{200 - computed} of 200 tokens are there"
        assert going_on.outputs[-1].error.startswith(f"the KV of the prompt could not be loaded: {missing}")
        assert figures(engine).computed_prompt_tokens == 0
    else:
        assert begun + going_on.tokens == wanted
        assert figures(engine).computed_prompt_tokens == computed


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("ttl_s", [600.0, 0.8], ids=["held", "expired"])
def test_as_long_as_a_hold_lasts_nobody_else_gets_its_blocks(
    tiny_model: Path, tmp_path: Path, ttl_s: float, must: bool
) -> None:
    async def scenario(store: Store) -> None:
        (prompt,) = prompts(1)
        (wanted,) = await whole(tiny_model, [prompt], **GREEDY)
        async with two(store, tiny_model) as (first, second):
            answer = await first.generate(prompt, leg="prefill", transfer_ttl_s=ttl_s, **GREEDY)
            transfer = handed_over(answer, prompt)
            if ttl_s < 1:
                store.figures_when(lambda figures: figures.leases == 1)
                store.figures_when(lambda figures: figures.leases == 0)
            for other in prompts(6, seed=9):
                await first.generate(other, max_tokens=1)
                await first.settled()
            request = {**GREEDY, "max_tokens": 31, "must_transfer": must, "transfer": transfer}
            going_on = await second.generate(prompt + answer.tokens, leg="decode", **request)
            if ttl_s < 1:
                settle(second, going_on, answer.tokens, wanted, must=must)
            else:
                assert answer.tokens + going_on.tokens == wanted
                assert figures(second).taken_over == 1

    store = Store(tmp_path, host_bytes=room_for(40, LAYOUT))
    try:
        asyncio.run(scenario(store))
    finally:
        store.close()


def test_a_host_tier_that_is_full_of_holds_takes_no_more(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        kept, refused = prompts(2)
        async with engine_on(store, tiny_model) as engine:
            transfer = await prefill(engine, kept, **GREEDY)
            assert "13 stay" in store.set("clear", "g2").text
            answer = await engine.generate(refused, leg="prefill", **GREEDY)
            assert answer.outputs[-1].transfer is None
            assert answer.finish == "prefilled"
            assert "store_full" in answer.outputs[-1].error
            going_on = await engine.generate([*kept, 5], leg="decode", transfer=transfer, must_transfer=True, **GREEDY)
            assert going_on.finish == "length"
            store.expect(status.Report, lambda report: report.figures.leases == 0)  # type: ignore[union-attr]
            await prefill(engine, refused, **GREEDY)

    store = Store(tmp_path, host_bytes=room_for(14, LAYOUT))
    try:
        asyncio.run(scenario(store))
    finally:
        store.close()


@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("block", [0, 5, 12])
def test_a_block_in_doubt_is_not_used(tiny_model: Path, store: Store, block: int, must: bool) -> None:
    """Its slot's header has a flipped bit. Block 12 is the partial one."""

    async def scenario() -> None:
        (prompt,) = prompts(1)
        (wanted,) = await whole(tiny_model, [prompt], **GREEDY)
        async with two(store, tiny_model) as (first, second):
            answer = await first.generate(prompt, leg="prefill", **GREEDY)
            transfer = handed_over(answer, prompt)
            flip_header(store, [*chain_digests(pack_tokens(prompt), 16, ISOLATION), transfer.partial][block])
            request = {**GREEDY, "max_tokens": 31, "must_transfer": must, "transfer": transfer}
            going_on = await second.generate(prompt + answer.tokens, leg="decode", **request)
            settle(second, going_on, answer.tokens, wanted, must=must, computed=200 - block * 16)

    asyncio.run(scenario())


def flip_header(store: Store, digest: bytes) -> None:
    """In the slot that holds this block."""
    memory = next(
        path for path in Path(f"/proc/{store.process.pid}/fd").iterdir() if os.readlink(path).startswith("/memfd:")
    )
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place = mapped.find(digest)
        assert place >= 0
        mapped[place] ^= 1


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"leg": "decode"}, "needs the transfer"),
        ({"leg": "decode", "transfer": Transfer(b"short", 2)}, "5 bytes instead of 16"),
        ({"leg": "decode", "transfer": Transfer(bytes(16), 3)}, "covers 3 tokens"),
        ({"leg": "prefill", "transfer_ttl_s": 0.0}, "transfer_ttl_s is 0.0"),
        ({"leg": "prefill", "transfer_ttl_s": 601.0}, "at most 600"),
        ({"leg": "prefill", "transfer_ttl_s": float("nan")}, "transfer_ttl_s is nan"),
    ],
)
def test_what_is_refused(request_: dict[str, Any], says: str) -> None:
    info = EngineInfo(16, 10, "float64", 100, (DISAGG,))
    request = SequenceRequest(1, "r", [1, 2, 3], Sampling(8), ISOLATION, **request_)
    with pytest.raises(RequestRejected, match=says):
        check(request, info, 100)


def test_without_tiers_there_are_no_legs(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:
            assert DISAGG not in engine.info.capabilities
            with pytest.raises(RequestRejected, match="a prefill leg needs an engine with KV tiers"):
                engine.submit([1, 2, 3], leg="prefill")

    asyncio.run(scenario())
