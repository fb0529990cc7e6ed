"""What an act means for the row under the cursor."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.paths import RunDir
from dynamo_box.protocol.control import (
    Done,
    Freed,
    GetSnapshot,
    ModelSlept,
    ModelWoken,
    SetOption,
    SetRole,
    SleepModel,
    SnapshotReply,
    WakeModel,
    request_decoder,
)
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.residency import Residency
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.acts import (
    Order,
    Outcome,
    Refusal,
    carry_out,
    order,
    question,
    router_mode,
    router_policy,
    slept,
    woken,
)
from dynamo_box.tui.model import Act, Tone

MIB = 1 << 20
BUSY = snapshots.busy()
RESTART = Act("r", "restart", "restart", "Drain and restart {row}?")
DRAIN = Act("d", "drain", "drain", "Drain {row}?")
CANCEL = Act("x", "cancel", "cancel", "Cancel {row}?")
SLEEP = Act("z", "sleep", "sleep", "Put {row} to sleep?")
WAKE = Act("w", "wake", "wake")
SHARED = snapshots.shared()
TIERED = snapshots.tiered()
CLEAR = Act("c", "clear", "clear KV tier", "Which?", needs_row=False, of="kvstore")
MODE = Act("m", "mode", "router mode", needs_row=False)
LEGS = snapshots.disaggregated()
POLICY = Act("p", "disagg", "disagg policy", needs_row=False, of="split")
ROLE = Act("o", "role", "role", "What shall {row} serve as?", of="split")


def test_a_process_is_restarted_by_its_name() -> None:
    name = BUSY.processes[1].name
    assert order(RESTART, name, BUSY) == Order("restart", name, run_id=BUSY.box.run_id)


@pytest.mark.parametrize("row", [None, "GPU-0", "gone"])
def test_what_is_no_process_is_refused_in_words(row: str | None) -> None:
    refused = order(RESTART, row, BUSY)
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("restart: ")


def test_only_workers_are_drained_and_the_others_say_why_not() -> None:
    for process in BUSY.processes:
        found = order(DRAIN, process.name, BUSY)
        if process.kind == "worker":
            assert found == Order("drain", process.name, run_id=BUSY.box.run_id)
        else:
            assert isinstance(found, Refusal)
            assert found.reason.startswith(f"drain: {process.name} is no worker")


def test_only_a_live_request_is_cancelled() -> None:
    frontend = next(each.figures for each in BUSY.processes if isinstance(each.figures, FrontendFigures))
    request = frontend.live[0].request_id
    assert order(CANCEL, request, BUSY) == Order("cancel", request, run_id=BUSY.box.run_id)
    assert isinstance(order(CANCEL, "ended-long-ago", BUSY), Refusal)


def test_a_model_sleeps_and_wakes_by_its_name() -> None:
    assert order(SLEEP, "smollm2", SHARED) == Order("sleep", "smollm2", run_id=SHARED.box.run_id)
    for asleep in ("coder", "judge", "chat"):
        assert order(WAKE, asleep, SHARED) == Order("wake", asleep, run_id=SHARED.box.run_id), "held or falling too"
    assert isinstance(order(SLEEP, "guard", SHARED), Order), "a sleep that comes while it wakes has its turn after it"


@pytest.mark.parametrize(
    ("act", "row", "why"),
    [
        (SLEEP, "coder", "sleep: coder is asleep already, its weights in host memory"),
        (SLEEP, "judge", "sleep: judge is asleep already, its weights on disk; only w wakes it"),
        (SLEEP, "chat", "sleep: chat is falling asleep"),
        (WAKE, "smollm2", "wake: smollm2 is awake already"),
        (WAKE, "guard", "wake: guard is waking already"),
        (WAKE, "nobody", "wake: nobody is no model"),
        (SLEEP, "smollm2.aggregated.0", "sleep: smollm2.aggregated.0 is no model"),
        (SLEEP, None, "sleep: there is no row under the cursor"),
    ],
)
def test_what_cannot_sleep_or_wake_as_it_is_says_why(act: Act, row: str | None, why: str) -> None:
    assert order(act, row, SHARED) == Refusal(why)


def test_a_box_that_does_not_say_where_weights_are_puts_nothing_to_sleep() -> None:
    refused = order(SLEEP, "llama", BUSY)
    assert refused == Refusal("sleep: the box doesn't say where the weights of llama are")


def residency(**given: Any) -> Residency:
    return Residency("m", **given)


def test_a_sleep_says_what_was_freed_on_each_device() -> None:
    freed = (Freed("cpu", 700 * MIB, 693 * MIB), Freed("GPU-0", 10 * MIB, 10 * MIB))
    said = slept(ModelSlept(1, residency(state="asleep", place="host"), freed))
    assert said == Outcome("freed 693 MiB of cpu, 10.0 MiB of GPU-0; asleep, weights in host memory", Tone.GOOD)


def test_a_sleep_that_fell_short_names_who_still_holds_it_first() -> None:
    freed = (Freed("cpu", 700 * MIB, 12 * MIB, ("python (pid 812)", "a\x1b[2Jb")),)
    said = slept(ModelSlept(1, residency(state="asleep", place="host"), freed, text="m sleeps"))
    assert said == Outcome("only 12.0 MiB of 700 MiB freed on cpu, held by python (pid 812), a\\x1b[2Jb", Tone.BAD)


def test_what_slept_already_and_what_was_stopped_is_said_to() -> None:
    said = slept(ModelSlept(1, residency(state="asleep", place="disk"), already=True))
    assert said == Outcome("was asleep, weights on disk already", Tone.WARN)
    assert slept(ModelSlept(1, residency(state="asleep"))).text == "stopped: its engine can't sleep"


def test_a_wake_says_how_long_it_took_and_with_what() -> None:
    phases = {"remap": 0.0002, "populate": 0.08, "canary": 0.12, "kv": 0.01, "total": 0.213}
    said = woken(ModelWoken(1, residency(state="awake", place="device", wake_phases=phases)))
    assert said == Outcome("awake in 213 ms (canary 120 ms, populate 80 ms, kv 10 ms)", Tone.GOOD)
    assert woken(ModelWoken(1, residency(state="awake"))).text == "awake"
    assert woken(ModelWoken(1, residency(state="awake"), already=True)) == Outcome("was awake already", Tone.WARN)


def test_a_cold_start_in_place_of_a_wake_says_why() -> None:
    cold = residency(state="awake", cold=True, note="the snapshot is damaged", wake_phases={"total": 3.4})
    said = woken(ModelWoken(1, cold))
    assert said == Outcome("awake in 3.40 s by a cold start: the snapshot is damaged", Tone.WARN)


class Supervisor:
    """One that has a model, and answers one connection as a real one would."""

    def __init__(self, run_dir: RunDir, snapshot: BoxSnapshot, reply: Callable[[Any], Any]) -> None:
        self.asked: list[Any] = []
        self._snapshot, self._reply = snapshot, reply
        run_dir.root.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(run_dir.control_socket))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as stream:
            while head := stream.read(4):
                request = request_decoder.decode(stream.read(int.from_bytes(head, "big")))
                if isinstance(request, GetSnapshot):
                    reply: Any = SnapshotReply(request.id, msgspec.Raw(msgspec.msgpack.encode(self._snapshot)))
                else:
                    self.asked.append(request)
                    reply = self._reply(request)
                body = msgspec.msgpack.encode(reply)
                connection.sendall(len(body).to_bytes(4, "big") + body)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(60.0)


def test_a_sleep_and_a_wake_are_asked_over_the_control_socket(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    freed = (Freed("cpu", MIB, MIB),)
    for wanted, asked, reply, said in (
        (
            Order("sleep", "smollm2", run_id="3999-1", to="disk", force=True),
            SleepModel(2, "smollm2", "disk", True),
            lambda request: ModelSlept(request.id, residency(state="asleep", place="disk"), freed),
            Outcome("freed 1.0 MiB of cpu; asleep, weights on disk"),
        ),
        (
            Order("wake", "coder", run_id="3999-1"),
            WakeModel(2, "coder"),
            lambda request: ModelWoken(request.id, residency(state="awake", place="device")),
            Outcome("awake"),
        ),
    ):
        run_dir.control_socket.unlink(missing_ok=True)
        supervisor = Supervisor(run_dir, SHARED, reply)
        try:
            assert carry_out(run_dir, wanted) == said
        finally:
            supervisor.close()
        assert supervisor.asked == [asked]


def test_a_mode_is_the_routers_whatever_row_is_chosen() -> None:
    found = order(MODE, None, BUSY)
    assert isinstance(found, Order)
    assert found.process == "router"
    assert router_mode(BUSY) == "kv"
    assert isinstance(order(MODE, None, replace(BUSY, processes=())), Refusal)


def test_a_tier_is_the_stores_whatever_row_is_chosen() -> None:
    assert order(CLEAR, "host", TIERED) == Order("clear", "", "kvstore", TIERED.box.run_id)
    assert order(CLEAR, None, BUSY) == Refusal("there is no store that says what it holds")


@pytest.mark.parametrize(("tier", "value"), [("host", "g2"), ("disk", "g3")])
def test_a_tier_is_cleared_by_a_setting_of_the_store(tier: str, value: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    supervisor = Supervisor(run_dir, TIERED, lambda request: Done(request.id, "cleared 2,890 blocks"))
    try:
        wanted = Order("clear", tier, "kvstore", TIERED.box.run_id)
        assert carry_out(run_dir, wanted) == Outcome("cleared 2,890 blocks")
    finally:
        supervisor.close()
    assert supervisor.asked == [SetOption(2, "kvstore", "clear", value)]


def test_a_policy_is_the_routers_and_a_role_a_workers() -> None:
    box = LEGS.box.run_id
    assert order(POLICY, None, LEGS) == Order("disagg", "", "router", box)
    assert isinstance(order(POLICY, None, replace(LEGS, processes=())), Refusal)
    assert router_policy(LEGS) == Disagg("conditional", 1024, 0.5, 32_768)
    assert order(ROLE, "llama70b.decode.0", LEGS) == Order("role", "llama70b.decode.0", run_id=box)
    assert order(ROLE, "router", LEGS) == Refusal("role: router is no worker")
    assert order(ROLE, "gone", LEGS) == Refusal("role: gone is no process")
    assert str(Order("role", "w\x1b[1m.0", role="prefill")) == "role w\\x1b[1m.0 prefill"


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (Order("disagg", "strict", "router", "3999-1"), SetOption(2, "router", "disagg", "strict")),
        (
            Order("role", "llama70b.decode.0", run_id="3999-1", role="prefill"),
            SetRole(2, "llama70b.decode.0", "prefill", 30.0),
        ),
    ],
)
def test_policy_and_role_are_asked_over_the_control_socket(wanted: Order, asked: object, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    supervisor = Supervisor(run_dir, LEGS, lambda request: Done(request.id, "so it is"))
    try:
        assert carry_out(run_dir, wanted) == Outcome("so it is")
    finally:
        supervisor.close()
    assert supervisor.asked == [asked]


def test_foreign_names_have_no_power_over_the_question() -> None:
    assert question(CANCEL, "a\x1b[2Jb {row}") == "Cancel a\\x1b[2Jb {row}?"
    assert question(CANCEL, "a\n\tb\u202e") == "Cancel a  b\\u202e?"


def test_without_a_box_it_fails_as_every_command_does(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        carry_out(RunDir(tmp_path / "none"), Order("restart", "router"))


def test_an_act_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BoxError):
        carry_out(RunDir(tmp_path / "none"), Order("fly", "router"))
