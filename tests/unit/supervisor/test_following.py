"""A box that follows advice by itself: what it measures, does, says, and leaves alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from dynamo_box.errors import BoxError
from dynamo_box.plan.types import Following as Settings
from dynamo_box.protocol.figures import FrontendFigures, Latency, Quantiles, RouterFigures, WorkerFigures
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxInfo, BoxSnapshot, ModelInfo, ProcessInfo, Targets
from dynamo_box.supervisor.acts import Acts
from dynamo_box.supervisor.following import Following

AT_ONCE = Settings(auto=True, look_every_s=0.0, lasting_s=0.0, settle_s=0.0, reverse_s=0.0)
EVENTUALLY = Settings(auto=True, look_every_s=0.0, lasting_s=3600.0)


@dataclass
class Asked:
    """Stands for `Acts`: what it was asked for, and whether it refuses."""

    done: list[tuple[str, ...]] = field(default_factory=list)
    refuses: bool = False

    async def set_role(self, worker: str, role: str, _drain_s: float) -> str:
        self.done.append(("role", worker, role))
        if self.refuses:
            raise BoxError("it goes on as it was")
        return ""

    async def set_option(self, process: str, key: str, value: str) -> str:
        self.done.append(("set", process, key, value))
        return ""


class Machine:
    """A box in which time passes by ten seconds a look, and each worker is busy for its share of that."""

    def __init__(self, busy: dict[str, float], ttft_s: float, state: str = "ready") -> None:
        self.busy = busy
        self.ttft_s = ttft_s
        self.state = state
        self.at = 0.0

    def snapshot(self) -> BoxSnapshot:
        self.at += 10.0
        workers = [
            ProcessInfo(
                name=name,
                kind="worker",
                model="m",
                role=name.split(".")[0],
                state=self.state,
                phase="",
                pid=7,
                restarts=0,
                device="cpu",
                rss_bytes=None,
                figures=WorkerFigures(busy_s=share * self.at, role=name.split(".")[0]),
            )
            for name, share in self.busy.items()
        ]
        latency = {name: Latency(ttft=Quantiles(p99=self.ttft_s)) for name in self.busy}
        others = [
            ProcessInfo("frontend", "frontend", None, None, "ready", "", 8, 0, None, None,
                        figures=FrontendFigures(by_worker=latency)),
            ProcessInfo("router", "router", None, None, "ready", "", 9, 0, None, None,
                        figures=RouterFigures(disagg_settings=Disagg(min_uncached_tokens=100))),
        ]  # fmt: skip
        model = ModelInfo("m", "ready", targets=Targets(ttft_s=0.5))
        box = BoxInfo("ready", "p", "http://127.0.0.1:1", 1, 1.0)
        return BoxSnapshot(box, (model,), (*workers, *others), at=self.at)


def follow(
    machine: Machine,
    settings: Settings,
    asked: Asked,
    *,
    looks: int = 3,
    changing: Callable[[], str] = lambda: "",
) -> list[tuple[str, str]]:
    """The events of so many looks."""
    events: list[tuple[str, str]] = []

    async def run() -> None:
        following = Following(
            settings,
            cast(Acts, asked),
            snapshot=machine.snapshot,
            changing=changing,
            emit=lambda level, _process, text: events.append((level, text)),
        )
        for _ in range(looks):
            following.tick()
            await asyncio.sleep(0)
        await following.close()

    asyncio.run(run())
    return events


BUSY_PREFILL = {"prefill.0": 0.98, "decode.0": 0.3, "decode.1": 0.2}


def test_a_role_is_flipped_with_its_reasons_told() -> None:
    asked = Asked()
    (event,) = follow(Machine(BUSY_PREFILL, ttft_s=0.9), AT_ONCE, asked, looks=2)
    assert asked.done == [("role", "decode.1", "prefill")]
    assert event[0] == "info"
    assert event[1].startswith("by itself: dynbox role decode.1 prefill (first token: 900 ms for 99 of 100")


def test_a_threshold_is_set() -> None:
    asked = Asked()
    follow(Machine({"prefill.0": 0.98, "decode.0": 0.3}, ttft_s=0.9), AT_ONCE, asked, looks=2)
    assert asked.done == [("set", "router", "disagg", "conditional:min_uncached_tokens=100")]


def test_what_has_not_lasted_is_not_followed() -> None:
    asked = Asked()
    assert follow(Machine(BUSY_PREFILL, ttft_s=0.9), EVENTUALLY, asked, looks=10) == []
    assert asked.done == []


def test_nothing_is_begun_while_something_changes_or_a_worker_is_not_ready() -> None:
    asked = Asked()
    assert follow(Machine(BUSY_PREFILL, 0.9), AT_ONCE, asked, changing=lambda: "decode.0 is being drained") == []
    assert follow(Machine(BUSY_PREFILL, 0.9, state="draining"), AT_ONCE, asked) == []
    assert asked.done == []


def test_without_being_told_to_nothing_is_followed_nor_measured() -> None:
    asked, machine = Asked(), Machine(BUSY_PREFILL, 0.9)
    assert follow(machine, Settings(), asked) == []
    assert (asked.done, machine.at) == ([], 0.0)


def test_a_worker_that_takes_turns_in_being_the_idlest_is_no_reason_to_wait() -> None:
    asked, machine = Asked(), Machine(BUSY_PREFILL, 0.9)
    settings = Settings(auto=True, look_every_s=0.0, lasting_s=0.02)

    def alternate() -> str:
        machine.busy["decode.0"], machine.busy["decode.1"] = machine.busy["decode.1"], machine.busy["decode.0"]
        return ""

    events: list[tuple[str, str]] = []
    while not events:
        events = follow(machine, settings, asked, looks=2000, changing=alternate)
    assert asked.done[0][0] == "role"


def test_a_refusal_is_told() -> None:
    asked = Asked(refuses=True)
    events = follow(Machine(BUSY_PREFILL, 0.9), AT_ONCE, asked, looks=2)
    assert ("warning", "by itself: dynbox role decode.1 prefill failed: it goes on as it was") in events
