"""How each screen looks, at three sizes: a recording is played to one moment, and the picture compared.

The README shows some of these pictures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fakes import snapshots
from picture import assert_same_picture

from dynamo_box.paths import RunDir
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.app import TopApp
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.log_feed import DeliverLog
from dynamo_box.tui.replay import open_replay
from dynamo_box.tui.screens import SCREENS
from dynamo_box.tui.session import Options
from dynamo_box.tui.source import Deliver, Ended, NewSnapshot
from dynamo_box.tui.theme_names import LIGHT, NONE

SIZES = [(80, 24), (120, 36), (200, 50)]
DEADLINE_S = 60.0
DEATH_S = 17.5
"""When the worker that is killed in `disagg` has died and isn't back."""
SHOWN_BY = {
    "fleet": "mock.aggregated",
    "routing": "Decisions",
    "memory": "SIM-00",
    "requests": "Requests ",
    "models": "Models ",
    "logs": " info ",
    "events": "Events ",
}
"""What stands on a screen once it is drawn."""
FLOWING = {"memory": "device→host", "routing": "own pool", "fleet": "smollm2.aggregated"}
"""What stands there once a box with tiers has been watched for a while."""


@pytest.fixture(autouse=True)
def one_time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class Still:
    """A box at one moment, and what was before; it can be told to do something. Time stands, as its link is never said
    to be live.
    """

    acts = True

    def __init__(self, *moments: BoxSnapshot) -> None:
        self._moments = moments

    def start(self, deliver: Deliver) -> None:
        for snapshot in self._moments:
            deliver(NewSnapshot(snapshot))
        deliver(Ended())

    def close(self) -> None:
        pass

    def start_log(self, deliver: DeliverLog) -> None:
        pass

    def close_log(self) -> None:
        pass


def picture(
    demo: str, at_s: float, size: tuple[int, int], options: Options, keys: tuple[str, ...] = (), shown_by: str = ""
) -> str:
    """The SVG of a screen, `at_s` into a shipped recording, after `keys`."""
    replay = open_replay(demo, 1.0)
    replay.set_paused(True)
    replay.seek(at_s)
    app = TopApp(replay, replay, RunDir(Path("/nonexistent/run")), options)
    return drawn(app, size, shown_by or SHOWN_BY[options.screen], keys)


def picture_of(
    moments: Sequence[BoxSnapshot],
    size: tuple[int, int],
    options: Options,
    keys: tuple[str, ...] = (),
    shown_by: str = "smollm2",
) -> str:
    """The SVG of a screen of a box that stands still after `moments`."""
    still = Still(*moments)
    return drawn(TopApp(still, still, RunDir(Path("/nonexistent/run")), options), size, shown_by, keys)


def drawn(app: TopApp, size: tuple[int, int], shown_by: str, keys: tuple[str, ...]) -> str:
    async def draw() -> str:
        async with app.run_test(size=size) as pilot:
            end = time.monotonic() + DEADLINE_S
            while not _is_drawn(app, shown_by):
                assert time.monotonic() < end, "nothing was drawn"
                await pilot.pause(0.02)
            await pilot.press(*keys)
            await pilot.pause()
            return app.export_screenshot(title=f"dynbox top: {app.session.screen}")

    return asyncio.run(draw())


def _is_drawn(app: TopApp, shown_by: str) -> bool:
    return shown_by in "\n".join(widget.text for widget in app.screen.query(LineWidget) if widget.display)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", [each.name for each in SCREENS])
def test_a_routed_load(screen: str, size: tuple[int, int]) -> None:
    assert_same_picture(picture("routed-load", 26.0, size, Options(screen=screen)), f"{screen}-{size[0]}x{size[1]}")


@pytest.mark.parametrize("theme", [LIGHT, NONE])
@pytest.mark.parametrize("screen", ["routing", "memory"])
def test_themes(screen: str, theme: str) -> None:
    options = Options(screen=screen, theme=theme)
    assert_same_picture(picture("routed-load", 26.0, (120, 36), options), f"{screen}-{theme}")


@pytest.mark.parametrize("screen", ["fleet", "events", "logs"])
def test_a_crash_and_the_recovery(screen: str) -> None:
    assert_same_picture(picture("crash-recovery", 38.0, (120, 36), Options(screen=screen)), f"crash-{screen}")


@pytest.mark.parametrize(
    ("name", "screen", "keys"),
    [
        ("help", "fleet", ("question_mark",)),
        ("process", "fleet", ("down", "enter")),
        ("decision", "routing", ("enter",)),
        ("filter", "requests", ("slash", *"!decode")),
    ],
)
def test_what_opens_over_a_screen(name: str, screen: str, keys: tuple[str, ...]) -> None:
    assert_same_picture(picture("routed-load", 26.0, (120, 36), Options(screen=screen), keys), f"over-{name}")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", ["models", "memory"])
