"""The embedded model answers the official client: sync, async, streamed, cancelled, refused."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.request
from typing import Any

import openai
import pytest
from box_under_test import Box, eventually

pytestmark = pytest.mark.slow

CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def test_the_capital_of_france_is_paris(running: Box) -> None:
    answer = running.client().chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_and_ends_with_usage(running: Box) -> None:
    stream = running.client().chat.completions.create(
        model="smollm2",
        messages=CAPITAL,
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish, usage, pieces = "", None, None, 0
    for chunk in stream:
        if chunk.choices:
            piece = chunk.choices[0].delta.content or ""
            pieces += bool(piece)
            text += piece
            finish = chunk.choices[0].finish_reason or finish
        usage = chunk.usage or usage
    assert text == "The capital of France is Paris."
    assert pieces > 3
    assert finish == "stop"
    assert usage is not None
    assert usage.completion_tokens == 8


def test_async_clients_beside_each_other_each_get_their_own_answer(running: Box) -> None:
    async def ask(client: openai.AsyncOpenAI, country: str) -> str:
        stream = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": f"What is the capital of {country}?"}],
            temperature=0,
            max_tokens=24,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def scenario() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client, each) for each in ("France", "Italy", "Germany", "France")))

    france, italy, germany, again = asyncio.run(scenario())
    assert france == again == "The capital of France is Paris."
    assert len({france, italy, germany}) == 3


def test_a_seed_repeats_and_another_seed_does_not(running: Box) -> None:
    def sample(seed: int) -> str:
        return (
            running.client()
            .completions.create(model="smollm2", prompt="Once upon a time", temperature=1.0, seed=seed, max_tokens=24)
            .choices[0]
            .text
        )

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_a_stop_string_is_not_part_of_the_answer(running: Box) -> None:
    answer = running.client().chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, max_tokens=16, stop=[" Paris"]
    )
    assert answer.choices[0].message.content == "The capital of France is"
    assert answer.choices[0].finish_reason == "stop"


def test_a_repeated_prompt_reports_cached_tokens(running: Box) -> None:
    messages: list[Any] = [{"role": "user", "content": "Count the words in this: " + "apple pear " * 60}]
    cached = []
    for _ in range(2):
        usage = (
            running.client()
            .chat.completions.create(model="smollm2", messages=messages, max_tokens=2, temperature=0)
            .usage
        )
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] is not None
    assert cached[1] is not None
    assert cached[0] < 64 < cached[1]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(running: Box, extra: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        running.client().chat.completions.create(model="smollm2", messages=CAPITAL, **extra)
    assert refusal.value.param == named
    assert named in str(refusal.value)


def test_an_unknown_model_is_a_404_that_names_those_there_are(running: Box) -> None:
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        running.client().chat.completions.create(model="gpt-9", messages=CAPITAL)


def test_a_prompt_over_the_context_is_a_400(running: Box) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        running.client().completions.create(model="smollm2", prompt="word " * 20_000, max_tokens=1)
    assert refusal.value.code == "context_length_exceeded"


def test_a_client_that_hangs_up_frees_its_worker(running: Box) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    body = {"model": "smollm2", "prompt": "Tell me", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    running_now = next(each for each in running.ps()["processes"] if each["kind"] == "worker")
    assert running_now["state"] == "ready"
    connection.close()
    response.close()

    def idle() -> bool:
        worker = next(each for each in running.ps()["processes"] if each["kind"] == "worker")
        return bool(worker["figures"]["running"] == 0 and worker["figures"]["waiting"] == 0)

    eventually(idle, "the worker has nothing left to do")


def test_models_health_and_metrics_tell_what_is_there(running: Box) -> None:
    assert [model.id for model in running.client().models.list()] == ["smollm2"]
    base = f"http://127.0.0.1:{running.port}"
    for path in ("/health", "/live"):
        with urllib.request.urlopen(base + path, timeout=30) as response:
            assert response.status == 200
    with urllib.request.urlopen(base + "/metrics", timeout=30) as response:
        text = response.read().decode()
    for name in ("dynamo_frontend_requests_total", "dynamo_frontend_time_to_first_token_seconds"):
        assert name in text
