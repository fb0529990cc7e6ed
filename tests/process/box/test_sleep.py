"""Sleep and wake of a model whose engine can't: its workers are stopped and started, and nobody's request is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from box_under_test import Box, eventually
from mock_box import MockBox

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError, NotRunning, TimedOut
from dynamo_box.paths import RunDir

MODEL = "tiny"
TIMEOUT_S = 120.0


def control(box: Box) -> ControlClient:
    return ControlClient.connect(RunDir(box.run_dir))


def sleep(box: Box, **how: Any) -> Any:
    with control(box) as client:
        return client.sleep(MODEL, timeout_s=TIMEOUT_S, **how)


def wake(box: Box) -> Any:
    with control(box) as client:
        return client.wake(MODEL, timeout_s=TIMEOUT_S)


def model(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = box.ps()["models"][0]
    return found


def answer(client: openai.OpenAI, tokens: int = 4) -> int:
    done = client.completions.create(
        model=MODEL, prompt="hello there", max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    assert done.usage is not None
    return done.usage.completion_tokens


def test_asleep_its_workers_are_gone_and_a_request_brings_them_back(mock_box: MockBox) -> None:
    client = mock_box.client(timeout=TIMEOUT_S)
    assert answer(client) == 4
    slept = sleep(mock_box)
    assert not slept.already and not slept.residency.engine_sleeps
    states = {each["name"]: each["state"] for each in mock_box.ps()["processes"]}
    assert states["tiny.aggregated.0"] == states["tiny.aggregated.1"] == "stopped"
    assert model(mock_box)["state"] == "asleep" and mock_box.ps()["box"]["state"] == "ready"
    assert [each.id for each in client.models.list()] == [MODEL]
    with urllib.request.urlopen(f"http://127.0.0.1:{mock_box.port}/health", timeout=TIMEOUT_S) as health:
        assert health.status == 200
    assert answer(client) == 4
    now = model(mock_box)
    assert now["state"] == "ready" and now["residency"]["wakes"] == 1 and now["residency"]["sleeps"] == 1
    assert "start" in now["residency"]["wake_phases"]


def test_sleep_and_wake_are_idempotent(mock_box: MockBox) -> None:
    assert wake(mock_box).already
    assert not sleep(mock_box).already
    assert sleep(mock_box).already
    assert not wake(mock_box).already
    assert wake(mock_box).already
    assert model(mock_box)["residency"]["sleeps"] == 1


def test_whoever_asks_at_once_gets_one_sleep_and_one_wake(mock_box: MockBox) -> None:
    with ThreadPoolExecutor(8) as pool:
        slept = [each.result() for each in [pool.submit(sleep, mock_box) for _ in range(8)]]
        assert [each.already for each in slept].count(False) == 1
        woken = [each.result() for each in [pool.submit(wake, mock_box) for _ in range(8)]]
        assert [each.already for each in woken].count(False) == 1


def test_an_unknown_model_is_named(mock_box: MockBox) -> None:
    with control(mock_box) as client:
        with pytest.raises(NotRunning, match="no model is called 'tini'"):
            client.sleep("tini", timeout_s=TIMEOUT_S)
        with pytest.raises(NotRunning, match="no model is called ''"):
            client.wake("", timeout_s=TIMEOUT_S)


def test_a_held_model_is_woken_by_a_person_alone(mock_box: MockBox) -> None:
    client = mock_box.client(timeout=TIMEOUT_S)
    sleep(mock_box, hold=True)
    with pytest.raises(openai.InternalServerError, match="dynbox wake tiny") as refused:
        answer(client)
    assert refused.value.status_code == 503
    assert model(mock_box)["residency"]["held"]
    wake(mock_box)
    assert answer(client) == 4 and not model(mock_box)["residency"]["held"]


def test_a_stream_is_finished_first_and_force_ends_it_with_the_reason(mock_box: MockBox) -> None:
    client = mock_box.client(timeout=TIMEOUT_S)
    stream = client.completions.create(
        model=MODEL, prompt="go on", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(TimedOut, match="requests still run"):
        sleep(mock_box, drain_s=0.2)
    assert model(mock_box)["state"] == "ready"
    assert answer(client) == 4
    slept = sleep(mock_box, drain_s=TIMEOUT_S)
    assert not slept.already
    assert sum(1 for _ in stream) > 1000
    wake(mock_box)
    stream = client.completions.create(
        model=MODEL, prompt="go on", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    sleep(mock_box, force=True)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass


def test_requests_that_come_while_it_falls_asleep_are_all_answered(mock_box: MockBox) -> None:
    client = mock_box.client(timeout=TIMEOUT_S)
    over = threading.Event()

    def ask_on() -> int:
        answered = 0
        while not over.is_set():
            assert answer(client) == 4
            answered += 1
        return answered

    with ThreadPoolExecutor(6) as pool:
        askers = [pool.submit(ask_on) for _ in range(6)]
        try:
            for _ in range(3):
                sleep(mock_box)
                eventually(lambda: model(mock_box)["state"] == "ready", "woken by the requests that wait")
        finally:
            over.set()
        assert all(asker.result() > 0 for asker in askers)
    assert model(mock_box)["residency"]["wakes"] >= 3


def test_a_sleeping_workers_restart_and_drain_are_refused(mock_box: MockBox) -> None:
    sleep(mock_box)
    with control(mock_box) as client, pytest.raises(BoxError, match="its model is asleep"):
        client.restart("tiny.aggregated.0", 1.0, TIMEOUT_S)
    with control(mock_box) as client, pytest.raises(BoxError, match="its model is asleep"):
        client.drain("tiny.aggregated.0", 1.0, TIMEOUT_S)


def test_a_frontend_that_was_killed_knows_who_sleeps(mock_box: MockBox) -> None:
    sleep(mock_box)
    before = mock_box.process("frontend")["pid"]
    os.kill(before, signal.SIGKILL)
    eventually(lambda: mock_box.process("frontend")["pid"] not in (before, None), "another frontend")
    assert answer(mock_box.client(timeout=TIMEOUT_S)) == 4


def post(box: Box, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{box.port}{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


def test_the_same_over_http_and_in_the_metrics(mock_box: MockBox) -> None:
    status, said = post(mock_box, "/v1/models/tiny/sleep", b'{"hold": true}')
    assert status == 200 and said["state"] == "asleep" and said["held"]
    with urllib.request.urlopen(f"http://127.0.0.1:{mock_box.port}/metrics", timeout=TIMEOUT_S) as response:
        metrics = response.read().decode()
    assert 'dynbox_model_sleeps_total{model="tiny"} 1.0' in metrics
    status, said = post(mock_box, "/v1/models/tiny/wake")
    assert status == 200 and said["state"] == "awake"
    assert answer(mock_box.client(timeout=TIMEOUT_S)) == 4
    assert post(mock_box, "/v1/models/tini/sleep")[0] == 404
    status, said = post(mock_box, "/v1/models/tiny/sleep", b'{"too": "disk"}')
    assert status == 400 and "too" in said["error"]["message"]
