"""A lost worker in the middle of an answer: another one goes on, and the client can't tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frontend_peers import BLOCK, MODEL, FakeWorker, FrontendUnderTest, eventually, scenario

from dynamo_box.kv.hashing import chain_digests, isolation_key, short_hashes
from dynamo_box.protocol.request import Delta, Generate, unpack_tokens

COMPLETION = "/v1/completions"
PROMPT = list(range(5, 5 + 2 * BLOCK + 7))


def _say(worker: FakeWorker, generate: Generate, *tokens: int, finish: Any = None) -> None:
    for place, token in enumerate(tokens):
        worker.send(Delta(generate.id, (token,), finish if place == len(tokens) - 1 else None, cached_tokens=3))


def test_another_worker_goes_on_from_where_the_first_was(tmp_path: Path, tiny_model: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 1.0, "nvext": {"min_tokens": 20}}
    tokens = list(range(70, 100))

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            for streamed in (True, False):
                options = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
                answering = box.post({**body, **options}, COMPLETION)
                generate = await first.generated()
                _say(first, generate, *tokens[:25])
                await box.until_said(generate, 25)
                first.drop()
                again = await second.generated()
                place = box.router.places[-1]
                assert (place.exclude, place.one_leg, place.prompt_tokens) == (("w0",), True, len(PROMPT) + 25)
                key = isolation_key("f00", block_size=BLOCK, kv_dtype="float64")
                assert place.hashes == short_hashes(chain_digests(again.tokens, BLOCK, key))
                assert len(place.hashes) == (len(PROMPT) + 25) // BLOCK > len(PROMPT) // BLOCK
                assert unpack_tokens(again.tokens) == PROMPT + tokens[:25]
                assert again.request_id == generate.request_id
                assert (again.sampling.max_tokens, again.sampling.min_tokens) == (5, 0)
                assert again.sampling.seed == generate.sampling.seed is not None
                _say(second, again, *tokens[25:], finish="length")
                answer = await answering
                assert answer.status == 200
                usage = (answer.chunks()[-1] if streamed else answer.json())["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 30)
                assert usage["prompt_tokens_details"]["cached_tokens"] == 3, "of the first worker"
                text = answer.text() if streamed else answer.json()["choices"][0]["text"]
                assert text == box.tokenizer.decode(tokens)
                await box.nothing_left()
            metrics = (await box.get("/metrics")).body.decode()
            assert f'dynamo_frontend_model_migration_total{{model="{MODEL}"}} 2.0' in metrics

    scenario(work)


def test_what_is_sampled_has_a_seed_so_that_anybody_can_go_on(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            seeds = []
            for more in ({}, {"temperature": 0.1}, {"temperature": 0}, {"seed": 7}, {"temperature": 0, "seed": -8}):
                answering = box.post(more)
                generate = await worker.generated()
                seeds.append(generate.sampling.seed)
                _say(worker, generate, 70, finish="length")
                assert (await answering).status == 200
            first, second, *others = seeds
            assert others == [None, 7, -8]
            assert first is not None
            assert second is not None
            assert first != second
            assert 0 <= min(first, second) <= max(first, second) < 2**63

    scenario(work)


def test_what_was_held_back_is_kept_over_a_loss(tmp_path: Path, tiny_model: Path) -> None:
    cases: list[tuple[dict[str, Any], str, str, str]] = [
        ({"stop": "a stop"}, "a s", "top, never shown", ""),
        ({}, "\u20ac", ", and more", "\u20ac, and more"),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            for more, before, after, shown in cases:
                body = {"prompt": "hi", "max_tokens": 200, "stream": True, **more}
                tokens = first.ids(before) + first.ids(after)
                for cut in range(1, len(first.ids(before)) + 1):
                    answering = box.post(body, COMPLETION)
                    _say(first, generate := await first.generated(), *tokens[:cut])
                    await box.until_said(generate, cut)
                    first.drop()
                    _say(second, await second.generated(), *tokens[cut:], finish="length")
                    answer = await answering
                    assert (answer.text(), answer.events[-1]) == (shown, "[DONE]"), cut
            await box.nothing_left()

    scenario(work)


def test_when_all_was_said_nobody_has_to_go_on(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({"prompt": PROMPT, "max_tokens": 3}, COMPLETION)
            _say(worker, generate := await worker.generated(), 70, 71, 72)
            await box.until_said(generate, 3)
            worker.close()
            answer = (await answering).json()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 3
            assert len(box.router.places) == 1
            await box.nothing_left()

    scenario(work)


def test_whoever_can_not_take_the_rest_is_passed_over_and_a_pinned_request_is_not_moved(
    tmp_path: Path, tiny_model: Path
) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            workers = await box.ready("w0", "w1", "w2", "w3", "w4")
            first, second, third, fourth, _ = workers
            answering = box.post({"max_tokens": 6})
            _say(first, generate := await first.generated(), 70)
            first.send(Delta(generate.id, (), "error", error="out of blocks"))
            generate = await second.generated()
            second.send(Delta(generate.id, (), "error", error="too long for me", rejected=True))
            generate = await third.generated()
            assert unpack_tokens(generate.tokens)[-1] == 70
            assert box.router.places[-1].exclude == ("w0", "w1")
            _say(third, generate, 71, 72, finish="stop")
            assert (await answering).json()["usage"]["completion_tokens"] == 3

            answering = box.post({"max_tokens": 6})
            for place, worker in enumerate(workers[:4]):  # whoever takes it breaks
                generate = await worker.generated()
                assert generate.sampling.max_tokens == 6 - place
                _say(worker, generate, 70 + place)
                await box.until_said(generate, place + 1)
                worker.drop()
            answer = await answering
            assert (answer.status, answer.error["code"]) == (502, "worker_lost")
            assert "w3" in answer.error["message"]
            metrics = (await box.get("/metrics")).body.decode()
            assert f'dynamo_frontend_model_migration_total{{model="{MODEL}"}} 5.0' in metrics

            answering = box.post({"nvext": {"backend_instance_id": "w3"}})
            _say(fourth, generate := await fourth.generated(), 70)
            await box.until_said(generate, 1)
            places = len(box.router.places)
            fourth.drop()
            assert (await answering).error["code"] == "worker_lost"
            assert len(box.router.places) == places
            await box.nothing_left()

    scenario(work)


def test_a_new_process_under_the_name_of_the_lost_one_may_go_on(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({"max_tokens": 4, "stream": True})
            _say(worker, generate := await worker.generated(), 70, 71)
            await box.until_said(generate, 2)
            worker.drop()  # and comes back with its connection, as the same process
            places = box.router.places
            await eventually(lambda: places[-1].exclude == ("w0",), "it is placed again, but not there")
            worker.announce(kv_blocks_total=65)
            again = await worker.generated()
            assert places[-1].exclude == ()
            _say(worker, again, 72, 73, finish="length")
            assert (await answering).text() == box.tokenizer.decode([70, 71, 72, 73])
            await box.nothing_left()

    scenario(work)


def test_a_model_that_falls_asleep_in_the_middle_is_waited_for(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            answering = box.post({"max_tokens": 3, "stream": True})
            _say(first, generate := await first.generated(), 70)
            await box.until_said(generate, 1)
            first.drop()
            generate = await second.generated()
            second.send(Delta(generate.id, (), "error", error="worker is going to sleep"))
            box.says("falling_asleep")
            await box.asleep()
            await box.asked()
            box.says("awake")
            again = await first.generated()
            assert box.router.places[-1].one_leg
            _say(first, again, 71, 72, finish="length")
            assert (await answering).text() == box.tokenizer.decode([70, 71, 72])
            await box.nothing_left()

    scenario(work)
