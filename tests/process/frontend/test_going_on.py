"""A lost worker in the middle of an answer: another one goes on, and the client can't tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frontend_peers import BLOCK, MODEL, FakeWorker, FrontendUnderTest, scenario

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
                await box.until_said(25)
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
