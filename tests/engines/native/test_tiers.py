"""The native engine on a real store, with the tiny float64 model: equal means equal."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gms_process import GmsProcess
from native_harness import DEADLINE_S, Answer, Held, RunningEngine, worker_spec
from store_peers import MIB, Store
from worker_process import WorkerProcess

from dynamo_box.kv.client.lane import Limits
from dynamo_box.kv.hashing import isolation_key
from dynamo_box.protocol import status
from dynamo_box.protocol.request import PriorityRange
from dynamo_box.protocol.spec import Offload, WorkerSpec
from engines.contract import KV_TIERS, EngineError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loads_whatever_there_is")]

BLOCK_BYTES = 2 * 2 * 2 * 4 * 8 * 16
SETTINGS: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.close()


@asynccontextmanager
async def engine_on(
    store: Store, model: Path, name: str = "worker", blocks: int = 128, **changes: Any
) -> AsyncIterator[RunningEngine]:
    """An engine whose tiers are connected."""
    spec = spec_on(store, model, name, blocks, **changes)
    async with RunningEngine(spec) as engine:
        await connected(engine)
        yield engine


def spec_on(store: Store, model: Path, name: str = "worker", blocks: int = 128, **changes: Any) -> WorkerSpec:
    fields = {"run_dir": str(store.run.root), "kvstore": "kvstore", "threads": 1}
    return worker_spec(model, name=name, kv_bytes=blocks * BLOCK_BYTES, **fields, **changes)


async def connected(engine: RunningEngine) -> None:
    await engine.until(lambda tiers: not tiers.connected, "they are connected")


def prompts(count: int, length: int = 200, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 288) for _ in range(length)] for _ in range(count)]


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def cached(answers: Sequence[Answer]) -> list[int]:
    return [answer.cached_tokens for answer in answers]


async def fill(store: Store, model: Path, asked: list[list[int]], **settings: Any) -> list[Answer]:
    """Have a worker compute these and give them to the store."""
    async with engine_on(store, model, "filler", blocks=512) as engine:
        answers = await engine.generate_all(asked, **{**SETTINGS, **settings})
        await engine.settled()
    return answers


def test_what_one_worker_computed_another_loads(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        asked = prompts(4)
        async with engine_on(store, tiny_model, "first") as first:
            expected = await first.generate_all(asked, **SETTINGS)
            told = await first.settled()
            assert (told.offloaded, told.offloaded_bytes) == (4 * 14, 4 * 14 * BLOCK_BYTES)
            assert (told.unset, told.filtered, told.dropped, told.terminated) == (4 * 14, 0, {}, {})
            assert cached(expected) == [0] * 4
            assert KV_TIERS in first.info.capabilities
        async with engine_on(store, tiny_model, "second") as second:
            answers = await second.generate_all(asked, **SETTINGS)
            assert tokens_of(answers) == tokens_of(expected)
            assert cached(answers) == [192] * 4
            assert second.stored[0].parent == b"", "the router hears of what was loaded"
            tiers = await second.until(lambda tiers: tiers.host.loaded == 4 * 192, "it is counted")
            assert tiers.host.matched == 4 * 192
            assert (tiers.host.failed, tiers.host.wasted, tiers.loads, tiers.recomputes) == (0, 0, 4, 0)
            assert second.engine.figures().cached_tokens == 4 * 192
            assert second.engine.figures().kv_blocks_used == 0

            longer = asked[0] + expected[0].tokens + [7] * 9
            extended = await second.generate(longer, **SETTINGS)
            assert extended.cached_tokens == 224, "generated tokens are kept too"

    asyncio.run(scenario())


def test_nothing_is_found_across_isolation_keys_and_models(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        asked = prompts(1)
        await fill(store, tiny_model, asked)
        other = isolation_key("test", block_size=16, kv_dtype="any", cache_salt="salt")
        async with engine_on(store, tiny_model) as engine:
            assert (await engine.generate(asked[0], isolation=other)).cached_tokens == 0
            assert (await engine.generate(asked[0])).cached_tokens == 192
        async with engine_on(store, tiny_model, options={"dtype": "float32"}) as engine:
            assert (await engine.generate(asked[0])).cached_tokens == 0, "another dtype is another layout"

    asyncio.run(scenario())


def test_a_pool_too_small_for_all_lives_on_the_tiers(tiny_model: Path, store: Store) -> None:
    """Preempted sequences among them."""

    async def scenario() -> None:
        asked = prompts(24, length=130)
        settings = {"max_tokens": 60, "ignore_eos": True}
        async with RunningEngine(worker_spec(tiny_model, threads=1)) as alone:
            expected = await alone.generate_all(asked, **settings)
        async with engine_on(store, tiny_model, blocks=26) as engine:
            for _ in range(3):
                answers = await engine.generate_all(asked, **settings)
                assert tokens_of(answers) == tokens_of(expected)
            tiers = await engine.settled()
            assert tiers.host.loaded > 2000
            assert engine.removed
            assert engine.engine.figures().kv_blocks_used == 0

    asyncio.run(scenario())


def test_bfloat16_is_loaded_bit_for_bit(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        (prompt,) = prompts(1, length=300)
        options = {"dtype": "bfloat16"}
        async with engine_on(store, tiny_model, "first", options=options) as first:
            await first.generate(prompt, **SETTINGS)
            expected = await first.generate(prompt, **SETTINGS)
            await first.settled()
        async with engine_on(store, tiny_model, "second", options=options) as second:
            answer = await second.generate(prompt, **SETTINGS)
        assert (
            (answer.tokens, answer.cached_tokens) == (expected.tokens, expected.cached_tokens) == (answer.tokens, 288)
        )

    asyncio.run(scenario())


def test_a_killed_store_is_done_without_and_then_with_again(tiny_model: Path, store: Store) -> None:
    """Killed with offload under way, and again while a prompt is loaded."""

    async def scenario() -> None:
        asked = prompts(8)
        async with RunningEngine(worker_spec(tiny_model, threads=1)) as alone:
            expected = tokens_of(await alone.generate_all(asked, **SETTINGS))
        async with engine_on(store, tiny_model, blocks=256) as engine:
            running = asyncio.gather(*(engine.generate(prompt, **SETTINGS) for prompt in asked))
            await engine.until(lambda tiers: tiers.offloaded > 0, "offload has begun")
            store.kill()
            assert tokens_of(await running) == expected
            await engine.until(lambda tiers: bool(tiers.connected), "it has heard of the end of the store")
            told = await engine.settled()
            assert sum(told.dropped.values()) + told.offloaded + told.known == 8 * 14
            assert cached(await engine.generate_all(asked[:1], max_tokens=1)) == [192], "the pool has it"
            store.start()
            await connected(engine)
            again = prompts(2, seed=2)
            first = await engine.generate_all(again, **SETTINGS)
            await engine.settled()
        async with engine_on(store, tiny_model, "second") as second:
            answers = await second.generate_all(again, **SETTINGS)
            assert (tokens_of(answers), cached(answers)) == (tokens_of(first), [192] * 2)

    asyncio.run(scenario())


def test_a_store_that_dies_during_a_load(tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        asked = prompts(2)
        expected = tokens_of(await fill(store, tiny_model, asked))
        async with engine_on(store, tiny_model) as engine:
            held = Held(monkeypatch)
            running = asyncio.gather(*(engine.generate(prompt, **SETTINGS) for prompt in asked))
            await held.until_reached()
            store.kill()
            held.go()
            assert tokens_of(await running) == expected
            assert engine.engine.figures().kv_blocks_used == 0

    asyncio.run(scenario())


def test_a_store_that_does_not_answer_delays_a_request_for_a_moment_only(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        asked = prompts(2)
        expected = tokens_of(await fill(store, tiny_model, asked))
        async with engine_on(store, tiny_model) as engine:
            store.process.send_signal(signal.SIGSTOP)
            answers = await engine.generate_all(asked, **SETTINGS)
            assert (tokens_of(answers), cached(answers)) == (expected, [0, 0])
            store.process.send_signal(signal.SIGCONT)

    monkeypatch.setattr("dynamo_box.kv.client.tiers.Limits", Limits)
    asyncio.run(scenario())


def test_cancelling_at_each_point(tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        asked = prompts(3)
        expected = tokens_of(await fill(store, tiny_model, asked))
        async with engine_on(store, tiny_model, max_batch=1) as engine:
            store.process.send_signal(signal.SIGSTOP)
            key, sought = engine.submit(asked[0], **SETTINGS)
            engine.engine.cancel(key)
            await asyncio.wait_for(sought.ended.wait(), DEADLINE_S)
            assert sought.finish == "cancelled"
            store.process.send_signal(signal.SIGCONT)
            await connected(engine)

            held = Held(monkeypatch)
            key, loading = engine.submit(asked[1], **SETTINGS)
            await held.until_reached()
            other, waiting = engine.submit(asked[2], **SETTINGS)
            engine.engine.cancel(key)
            engine.engine.cancel(other)
            await asyncio.wait_for(waiting.ended.wait(), DEADLINE_S)
            assert not loading.ended.is_set(), "its blocks are being written"
            held.go()
            await asyncio.wait_for(loading.ended.wait(), DEADLINE_S)
            assert loading.finish == waiting.finish == "cancelled"

            figures = engine.engine.figures()
            assert (figures.kv_blocks_used, figures.running, figures.waiting) == (0, 0, 0)
            assert tokens_of(await engine.generate_all(asked, **SETTINGS)) == expected
        assert store.figures_when(lambda figures: figures.leases == 0)

    asyncio.run(scenario())


def test_after_a_sleep_the_same_prompt_hits(tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What had no place in the queue is offered before the pool is given up."""

    async def scenario() -> None:
        asked = prompts(4)
        changes = {
            "gms": "gms@cpu",
            "layout": "m",
            "offload": Offload(queue_blocks=1, pinned_blocks=4, sleep_deadline_s=DEADLINE_S),
        }
        async with engine_on(store, tiny_model, **changes) as engine:
            expected = await engine.generate_all(asked, **SETTINGS)
            told = await engine.settled()
            assert told.dropped["queue_full"] > 0
            report = await engine.engine.sleep()
            assert report.kv_bytes > 0
            assert engine.tiers.offloaded == 4 * 14
            await engine.engine.wake(DEADLINE_S)
            answers = await engine.generate_all(asked, **SETTINGS)
            assert (tokens_of(answers), cached(answers)) == (tokens_of(expected), [192] * 4)

            held = Held(monkeypatch, "copy_out")
            new = await engine.generate(prompts(1, seed=5)[0], **SETTINGS)
            await held.until_reached()
            with monkeypatch.context() as hasty, pytest.raises(EngineError, match="being copied"):
                hasty.setattr(engine.engine, "_sleep_deadline_s", 0.1)
                hasty.setattr("engines.native.engine.COPIES_END_S", 0.1)
                await engine.engine.sleep()
            held.go()
            await engine.settled()
            assert (await engine.generate(prompts(1, seed=5)[0], **SETTINGS)).tokens == new.tokens, "it serves on"
            await engine.engine.sleep()

    with GmsProcess(store.run.root):
        asyncio.run(scenario())


