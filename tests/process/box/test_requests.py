"""Whatever ends a request, nothing of it stays: no sequence on a worker, no lease at the router, no place in line."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from box_under_test import Box, eventually


def post(box: Box, body: dict[str, Any] | bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.suppress(ConnectionError):  # who is refused may be answered before all of it is sent
        connection.request("POST", path, data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def figures(box: Box, kind: str) -> list[dict[str, Any] | None]:
    """Who has just begun has none."""
    return [each["figures"] for each in box.ps()["processes"] if each["kind"] == kind]


def idle(box: Box) -> bool:
    workers, (router,), (frontend,) = (figures(box, kind) for kind in ("worker", "router", "frontend"))
    return (
        all(each and each["running"] == each["waiting"] == each["kv_blocks_used"] == 0 for each in workers)
        and bool(router and router["active_requests"] == 0)
        and bool(frontend and frontend["active"] == 0)
    )


def test_every_ending_gives_everything_back(mock_box: Box) -> None:
    client = mock_box.client(timeout=120)

    def finish(number: int) -> None:
        client.completions.create(model="tiny", prompt=f"{number} hello " * 20, max_tokens=16)

    def hang_up(number: int) -> None:
        stream = client.completions.create(model="tiny", prompt=f"{number} bye " * 20, max_tokens=1000, stream=True)
        next(iter(stream))
        stream.close()

    def refused(_: int) -> None:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="word " * 4000, max_tokens=1)

    def stopped(number: int) -> None:
        answer = client.completions.create(model="tiny", prompt=f"{number} stop", max_tokens=500, stop=["e", "a", "o"])
        assert answer.choices[0].finish_reason in ("stop", "length")

    with ThreadPoolExecutor(16) as pool:
        work = [pool.submit(act, number) for number in range(20) for act in (finish, hang_up, refused, stopped)]
        for each in work:
            each.result(timeout=120)
    eventually(lambda: idle(mock_box), "everything was given back")


def test_a_worker_that_crashes_in_mid_stream_is_named_and_comes_back(mock_box: Box) -> None:
    stream = mock_box.client(timeout=120).completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=50,
        stream=True,
        extra_body={"nvext": {"annotations": ["mock:crash:after=5"]}},
    )
    with pytest.raises(openai.APIError, match=r"tiny\.aggregated\.[01]"):
        for _ in stream:
            pass
    mock_box.wait_ready()
    eventually(lambda: idle(mock_box), "everything was given back")


def test_a_request_whose_worker_dies_before_its_first_token_is_answered_by_another(mock_box: Box) -> None:
    workers = {each["name"]: each["pid"] for each in mock_box.ps()["processes"] if each["kind"] == "worker"}
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, mock_box, {"model": "tiny", "prompt": "hello", "max_tokens": 5})

        def placed() -> str | None:
            (frontend,) = figures(mock_box, "frontend")
            return frontend["live"][0]["worker"] if frontend and frontend["live"] else None

        first = eventually(placed, "the request was placed")
        os.kill(workers.pop(first), signal.SIGKILL)
        for pid in workers.values():
            os.kill(pid, signal.SIGCONT)
        status, body = asked.result(timeout=120)
    assert status == 200, body
    assert body["usage"]["completion_tokens"] == 5
    mock_box.wait_ready()


def test_the_request_id_is_in_the_lines_of_every_process_that_saw_it(mock_box: Box) -> None:
    status, _ = post(mock_box, {"model": "tiny", "prompt": "hello"}, **{"x-request-id": "follow-me"})
    assert status == 200

    def seen() -> bool:
        lines = [json.loads(line) for line in mock_box.dynbox("logs", "--json", "-n", "500").stdout.splitlines()]
        processes = {line["process"] for line in lines if line.get("request_id") == "follow-me"}
        return "frontend" in processes and any(name.startswith("tiny.") for name in processes)

    eventually(seen, "frontend and worker logged the request id")


ODD_BODIES: list[Any] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b"\xff\xfe",
    b"[" * 100_000,
    {"model": "tiny"},
    {"model": 5, "prompt": "x"},
    {"model": "tiny", "prompt": {}},
    {"model": "tiny", "prompt": []},
    {"model": "tiny", "prompt": ""},
    {"model": "tiny", "prompt": [-1]},
    {"model": "tiny", "prompt": [2**31]},
    {"model": "tiny", "prompt": ["a", "b"]},
    {"model": "tiny", "prompt": "x", "temperature": "hot"},
    {"model": "tiny", "prompt": "x", "temperature": 1e300},
    {"model": "tiny", "prompt": "x", "top_p": 0},
    {"model": "tiny", "prompt": "x", "max_tokens": -1},
    {"model": "tiny", "prompt": "x", "max_tokens": 10**30},
    {"model": "tiny", "prompt": "x", "stop": ["a"] * 5},
    {"model": "tiny", "prompt": "x", "stop": [""]},
    {"model": "tiny", "prompt": "x", "seed": 1.5},
    {"model": "tiny", "prompt": "x", "n": 2},
    {"model": "tiny", "prompt": "x", "logprobs": 1},
    {"model": "tiny", "prompt": "x", "nvext": {"backend_instance_id": "nobody"}},
    {"model": "tiny", "prompt": "x", "nvext": {"extra_fields": ["secrets"]}},
]


@pytest.mark.timeout(180)
def test_odd_bodies_are_400s_that_say_what_is_wrong(mock_box: Box) -> None:
    for body in ODD_BODIES:
        status, answer = post(mock_box, body)
        assert status == 400, (body, answer)
        assert answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    assert post(mock_box, {"model": "tiny", "prompt": "hello"})[0] == 200


def test_other_paths_methods_hosts_and_sizes_are_refused_in_the_same_shape(mock_box: Box) -> None:
    assert post(mock_box, {"model": "other", "prompt": "x"})[0] == 404
    assert post(mock_box, {}, path="/v1/embeddings")[0] == 404
    assert post(mock_box, {}, path="/v1/models")[0] == 405
    assert post(mock_box, {"model": "tiny", "prompt": "x"}, Host="rebound.example.com")[0] == 403
    status, answer = post(mock_box, b" " * (9 * 1024 * 1024))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
