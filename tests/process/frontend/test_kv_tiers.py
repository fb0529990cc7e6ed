"""What a client may say about the KV of its request, and what the frontend tells of the tiers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from frontend_peers import BLOCK, DEADLINE_S, MODEL, FakeWorker, FrontendUnderTest, scenario

from dynamo_box.kv.hashing import chain_digests, isolation_key, short_hashes
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, TierUse, WorkerTiers
from dynamo_box.protocol.request import Generate, PriorityRange

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


async def _generated(
    box: FrontendUnderTest, worker: FakeWorker, body: dict[str, Any], path: str = CHAT, cached_tokens: int = 0
) -> tuple[Generate, Any]:
    """What reaches the worker, and the answer to the client."""
    answering = box.post(body, path)
    generate = await worker.generated()
    worker.emit(generate, "x", finish="length", cached_tokens=cached_tokens)
    answer = await answering
    assert answer.status == 200, answer.body
    return generate, answer.json()


def test_a_priority_is_the_requests_place_in_the_queue_and_the_worth_of_its_kv(
    tmp_path: Path, tiny_model: Path
) -> None:
    hint = {"agent_hints": {"priority": 80}}
    given: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"nvext": hint}, 80),
        ({"nvext": {"priority": 80}}, 80),
        ({"priority": 80}, 80),
        ({"priority": 80, "nvext": {**hint, "priority": 80}}, 80),
        ({"nvext": {"priority": 0}}, 0),
        ({"nvext": {"priority": 100}}, 100),
        ({"nvext": {"priority": None, "agent_hints": {}}}, None),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            for body, priority in given:
                for path, prompt in ((CHAT, {}), (COMPLETION, {"prompt": "hi"})):
                    generate, _ = await _generated(box, worker, {**body, **prompt}, path)
                    assert (generate.priority, generate.kv_priority) == (priority or 0, priority), (path, body)
                    assert generate.kv_priorities == ()
            ranges = [{"start": 8, "end": 1000, "priority": 0}, {"start": 0, "end": 9, "priority": 100}]
            generate, _ = await _generated(box, worker, {"nvext": {"kv_priorities": ranges, "priority": 7}})
            assert generate.kv_priorities == (PriorityRange(8, 1000, 0), PriorityRange(0, 9, 100)), (
                "as given: that they overlap, or end beyond the prompt, is for the worker to judge"
            )
            assert generate.kv_priority == 7
            most = [{"start": at, "end": at + 1, "priority": 1} for at in range(256)]
            generate, _ = await _generated(box, worker, {"nvext": {"kv_priorities": most}})
            assert (len(generate.kv_priorities), generate.kv_priority, generate.priority) == (256, None, 0)
            await box.nothing_left()

    scenario(work)


def test_a_priority_that_is_none_is_refused_with_field_value_and_range(tmp_path: Path, tiny_model: Path) -> None:
    def a_range(start: Any = 0, end: Any = 4, priority: Any = 50) -> dict[str, Any]:
        good = {"start": 0, "end": 1, "priority": 1}
        return {"nvext": {"kv_priorities": [good, {"start": start, "end": end, "priority": priority}]}}

    both = {"nvext": {"priority": 5, "agent_hints": {"priority": 6}}}
    refused: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
        ({"nvext": {"agent_hints": {"priority": 101}}}, "nvext.agent_hints.priority", ("is 101", "from 0 to 100")),
        ({"nvext": {"priority": -1}}, "nvext.priority", ("is -1", "from 0 to 100")),
        ({"priority": 10**30}, "priority", (f"is {10**30}", "from 0 to 100")),
        (both, "nvext.agent_hints.priority", ("'nvext.priority' 5", "'nvext.agent_hints.priority' 6", "contradict")),
        ({"nvext": {"priority": 5}, "priority": 0}, "nvext.priority", ("contradict",)),
        ({"nvext": {"priority": "high"}}, "nvext", ("nvext.priority", "int")),
        ({"priority": 1.5}, "priority", ("int",)),
        (a_range(priority=101), "nvext.kv_priorities", ("[1].priority' is 101", "from 0 to 100")),
        (a_range(priority=-1), "nvext.kv_priorities", ("[1].priority' is -1",)),
        (a_range(start=4), "nvext.kv_priorities", ("[1]' is from token 4 to 4", "below 'end'")),
        (a_range(start=-1), "nvext.kv_priorities", ("from token -1 to 4",)),
        (a_range(end=10**30), "nvext.kv_priorities", (str(2**31 - 1),)),
        (a_range(priority=None), "nvext", ("kv_priorities", "priority")),
        ({"nvext": {"kv_priorities": [{"start": 0, "end": 1}]}}, "nvext", ("missing", "`priority`")),
        ({"nvext": {"kv_priorities": {"start": 0}}}, "nvext", ("kv_priorities",)),
        ({"nvext": {"kv_priorities": [{"start": 0, "end": 1, "priority": 1}] * 257}}, "nvext", ("256",)),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for body, field, words in refused:
                for path, prompt in ((CHAT, {}), (COMPLETION, {"prompt": "hi"})):
                    answer = await box.post({**body, **prompt}, path)
                    assert (answer.status, answer.error["param"]) == (400, field), (body, answer.body)
                    for word in words:
                        assert word in answer.error["message"], (word, answer.error["message"])
            assert not box.router.places

    scenario(work)


def test_a_cache_salt_keeps_equal_prompts_apart(tmp_path: Path, tiny_model: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": "one two three four five six seven eight nine ten " * 4}]}),
        (COMPLETION, {"prompt": [5 + number % 200 for number in range(3 * BLOCK)]}),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            for path, body in bodies:
                seen: dict[str | None, tuple[int, ...]] = {}
                for salt in (None, "a", "b", "a"):
                    generate, _ = await _generated(box, worker, {**body, "cache_salt": salt}, path)
                    key = isolation_key("f00", block_size=BLOCK, kv_dtype="float64", cache_salt=salt)
                    hashes = box.router.places[-1].hashes
                    assert generate.isolation == key
                    assert hashes == short_hashes(chain_digests(generate.tokens, BLOCK, key))
                    assert len(hashes) > 1
                    assert seen.setdefault(salt, hashes) == hashes, "equal salts share"
                every = [block for hashes in seen.values() for block in hashes]
                assert len(set(every)) == len(every), "no block of one salt is any block of another"
            for wrong in ("", 5, ["a"], "x" * 257):
                answer = await box.post({"cache_salt": wrong})
                assert (answer.status, answer.error["param"]) == (400, "cache_salt"), answer.body
            answer = await box.post({"nvext": {"cache_salt": "a"}})
            assert (answer.status, answer.error["param"]) == (400, "nvext.cache_salt"), answer.body

    scenario(work)


def test_tokens_loaded_from_a_tier_are_cached_tokens_to_the_client(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            prompt = {"prompt": list(range(5, 5 + 3 * BLOCK))}
            _, answer = await _generated(box, worker, prompt, COMPLETION, cached_tokens=2 * BLOCK)
            assert answer["usage"]["prompt_tokens"] == 3 * BLOCK
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * BLOCK
            metrics = (await box.get("/metrics")).body.decode()
            assert f'dynamo_frontend_cached_tokens_sum{{model="{MODEL}"}} {2.0 * BLOCK}' in metrics

    scenario(work)


def test_metrics_of_the_tiers_are_what_the_supervisor_last_said(tmp_path: Path, tiny_model: Path) -> None:
    store = KvStoreFigures(host=TierFigures("on", blocks=9), disk=TierFigures("suspended", "no space left"))
    tiers = WorkerTiers(connected="", offloaded=4, filtered=3, host=TierUse(matched=64, loaded=2 * BLOCK))
    hint = f'{{model="{MODEL}",worker="w0"}}'

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            assert "_kv_" not in (await box.get("/metrics")).body.decode().replace("router_kv_hit_rate", "")
            box.supervisor.send(status.Tiers(store, {"w0": tiers}, {"w0": MODEL}))
            wanted = [
                f"dynbox_kv_offload_filtered_blocks_total{hint} 3.0",
                f'dynbox_kv_moved_blocks_total{{direction="host_to_device",model="{MODEL}",worker="w0"}} 2.0',
                'dynbox_kv_tier_blocks{tier="host"} 9.0',
                'dynbox_kv_tier_state{state="suspended",tier="disk"} 1.0',
                "kvbm_offload_blocks_d2h 4.0",
                "kvbm_matched_tokens 64.0",
            ]
            async with asyncio.timeout(DEADLINE_S):
                metrics = ""
                while wanted[-1] not in metrics:
                    await asyncio.sleep(0.01)
                    metrics = (await box.get("/metrics")).body.decode()
            assert [line for line in wanted if line not in metrics] == []
            assert "# TYPE dynbox_kv_moved_blocks_total counter" in metrics

    scenario(work)