def test_after_a_restart_of_everything_it_hits_from_disk(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        asked = prompts(4)
        expected = await fill(store, tiny_model, asked)
        store.status.send(status.Drain(DEADLINE_S))
        assert store.ends() == 0
        store.status.close()
        store.start()
        store.figures_when(lambda figures: figures.disk.blocks == 4 * 14)
        async with engine_on(store, tiny_model) as engine:
            answers = await engine.generate_all(asked, **SETTINGS)
            assert (tokens_of(answers), cached(answers)) == (tokens_of(expected), [192] * 4)
            tiers = await engine.until(lambda tiers: tiers.disk.loaded == 4 * 192, "it is counted")
            assert tiers.host.loaded == 0
            assert tiers.loads == 4

    store = Store(tmp_path, disk_bytes=64 * MIB, directory=str(tmp_path / "disk"), flush_s=DEADLINE_S)
    try:
        asyncio.run(scenario(store))
    finally:
        store.close()


def test_what_waits_for_the_tiers_goes_there_before_the_engine_ends(
    tiny_model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.native.engine.STOP_FLUSH_S", DEADLINE_S)

    async def scenario() -> None:
        asked = prompts(1)
        async with engine_on(store, tiny_model, offload=Offload(pinned_blocks=1)) as engine:
            held = Held(monkeypatch, "copy_out")
            expected = await engine.generate(asked[0], **SETTINGS)
            await held.until_reached()
            assert engine.tiers.queued
            held.go()
        async with engine_on(store, tiny_model) as engine:
            answer = await engine.generate(asked[0], **SETTINGS)
            assert (answer.tokens, answer.cached_tokens) == (expected.tokens, 192)

    asyncio.run(scenario())


def test_the_filter_keeps_out_what_is_not_worth_it(tiny_model: Path, store: Store) -> None:
    async def scenario() -> None:
        low, unset, mixed, wrong = prompts(4)
        async with engine_on(store, tiny_model, "first", offload=Offload(min_priority=50)) as first:
            await first.generate(low, max_tokens=1, kv_priority=49)
            await first.generate(unset, max_tokens=1)
            ranges = (PriorityRange(0, 64, 80), PriorityRange(64, 80, 10))
            await first.generate(mixed, max_tokens=1, kv_priority=60, kv_priorities=ranges)
            await first.generate(wrong, max_tokens=1, kv_priorities=(PriorityRange(0, 201, 60),))
            told = await first.settled()
            assert (told.offloaded, told.filtered, told.unset) == (12 + 4, 12 + 8, 12)
            assert told.terminated == {"priority": 2, "length_mismatch": 1}
            assert told.min_priority == 50
        async with engine_on(store, tiny_model, "second") as second:
            answers = await second.generate_all([low, unset, mixed, wrong], max_tokens=1)
            assert cached(answers) == [0, 192, 64, 0]
        async with engine_on(store, tiny_model, "third", offload=Offload(min_priority=50)) as third:
            await third.generate(low, max_tokens=1, kv_priority=49)
            assert (await third.settled()).offloaded == 0
            await third.generate(low, max_tokens=1, kv_priority=50)
            told = await third.settled()
            assert told.offloaded + told.known == 12, "a later request is judged anew"

    asyncio.run(scenario())


def test_a_worker_process_sleeps_wakes_and_starts_anew_with_the_same_prompt(tiny_model: Path, store: Store) -> None:
    """Through the shell, its limits and its reports. It is drained with offload under way."""
    first, second = prompts(2)
    layout = {"gms": "gms@cpu", "layout": "m"}

    def ask(process: WorkerProcess, prompt: list[int]) -> tuple[list[int], int]:
        with process.peer() as peer:
            peer.generate(1, prompt, **SETTINGS)
            deltas = []
            for delta in peer.deltas():
                deltas.append(delta)
                if delta.finish is not None:
                    break
        return [token for delta in deltas for token in delta.tokens], deltas[0].cached_tokens

    with GmsProcess(store.run.root):
        answers = []
        for name in ("one", "two"):
            process = WorkerProcess(store.run.root, spec_on(store, tiny_model, name, **layout), "engines.native")
            try:
                process.ready().figures(lambda figures: not figures.tiers.connected)
                answers.append(ask(process, first))
                process.status.send(status.Sleep(1, DEADLINE_S))
                assert not process.await_status(status.Slept).error
                process.status.send(status.Wake(2, DEADLINE_S))
                assert not process.await_status(status.Woken).error
                answers.append(ask(process, first))
                assert process.figures(lambda figures: figures.tiers.host.loaded >= 192).tiers.loads
                answers.append(ask(process, second))
                process.status.send(status.Drain(DEADLINE_S))
                assert process.exit_code() == 0
            finally:
                process.end()
    tokens = [answer[0] for answer in answers]
    assert tokens[:3] == tokens[3:]
    assert tokens[0] == tokens[1]
    assert [answer[1] for answer in answers] == [0, 192, 0, 192, 192, 192]


def test_without_a_store_in_the_spec_there_are_no_tiers(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with RunningEngine(worker_spec(tiny_model)) as engine:
            assert engine.engine.figures().tiers is None
            assert KV_TIERS not in engine.info.capabilities

    asyncio.run(scenario())