def test_models_that_sleep_and_weights_that_are_shared(screen: str, size: tuple[int, int]) -> None:
    name = f"sleep-{screen}-{size[0]}x{size[1]}"
    assert_same_picture(picture_of([snapshots.shared()], size, Options(screen=screen)), name)


@pytest.mark.parametrize(
    ("name", "screen", "keys"),
    [
        ("model", "models", ("down", "enter")),
        ("layout", "memory", ("tab", "enter")),
        ("sleep", "models", ("z",)),
    ],
)
def test_what_opens_over_sleeping_models(name: str, screen: str, keys: tuple[str, ...]) -> None:
    assert_same_picture(picture_of([snapshots.shared()], (120, 36), Options(screen=screen), keys), f"over-{name}")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", ["memory", "routing"])
def test_tiers_with_what_flows(screen: str, size: tuple[int, int]) -> None:
    svg = picture_of(snapshots.moments(snapshots.tiered()), size, Options(screen=screen), shown_by=FLOWING[screen])
    assert_same_picture(svg, f"tiers-{screen}-{size[0]}x{size[1]}")


@pytest.mark.parametrize(
    ("screen", "size"), [("memory", (80, 24)), ("memory", (120, 36)), ("routing", (120, 36)), ("fleet", (120, 36))]
)
def test_a_tier_that_is_suspended(screen: str, size: tuple[int, int]) -> None:
    moments = snapshots.moments(snapshots.tier_suspended())
    svg = picture_of(moments, size, Options(screen=screen), shown_by=FLOWING[screen])
    assert_same_picture(svg, f"suspended-{screen}-{size[0]}x{size[1]}")


@pytest.mark.parametrize(
    ("name", "screen", "keys"),
    [
        ("tier", "memory", ("tab", "down", "enter")),
        ("clear", "memory", ("c",)),
        ("credit", "routing", ("enter",)),
        ("kvstore", "fleet", ("down", "enter")),
    ],
)
def test_what_opens_over_tiers(name: str, screen: str, keys: tuple[str, ...]) -> None:
    moments = snapshots.moments(snapshots.tiered())
    svg = picture_of(moments, (120, 36), Options(screen=screen), keys, FLOWING[screen])
    assert_same_picture(svg, f"over-{name}")


@pytest.mark.parametrize("theme", [LIGHT, NONE])
@pytest.mark.parametrize("screen", ["memory", "routing"])
def test_tiers_in_other_themes(screen: str, theme: str) -> None:
    moments = snapshots.moments(snapshots.tiered())
    svg = picture_of(moments, (120, 36), Options(screen=screen, theme=theme), shown_by=FLOWING[screen])
    assert_same_picture(svg, f"tiers-{screen}-{theme}")


@pytest.mark.parametrize("screen", ["fleet", "routing", "models"])
def test_a_prefill_worker_dies(screen: str) -> None:
    svg = picture("disagg", DEATH_S, (120, 36), Options(screen=screen), shown_by="llama")
    assert_same_picture(svg, f"death-{screen}")


IN_LEGS = {"fleet": "BUSY", "routing": "own pool", "requests": "handover", "models": "dynbox role"}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("screen", IN_LEGS)
def test_requests_in_two_legs(screen: str, size: tuple[int, int]) -> None:
    svg = picture_of(snapshots.moments(snapshots.disaggregated()), size, Options(screen=screen), (), IN_LEGS[screen])
    assert_same_picture(svg, f"disagg-{screen}-{size[0]}x{size[1]}")


@pytest.mark.parametrize(
    ("name", "screen", "keys"),
    [
        ("legs", "routing", ("down", "enter")),
        ("policy", "routing", ("p",)),
        ("role", "fleet", ("down", "down", "o")),
        ("prefill-worker", "fleet", ("down", "down", "enter")),
        ("advice", "models", ("enter",)),
    ],
)
def test_what_opens_over_two_legs(name: str, screen: str, keys: tuple[str, ...]) -> None:
    moments = snapshots.moments(snapshots.disaggregated())
    svg = picture_of(moments, (120, 36), Options(screen=screen), keys, IN_LEGS[screen])
    assert_same_picture(svg, f"over-{name}")


@pytest.mark.parametrize("theme", [LIGHT, NONE])
@pytest.mark.parametrize("screen", ["models", "routing"])
def test_two_legs_in_other_themes(screen: str, theme: str) -> None:
    moments = snapshots.moments(snapshots.disaggregated())
    svg = picture_of(moments, (120, 36), Options(screen=screen, theme=theme), shown_by=IN_LEGS[screen])
    assert_same_picture(svg, f"disagg-{screen}-{theme}")
