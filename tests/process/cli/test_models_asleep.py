"""`dynbox sleep`, `wake` and `gms`, and what `ps` says of models that sleep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dynamo_box.protocol import control
from dynamo_box.protocol.figures import GmsFigures, LayoutEvent, LayoutFigures, LockHolder
from dynamo_box.protocol.residency import Residency
from dynamo_box.snapshot import BoxSnapshot, ModelInfo, ProcessInfo

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
Complete = Callable[..., list[str]]
DEADLINE_S = 90
NOW = 1_800_000_000.0
ASLEEP = Residency("smollm2", "asleep", "host", since=NOW - 190, sleeps=1)
AWAKE = Residency(
    "smollm2",
    "awake",
    "device",
    sleeps=2,
    wakes=2,
    slept_s=192.0,
    wake_phases={"attach": 0.001, "remap": 0.003, "populate": 0.06, "canary": 0.21, "register": 0.002, "total": 0.42},
)


def freed(bytes_: int, *holders: str) -> control.Freed:
    return control.Freed("cpu", 565 << 20, bytes_, holders)


def box_with(supervisor: Any, *residencies: Residency, processes: tuple[ProcessInfo, ...] | None = None) -> None:
    state: BoxSnapshot = supervisor.state
    models = tuple(ModelInfo(one.model, one.state, "", 0, 1, residency=one) for one in residencies)
    changes: dict[str, Any] = {"models": models, "at": NOW}
    if processes is not None:
        changes["processes"] = processes
    supervisor.state = msgspec.structs.replace(state, **changes)


# sleep


def test_sleep_asks_for_what_the_options_say_and_prints_what_was_freed(supervisor: Any, dynbox: Dynbox) -> None:
    text = "smollm2 sleeps in host memory: cpu freed 561 MiB of 565 MiB in 0.31 s"
    supervisor.handlers[control.SleepModel] = lambda request: [
        control.ModelSlept(request.id, ASLEEP, (freed(561 << 20),), text=text)
    ]
    assert dynbox("sleep", "smollm2").stdout == text + "\n"
    dynbox("sleep", "smollm2", "--to", "disk", "--force", "--hold", "--drain", "5")
    plain, full = (request for request in supervisor.requests if isinstance(request, control.SleepModel))
    assert (plain.model, plain.to, plain.force, plain.hold, plain.drain_s) == ("smollm2", None, False, False, 30.0)
    assert (full.to, full.force, full.hold, full.drain_s) == ("disk", True, True, 5.0)

    data = json.loads(dynbox("sleep", "smollm2", "--json").stdout)
    assert data["freed"] == [
        {"device": "cpu", "expected_bytes": 565 << 20, "freed_bytes": 561 << 20, "holders": [], "fell_short": False}
    ]
    assert (data["already"], data["residency"]["place"], data["text"]) == (False, "host", text)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_memory_that_is_still_held_is_exit_1_and_names_who_holds_it(
    supervisor: Any, dynbox: Dynbox, more: tuple[str, ...]
) -> None:
    supervisor.handlers[control.SleepModel] = lambda request: [
        control.ModelSlept(
            request.id, ASLEEP, (freed(300 << 20, "python (pid 77)", "\x1b[2Jx (pid 78)"),), text="slept"
        )
    ]
    done = dynbox("sleep", "smollm2", *more, code=1)
    assert done.stderr.splitlines() == [
        "error: smollm2 sleeps, but some of its memory is still held",
        r"  cpu: 265 MiB of 565 MiB, by python (pid 77), \x1b[2Jx (pid 78)",
        "hint: restart or end those who hold it: `dynbox restart NAME`, or kill the pid",
    ]
    assert done.stdout, "what was done is said all the same"


def test_to_sleep_again_and_to_wake_again_is_well(supervisor: Any, dynbox: Dynbox) -> None:
    supervisor.handlers[control.SleepModel] = lambda request: [
        control.ModelSlept(request.id, ASLEEP, already=True, text="smollm2 sleeps in host already")
    ]
    supervisor.handlers[control.WakeModel] = lambda request: [
        control.ModelWoken(request.id, AWAKE, already=True, text="smollm2 is awake already")
    ]
    assert dynbox("sleep", "smollm2").stdout == "smollm2 sleeps in host already\n"
    assert dynbox("wake", "smollm2").stdout == "smollm2 is awake already\n"
    assert json.loads(dynbox("wake", "smollm2", "--json").stdout)["already"] is True


def test_a_refusal_is_quoted_with_its_exit_code(supervisor: Any, dynbox: Dynbox) -> None:
    supervisor.handlers[control.SleepModel] = lambda request: [
        control.Error(request.id, 4, "2 requests still run after 30 s", "cancel them with --force")
    ]
    done = dynbox("sleep", "smollm2", code=4)
    assert done.stderr.splitlines() == ["error: 2 requests still run after 30 s", "hint: cancel them with --force"]


@pytest.mark.parametrize("verb", ["sleep", "wake"])
def test_a_model_that_is_not_there_is_exit_3(supervisor: Any, dynbox: Dynbox, verb: str) -> None:
    done = dynbox(verb, "smolm2", code=3)
    assert done.stderr.splitlines() == ["error: no model is called 'smolm2'", "hint: did you mean smollm2?"]
    assert not any(isinstance(request, control.SleepModel | control.WakeModel) for request in supervisor.requests)


@pytest.mark.parametrize("arguments", [("sleep", "m"), ("wake", "m"), ("gms",), ("gms", "--json")])
def test_without_a_box_it_is_exit_3(box_env: Any, dynbox: Dynbox, arguments: tuple[str, ...]) -> None:
    assert "no box is running" in dynbox(*arguments, code=3).stderr


@pytest.mark.parametrize("wrong", [("--to", "moon"), ("--drain", "nan"), ("--drain", "-1"), ()])
def test_wrong_words_are_exit_2(supervisor: Any, dynbox: Dynbox, wrong: tuple[str, ...]) -> None:
    dynbox("sleep", *(("smollm2", *wrong) if wrong else ()), code=2)


# wake


def test_wake_prints_how_long_it_took(supervisor: Any, dynbox: Dynbox) -> None:
    text = "smollm2 is awake after 0.42 s (attach 1 ms, remap 3 ms, populate 60 ms, canary 210 ms, register 2 ms)"
    supervisor.handlers[control.WakeModel] = lambda request: [control.ModelWoken(request.id, AWAKE, text=text)]
    assert dynbox("wake", "smollm2").stdout == text + "\n"
    data = json.loads(dynbox("wake", "smollm2", "--json").stdout)
    assert list(data["residency"]["wake_phases"]) == ["attach", "remap", "populate", "canary", "register", "total"]


@pytest.mark.parametrize(
    ("verb", "request_type", "words"),
    [
        ("sleep", control.SleepModel, "it goes on falling asleep; `dynbox ps` shows how far it is\n"),
        ("wake", control.WakeModel, "it goes on waking; `dynbox ps` shows how far it is\n"),
    ],
)
def test_ctrl_c_ends_only_the_waiting(supervisor: Any, verb: str, request_type: type, words: str) -> None:
    asked, over = threading.Event(), threading.Event()

    def hold(request: control.ControlRequest) -> list[control.ControlReply]:
        asked.set()
        over.wait(DEADLINE_S)
        return []

    supervisor.handlers[request_type] = hold
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo_box", verb, "smollm2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )
    try:
        assert asked.wait(DEADLINE_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        over.set()
        process.kill()
    assert (process.returncode, out, err) == (130, "", words)


# ps


def test_ps_says_who_sleeps_where_and_for_how_long(supervisor: Any, dynbox: Dynbox) -> None:
    held = msgspec.structs.replace(ASLEEP, model="held", place="disk", held=True)
    mock = msgspec.structs.replace(ASLEEP, model="mock", place="", engine_sleeps=False)
    waking = Residency("waking", "waking", "host", phase="remap")
    leaving = Residency("leaving", "falling_asleep", "device", phase="draining")
    box_with(supervisor, ASLEEP, held, mock, waking, leaving, msgspec.structs.replace(AWAKE, model="awake"))
    lines = dynbox("ps").stdout.splitlines()
    assert lines[1:8] == [
        "model smollm2  asleep in host for 3m10s  wakes on request",
        "model held  asleep on disk for 3m10s  held: `dynbox wake held` wakes it",
        "model mock  asleep for 3m10s  its engine can't sleep: its workers are stopped; wakes on request",
        "model waking  waking  remap",
        "model leaving  falling asleep  draining",
        "model awake  awake  0 of 1 workers",
        "  slept 2 times, 3m12s; last woke in 420 ms (attach 1 ms, remap 3 ms, populate 60 ms, canary 210 ms, "
        "register 2 ms)",
    ]


def test_ps_says_that_waking_was_a_cold_start_and_why(supervisor: Any, dynbox: Dynbox) -> None:
    cold = msgspec.structs.replace(AWAKE, cold=True, note="the snapshot is damaged\x1b[2J", wake_phases={"total": 2.5})
    box_with(supervisor, cold)
    assert r"last woke in 2.50 s; a cold start: the snapshot is damaged\x1b[2J" in dynbox("ps").stdout


def test_names_of_models_are_completed(supervisor: Any, complete: Complete) -> None:
    for verb in ("sleep", "wake"):
        assert complete(f"dynbox {verb} s", of_box=True) == ["smollm2"]


# gms


def service(figures: GmsFigures | None, state: str = "ready", cause: str = "") -> ProcessInfo:
    return ProcessInfo("gms@cpu", "gms", None, None, state, "", 70, 0, "cpu", 30_000_000, cause=cause, figures=figures)


LAYOUTS = (
    LayoutFigures(
        "smollm2", "committed", "device", 3, "0123456789abcdef0123", 538_968_064, device_bytes=538_968_064,
        allocations=4, entries=272,
        readers=(
            LockHolder("smollm2.aggregated.0", 71, "ro", NOW - 61),
            LockHolder("smollm2.aggregated.1", 72, "ro", NOW - 5),
        ),
        waiters=(LockHolder("\x1b[31mstranger", 99, "rw", NOW - 2.5),),
        history=(LayoutEvent(NOW - 61, "epoch 3 committed by smollm2.aggregated.0"),),
    ),
    LayoutFigures(
        "other", "writing", "host", 0, "", 0, moving="disk", writer=LockHolder("other.aggregated.0", 73, "rw", NOW - 1)
    ),
)  # fmt: skip


def test_gms_shows_layouts_and_who_has_to_do_with_them(supervisor: Any, dynbox: Dynbox) -> None:
    figures = GmsFigures("cpu", 1 << 30, device_bytes=538_968_064, host_capacity_bytes=1 << 30, layouts=LAYOUTS)
    box_with(supervisor, AWAKE, processes=(service(figures),))
    done = dynbox("gms", TZ="UTC")
    at = time.strftime("%H:%M:%S", time.gmtime(NOW - 61))
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "gms@cpu  ready  cpu: 514 MiB of 1.0 GiB, host 0 B of 1.0 GiB, disk 0 B",
        "LAYOUT   STATE      PLACE        EPOCH    BYTES  READERS  WRITER              WAITERS  HASH",
        "smollm2  committed  device           3  514 MiB        2  -                         1  0123456789ab",
        "other    writing    host → disk      0      0 B        0  other.aggregated.0        0  -",
        "",
        "smollm2",
        "  reads  smollm2.aggregated.0 (pid 71)  for 1m01s",
        "  reads  smollm2.aggregated.1 (pid 72)  for 5s",
        r"  waits for rw  \x1b[31mstranger (pid 99)  for 2s",
        f"  {at}  epoch 3 committed by smollm2.aggregated.0",
        "",
        "other",
        "  writes  other.aggregated.0 (pid 73)  for 1s",
    ]


def test_gms_json_has_readers_writers_and_waiters_with_their_age(supervisor: Any, dynbox: Dynbox) -> None:
    box_with(supervisor, AWAKE, processes=(service(GmsFigures("cpu", 1 << 30, layouts=LAYOUTS)),))
    (found,) = json.loads(dynbox("gms", "--json").stdout)["services"]
    assert (found["name"], found["state"], found["device"], found["capacity_bytes"]) == (
        "gms@cpu",
        "ready",
        "cpu",
        1 << 30,
    )
    first, second = found["layouts"]
    assert (first["state"], first["epoch"], first["layout_hash"]) == ("committed", 3, "0123456789abcdef0123")
    assert [(reader["owner"], reader["pid"], reader["age_s"]) for reader in first["readers"]] == [
        ("smollm2.aggregated.0", 71, 61.0),
        ("smollm2.aggregated.1", 72, 5.0),
    ]
    assert first["writers"] == []
    assert first["waiters"][0]["age_s"] == 2.5
    assert first["history"][0]["text"].startswith("epoch 3")
    assert [writer["owner"] for writer in second["writers"]] == ["other.aggregated.0"]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_service_that_is_down_is_said_to_be(supervisor: Any, dynbox: Dynbox, more: tuple[str, ...]) -> None:
    box_with(supervisor, AWAKE, processes=(service(None, "backoff", "killed by SIGKILL"),))
    done = dynbox("gms", *more)
    assert done.stderr == (
        "warning: gms@cpu is backoff: killed by SIGKILL; its readers go on, and what is committed is kept\n"
    )
    if more:
        assert json.loads(done.stdout)["services"][0]["layouts"] == []


def test_a_box_without_a_service_says_so(supervisor: Any, dynbox: Dynbox) -> None:
    done = dynbox("gms")
    assert (done.stdout, done.stderr) == ("", "no engine of profile smollm2 shares its weights: there is no service\n")
    assert json.loads(dynbox("gms", "--json").stdout) == {"services": []}
