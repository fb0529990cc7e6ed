"""From nothing to an answer and back to nothing, with two workers, wrong requests and killed parts in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from typing import Any

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually
from ports import free_port

pytestmark = pytest.mark.slow


def test_up_answer_ps_logs_down(box: Box) -> None:
    first = box.up()
    assert f"http://127.0.0.1:{box.port}" in first.stdout + first.stderr

    state = json.loads(box.dynbox("ps", "--json").stdout)
    assert {"state", "profile", "endpoint", "pid", "uptime_s"} <= state["box"].keys()
    assert state["box"]["endpoint"] == f"http://127.0.0.1:{box.port}"
    assert state["box"]["state"] == "ready"
    assert [(model["name"], model["state"]) for model in state["models"]] == [("smollm2", "ready")]
    assert {each["kind"] for each in state["processes"]} == {"gms", "kvstore", "router", "worker", "frontend"}
    for process in state["processes"]:
        assert {
            "name", "kind", "model", "role", "state", "phase", "pid", "restarts", "device", "rss_bytes",
        } <= process.keys()  # fmt: skip
        assert process["rss_bytes"] > 1_000_000

    again = box.up()
    assert "already" in again.stdout + again.stderr

    lines = [json.loads(line) for line in box.dynbox("logs", "--json", "-n", "500").stdout.splitlines()]
    assert {"router", "frontend", "smollm2.aggregated.0"} <= {line["process"] for line in lines}
    assert lines == sorted(lines, key=lambda line: line["ts"])

    box.down()
    assert box.pids() == set()
    assert box.dynbox("ps", "--json", code=3)
    assert box.dynbox("logs", "-n", "5").stdout


def test_another_profile_is_told_who_holds_the_box(box: Box) -> None:
    box.up()
    refused = box.dynbox("up", "--profile", "smollm2-duo", "--port", str(free_port()), code=1)
    assert "smollm2" in refused.stderr
    assert str(box.ps()["box"]["pid"]) in refused.stderr
    assert box.ps()["box"]["state"] == "ready"


def test_a_taken_port_is_refused_before_anything_starts(box: Box) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", box.port))
        holder.listen()
        refused = box.dynbox("up", "--port", str(box.port), code=1)
    assert str(box.port) in refused.stderr
    assert str(os.getpid()) in refused.stderr
    assert box.pids() == set()


def test_ctrl_c_during_up_leaves_nothing(box: Box) -> None:
    up = box.start("up", "--port", str(box.port))
    eventually(lambda: len(box.pids()) > 4, "processes are starting")
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=COMMAND_DEADLINE_S)
    assert up.returncode == 130
    assert box.pids() == set()
    box.up()


def test_two_ups_at_once_make_one_box(box: Box) -> None:
    ups = [box.start("up", "--port", str(box.port)) for _ in range(2)]
    outputs = [up.communicate(timeout=COMMAND_DEADLINE_S) for up in ups]
    assert [up.returncode for up in ups] == [0, 0], outputs
    assert sum("already" in out + err for out, err in outputs) == 1, outputs
    assert len([each for each in box.ps()["processes"] if each["kind"] == "frontend"]) == 1


def test_the_second_request_goes_where_its_prefix_is(box: Box) -> None:
    box.up("smollm2-duo")
    client = box.client()
    story = "The quick brown fox jumps over the lazy dog. " * 30
    seen = []
    for question in ("Who jumps?", "Who is lazy?", "What colour is the fox?"):
        raw = client.chat.completions.with_raw_response.create(
            model="smollm2",
            messages=[{"role": "system", "content": story}, {"role": "user", "content": question}],
            max_tokens=2,
            temperature=0,
        )
        usage: Any = raw.parse().usage
        seen.append((raw.headers["x-dynbox-worker"], usage.prompt_tokens_details.cached_tokens))
    assert len({worker for worker, _ in seen}) == 1
    assert seen[0][1] < 64
    assert seen[1][1] > 250
    assert seen[2][1] > 250

    other = client.chat.completions.with_raw_response.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Something else entirely: " + "one two three " * 100}],
        max_tokens=2,
    )
    assert other.headers["x-dynbox-worker"]


@pytest.mark.parametrize("victim", ["smollm2.aggregated.0", "router", "frontend"])
def test_a_killed_part_comes_back_and_the_box_answers(box: Box, victim: str) -> None:
    box.up()
    before = box.process(victim)
    os.kill(before["pid"], signal.SIGKILL)

    def back() -> bool:
        now = box.process(victim)
        return bool(now["state"] == "ready" and now["pid"] != before["pid"] and now["restarts"] == 1)

    eventually(back, f"{victim} restarted")
    box.wait_ready()
    answer = box.client(timeout=120).completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=2, temperature=0
    )
    assert "Paris" in answer.choices[0].text


def test_the_client_of_a_killed_worker_does_not_notice(box: Box) -> None:
    box.up("smollm2-duo")
    client = box.client(timeout=120)
    question: Any = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 1.0, "seed": 3}
    undisturbed = client.completions.create(**question, extra_body={"ignore_eos": True}).choices[0].text
    pids = {name: box.process(name)["pid"] for name in ("smollm2.aggregated.0", "smollm2.aggregated.1")}
    raw = client.completions.with_raw_response.create(**question, stream=True, extra_body={"ignore_eos": True})
    stream = raw.parse()
    text = next(iter(stream)).choices[0].text
    os.kill(pids[raw.headers["x-dynbox-worker"]], signal.SIGKILL)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == undisturbed
    with urllib.request.urlopen(f"http://127.0.0.1:{box.port}/metrics", timeout=30) as response:
        metrics = response.read().decode()
    assert 'dynamo_frontend_model_migration_total{model="smollm2"} 1.0' in metrics


def test_a_killed_supervisor_takes_everything_along_and_up_works_again(box: Box) -> None:
    box.up()
    os.kill(box.ps()["box"]["pid"], signal.SIGKILL)
    eventually(lambda: not box.pids(), "nothing is left")
    box.dynbox("ps", code=3)
    box.up()
    assert box.ps()["box"]["state"] == "ready"


def test_down_without_a_box_says_so(box: Box) -> None:
    assert "no box" in box.dynbox("down", code=3).stderr.lower()


def test_a_box_too_small_for_a_profile_refuses_with_reasons(box: Box) -> None:
    refused = box.dynbox("up", "--profile", "llama70b-disagg", code=2)
    assert "GPU" in refused.stderr
    assert "smollm2" in refused.stderr
    assert box.pids() == set()
