"""`dynbox drain`: what runs on the worker finishes, nothing is lost, and new requests go to the others."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from box_under_test import Box, eventually

DRAINED, OTHER = "tiny.aggregated.0", "tiny.aggregated.1"
TOKENS = 600
"""More than a second's worth, so that the drain finds them running."""


def stream(client: openai.OpenAI, number: int, started: threading.Barrier) -> tuple[str, int]:
    """(worker, tokens) of one streamed completion; waits for the others after its first token."""
    response = client.completions.with_raw_response.create(
        model="tiny",
        prompt=f"{number} hello " * 8,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = response.parse()
    next(iter(chunks))
    started.wait(120)
    *_, last = chunks
    assert last.usage is not None
    return response.headers["x-dynbox-worker"], last.usage.completion_tokens


def ask(client: openai.OpenAI, prompt: str, pin: str | None = None) -> str:
    """The worker that answered."""
    answer = client.completions.with_raw_response.create(
        model="tiny", prompt=prompt, max_tokens=8, extra_body={"nvext": {"backend_instance_id": pin}} if pin else None
    )
    assert answer.parse().choices[0].finish_reason in ("length", "stop")
    return str(answer.headers["x-dynbox-worker"])


def test_running_streams_finish_and_new_requests_go_elsewhere(mock_box: Box) -> None:
    mock_box.wait_routed()
    client = mock_box.client(timeout=120)
    started, over = threading.Barrier(9), threading.Event()

    def ask_on(number: int) -> list[str]:
        workers = []
        while not over.is_set():
            workers.append(ask(client, f"more {number}"))
        return workers

    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(stream, client, number, started) for number in range(8)]
        started.wait(120)
        askers = [pool.submit(ask_on, number) for number in range(4)]
        words = mock_box.dynbox("drain", DRAINED).stdout
        over.set()
        finished = [each.result(120) for each in streams]
        asked = {worker for each in askers for worker in each.result(120)}
    assert words == f"{DRAINED} is drained; `dynbox restart {DRAINED}` brings it back\n"
    assert [tokens for _, tokens in finished] == [TOKENS] * 8
    assert {worker for worker, _ in finished} == {DRAINED, OTHER}
    assert OTHER in asked

    assert {ask(client, f"{number} then") for number in range(8)} == {OTHER}
    eventually(lambda: set(mock_box.process("frontend")["figures"]["by_worker"]) == {OTHER}, "the drained one is gone")
    with pytest.raises(openai.BadRequestError, match=OTHER):
        ask(client, "hello", pin=DRAINED)
    assert mock_box.ps()["box"]["state"] == "degraded"
    eventually(lambda: mock_box.process("frontend")["figures"]["errors"] >= 1, "figures come a moment later")
    frontend = mock_box.process("frontend")["figures"]
    assert (frontend["errors"], frontend["disconnected"]) == (1, 0), "nobody but the one who asked for the drained one"

    mock_box.dynbox("restart", DRAINED)
    assert mock_box.wait_ready()["models"][0]["workers_ready"] == 2
    assert ask(client, "hello", pin=DRAINED) == DRAINED


def test_the_command_says_what_became_of_it(mock_box: Box) -> None:
    after = json.loads(mock_box.dynbox("drain", DRAINED, "--drain", "0", "--json").stdout)
    assert (after["name"], after["state"], after["pid"]) == (DRAINED, "stopped", None)
    assert "was drained already" in mock_box.dynbox("drain", DRAINED).stdout
    assert "only workers can" in mock_box.dynbox("drain", "router", code=2).stderr
    assert "did you mean" in mock_box.dynbox("drain", "tiny.aggregated.9", code=3).stderr
    for verb, value in (("drain", "nan"), ("restart", "inf")):
        assert "is not a number of seconds" in mock_box.dynbox(verb, DRAINED, "--drain", value, code=2).stderr
