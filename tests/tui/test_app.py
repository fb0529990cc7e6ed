"""The app, fed by a source of the test's own: what is typed, and what stands there then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fakes import snapshots
from msgspec.structs import replace
from rich.cells import cell_len
from textual.pilot import Pilot

from dynamo_box.paths import RunDir
from dynamo_box.protocol.gms import Place
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import acts
from dynamo_box.tui.acts import Order, Outcome
from dynamo_box.tui.app import TopApp
from dynamo_box.tui.dialogs import QuestionDialog, TextDialog
from dynamo_box.tui.filter import Filter
from dynamo_box.tui.keys import KEYS, SCREEN_KEYS, SEEK_KEYS
from dynamo_box.tui.line_widget import LineWidget
from dynamo_box.tui.log_feed import DeliverLog
from dynamo_box.tui.screens import LOGS, SCREENS, view
from dynamo_box.tui.session import Options
from dynamo_box.tui.source import Connected, Deliver, Lost, NewSnapshot, SourceEvent, Why
from dynamo_box.tui.theme_names import THEME_NAMES

DEADLINE_S = 60.0

Play = Callable[["Screen"], Awaitable[None]]


class FedSource:
    """Delivers what the test hands it."""

    acts = True

    def __init__(self) -> None:
        self.closed = False
        self._deliver: Deliver | None = None

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def close(self) -> None:
        self.closed = True

    def give(self, event: SourceEvent) -> None:
        assert self._deliver is not None
        self._deliver(event)


class NoLog:
    def start_log(self, deliver: DeliverLog) -> None:
        pass

    def close_log(self) -> None:
        pass


class Screen:
    """The app as a person sees it."""

    def __init__(self, app: TopApp, pilot: Pilot[None], source: FedSource) -> None:
        self.app, self.pilot, self.source = app, pilot, source

    async def give(self, snapshot: BoxSnapshot) -> None:
        self.source.give(NewSnapshot(snapshot))
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    @property
    def text(self) -> str:
        """Every line of what is open, from the top."""
        return "\n".join(widget.text for widget in self.app.screen.query(LineWidget) if widget.display)

    async def see(self, wanted: str) -> None:
        """Wait until `wanted` stands on the screen."""
        end = time.monotonic() + DEADLINE_S
        while wanted not in self.text:
            assert time.monotonic() < end, f"no {wanted!r} in\n{self.text}"
            await self.pilot.pause(0.02)

    def rows(self, *names: str) -> list[str]:
        """Those of `names` that begin a line, from the top."""
        return [line.split()[0] for line in self.text.splitlines() if line.split() and line.split()[0] in names]


def play(then: Play, options: Options | None = None, size: tuple[int, int] = (120, 40)) -> None:
    async def run() -> None:
        source = FedSource()
        app = TopApp(source, NoLog(), RunDir(Path("/nonexistent/run")), options)
        async with app.run_test(size=size) as pilot:
            await then(Screen(app, pilot, source))
        assert source.closed

    asyncio.run(run())


def with_workers(*names: str, at: float = snapshots.NOW) -> BoxSnapshot:
    box = snapshots.tiny()
    worker = next(each for each in box.processes if each.kind == "worker")
    return replace(box, processes=tuple(replace(worker, name=name) for name in names), at=at)


class TestTyping:
    def test_keys_choose_screens_and_the_header_stays(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.see("llama.aggregated.0")
            for key, seen in (("2", "Traffic"), ("4", "REQUEST"), ("5", "MODEL"), ("7", "TIME"), ("3", "Memory")):
                await screen.press(key)
                await screen.see(seen)
                assert "llama-8gpu" in screen.text
            await screen.press("1")
            await screen.see("PROCESS")

        play(typing)

    def test_a_filter_applies_while_it_is_typed_and_escape_takes_it_back(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(with_workers("alpha", "beta", "gamma"))
            await screen.press("slash", *"!alp")
            assert screen.rows("alpha", "beta", "gamma") == ["beta", "gamma"]
            await screen.press("enter")
            await screen.give(with_workers("alpha", "beta", "gamma", "delta"))
            assert screen.rows("alpha", "beta", "gamma", "delta") == ["beta", "gamma", "delta"]
            await screen.press("escape")
            assert screen.rows("alpha", "beta", "gamma") == ["alpha", "beta", "gamma"]

        play(typing)

    def test_what_is_no_pattern_is_said_and_the_last_good_one_stays(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(with_workers("alpha", "beta"))
            await screen.press("slash", *"beta", "(")
            await screen.see("is no regular expression")
            assert screen.rows("alpha", "beta") == ["beta"]
            await screen.press("backspace")
            assert "is no regular expression" not in screen.text

        play(typing)

    def test_keys_sort_and_each_screen_keeps_its_order(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(with_workers("beta", "alpha"))
            await screen.press("s")
            assert screen.rows("alpha", "beta") == ["alpha", "beta"]
            await screen.press("S")
            assert screen.rows("alpha", "beta") == ["beta", "alpha"]
            await screen.press("S", "5", "1")
            assert screen.rows("alpha", "beta") == ["alpha", "beta"]

        play(typing)

    def test_a_pause_holds_the_screen_and_the_box_goes_on(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(with_workers("alpha"))
            await screen.press("space")
            await screen.give(with_workers("beta", at=snapshots.NOW + 1))
            assert screen.rows("alpha", "beta") == ["alpha"]
            assert "PAUSED" in screen.text
            await screen.press("space")
            assert screen.rows("alpha", "beta") == ["beta"]
            assert "PAUSED" not in screen.text

        play(typing)

    def test_the_detail_is_kept_up_to_date_and_says_when_its_row_is_gone(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(with_workers("alpha", "beta"))
            await screen.press("down", "enter")
            assert isinstance(screen.app.screen, TextDialog)
            assert "beta" in screen.text
            box = with_workers("alpha", "beta", at=snapshots.NOW + 1)
            changed = tuple(replace(each, pid=987654) for each in box.processes)
            await screen.give(replace(box, processes=changed))
            await screen.see("987654")
            await screen.give(with_workers("alpha", at=snapshots.NOW + 2))
            await screen.see("(gone)")
            await screen.press("escape")
            assert not isinstance(screen.app.screen, TextDialog)

        play(typing)

    def test_the_help_names_the_keys_and_acts_of_the_screen(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("question_mark")
            assert "restart" in screen.text
            await screen.press("end")
            assert "columns of" in screen.text
            await screen.press("escape")
            await screen.see("PROCESS")

        play(typing, size=(120, 60))

    @pytest.mark.parametrize("key", ["q", "ctrl+c"])
    def test_it_is_left_by_a_key(self, key: str) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press(key)
            assert not screen.app.is_running

        play(typing)

    def test_ctrl_c_leaves_from_a_dialog_and_from_the_filter(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("slash", "a", "ctrl+c")
            assert not screen.app.is_running

        play(typing)

    def test_the_palette_finds_screens(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("ctrl+p")
            await screen.pilot.press(*"routing")
            await screen.app.workers.wait_for_complete()
            await screen.press("enter")
            await screen.see("Traffic")

        play(typing)

    def test_every_theme_shows_the_same_text(self) -> None:
        async def typing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            before = screen.text
            for _ in THEME_NAMES:
                await screen.press("t")
                assert screen.text == before

        play(typing)


class TestMouse:
    def test_a_click_on_a_head_sorts_and_one_on_a_row_chooses_it(self) -> None:
        async def clicking(screen: Screen) -> None:
            await screen.give(with_workers("beta", "alpha"))
            await screen.pilot.click("#body", offset=(1, 1))
            await screen.pilot.pause()
            assert screen.rows("alpha", "beta") == ["alpha", "beta"]
            await screen.pilot.click("#body", offset=(3, 3), times=2)
            await screen.pilot.pause()
            assert isinstance(screen.app.screen, TextDialog)
            assert "beta" in screen.text

        play(clicking)

    def test_a_click_on_a_tab_opens_its_screen(self) -> None:
        async def clicking(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.pilot.click("#tabs", offset=(12, 0))
            await screen.see("Traffic")

        play(clicking)

    def test_a_click_on_the_logs_ends_the_filters_line(self) -> None:
        """Keys go where was clicked; a line that stood there still could be neither used nor closed."""

        async def clicking(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("6", "slash", "a")
            assert screen.app.query("#filter")
            await screen.pilot.click("#logs", offset=(5, 3))
            await screen.pilot.pause()
            assert not screen.app.query("#filter")
            await screen.press("slash", "b")
            assert screen.app.query("#filter")
            assert screen.app.session.wanted.text == "ab"

        play(clicking)


class TestActs:
    def test_what_hurts_is_asked_first_and_enter_says_no(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(with_workers("alpha"))
            await screen.press("r")
            assert isinstance(screen.app.screen, QuestionDialog)
            assert "alpha" in screen.text
            await screen.press("enter")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert "under way" not in screen.text

        play(acting)

    def test_how_it_went_is_said_with_what_to_do(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(with_workers("alpha"))
            await screen.press("r", "y")
            await screen.see("restart alpha: no box is running; start one with `dynbox up`")

        play(acting)

    def test_readonly_has_no_acts(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(with_workers("alpha"))
            assert "READ ONLY" in screen.text
            assert "restart" not in screen.text
            await screen.press("r")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert not [each for each in screen.app.commands() if each.title.startswith("act:")]

        play(acting, Options(readonly=True))

    def test_a_row_that_is_no_process_cannot_be_restarted(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("tab", "r")
            await screen.see("is no process")

        play(acting)

    def test_a_router_cannot_be_drained_and_it_says_why(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            await screen.press("d")
            await screen.see("drain: router is no worker")
            assert not isinstance(screen.app.screen, QuestionDialog)

        play(acting)


class TestRoles:
    @pytest.mark.parametrize(
        ("keys", "said", "wanted"),
        [
            (
                ("2", "p", "5"),
                "disagg conditional:min_uncached_tokens=2048: done",
                Order("disagg", "conditional:min_uncached_tokens=2048", "router", "3999-1"),
            ),
            (("5", "p", "2"), "disagg strict: done", Order("disagg", "strict", "router", "3999-1")),
            (
                ("1", *["down"] * 3, "o", "1"),
                "role llama70b.prefill.1 prefill: done",
                Order("role", "llama70b.prefill.1", run_id="3999-1", role="prefill"),
            ),
            (
                ("1", *["down"] * 2, "o", "2"),
                "role llama70b.prefill.0 aggregated: done",
                Order("role", "llama70b.prefill.0", run_id="3999-1", role="aggregated"),
            ),
        ],
    )
    def test_each_answer_means_what_it_says(
        self, keys: tuple[str, ...], said: str, wanted: Order, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[Order] = []

        def carried_out(run_dir: RunDir, wanted: Order) -> Outcome:
            told.append(wanted)
            return Outcome("done")

        monkeypatch.setattr(acts, "carry_out", carried_out)

        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.disaggregated())
            await screen.press(*keys)
            await screen.see(said)
            assert told == [wanted]

        play(acting)

    def test_a_role_is_asked_for_and_enter_leaves_it(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.disaggregated())
            await screen.press("down", "down", "o")
            assert isinstance(screen.app.screen, QuestionDialog)
            for said in ("What shall llama70b.prefill.0 serve as", "as now: prefill", "1 decode", "2 both"):
                assert said in screen.text
            await screen.press("enter")
            assert "under way" not in screen.text

        play(acting, size=(80, 24))

    @pytest.mark.parametrize("keys", [("1", "down", "down", "o"), ("2", "p"), ("5", "p")])
    def test_who_only_watches_sets_nothing(self, keys: tuple[str, ...]) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.disaggregated())
            await screen.press(*keys)
            assert not isinstance(screen.app.screen, QuestionDialog)

        play(acting, Options(readonly=True))


class TestClear:
    def test_a_tier_is_chosen_first_and_enter_says_no(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.tiered())
            await screen.press("3", "c")
            assert isinstance(screen.app.screen, QuestionDialog)
            for said in ("Which KV tier", "in host memory: 2,890 blocks, 2.0 GiB", "on disk: 23,900 blocks"):
                assert said in screen.text
            await screen.press("enter")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert "under way" not in screen.text

        play(acting, size=(80, 24))

    @pytest.mark.parametrize(("key", "tier"), [("1", "host"), ("2", "disk")])
    def test_each_answer_means_what_it_says(self, key: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Order] = []

        def carried_out(run_dir: RunDir, wanted: Order) -> Outcome:
            told.append(wanted)
            return Outcome("cleared 12 blocks")

        monkeypatch.setattr(acts, "carry_out", carried_out)

        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.tiered())
            await screen.press("3", "c", key)
            await screen.see(f"clear {tier}: cleared 12 blocks")
            assert told == [Order("clear", tier, "kvstore", "3999-1")]

        play(acting)

    @pytest.mark.parametrize(
        ("snapshot", "readonly"), [(snapshots.shared(), False), (snapshots.tiered(), True)], ids=["none", "readonly"]
    )
    def test_a_box_without_tiers_and_one_that_is_only_watched_has_nothing_to_clear(
        self, snapshot: BoxSnapshot, readonly: bool
    ) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshot)
            await screen.press("c")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert "clear" not in screen.text
            assert not [each for each in screen.app.commands() if "clear" in each.title]

        play(acting, Options(screen="memory", readonly=readonly))

    def test_help_names_the_act_and_the_columns(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.tiered())
            await screen.press("3")
            assert "c clear KV tier" in screen.text
            await screen.press("question_mark")
            await screen.press(*["pagedown"] * 4)
            assert "columns of KV tiers" in screen.text

        play(acting, size=(120, 60))


class TestSleep:
    def test_a_sleep_is_asked_first_with_the_places_and_enter_says_no(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            await screen.press("5", "z")
            assert isinstance(screen.app.screen, QuestionDialog)
            for said in ("Put smollm2 to sleep?", "keeps them: host", "on the device", "to disk", "cancel what runs"):
                assert said in screen.text
            await screen.press("enter")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert "under way" not in screen.text

        play(acting, size=(80, 24))

    @pytest.mark.parametrize(
        ("key", "to", "force"),
        [("y", None, False), ("1", "device", False), ("2", "host", False), ("3", "disk", False), ("c", None, True)],
    )
    def test_each_answer_means_what_it_says(
        self, key: str, to: Place | None, force: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[Order] = []

        def carried_out(run_dir: RunDir, wanted: Order) -> Outcome:
            told.append(wanted)
            return Outcome("freed 693 MiB of cpu; asleep")

        monkeypatch.setattr(acts, "carry_out", carried_out)

        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            await screen.press("5", "z", key)
            await screen.see("sleep smollm2: freed 693 MiB of cpu")
            assert told == [Order("sleep", "smollm2", run_id="3999-1", to=to, force=force)]

        play(acting)

    def test_a_wake_is_not_asked_first(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            await screen.press("5", "down", "w")
            assert not isinstance(screen.app.screen, QuestionDialog)
            await screen.see("wake coder: no box is running; start one with `dynbox up`")

        play(acting)

    def test_what_sleeps_is_not_put_to_sleep_again(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            await screen.press("5", "down", "z")
            await screen.see("sleep: coder is asleep already, its weights in host memory")
            assert not isinstance(screen.app.screen, QuestionDialog)

        play(acting)

    def test_readonly_neither_sleeps_nor_wakes(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            await screen.press("z", "w")
            assert not isinstance(screen.app.screen, QuestionDialog)
            assert "under way" not in screen.text

        play(acting, Options(screen="models", readonly=True))

    def test_help_and_palette_name_the_acts(self) -> None:
        async def acting(screen: Screen) -> None:
            await screen.give(snapshots.shared())
            assert {"act: sleep", "act: wake"} <= {each.title for each in screen.app.commands()}
            await screen.press("question_mark")
            assert "what you can do here" in screen.text
            assert "wake" in screen.text

        play(acting, Options(screen="models"))

    def test_keys_of_acts_mean_nothing_else(self) -> None:
        taken = {part for key in (*KEYS, *SCREEN_KEYS, *SEEK_KEYS) for part in key.key.split(",")}
        assert not {act.key for each in SCREENS if each.name != LOGS for act in view(each.name).acts} & taken


class TestBoxesThatGo:
    def test_before_there_is_one_it_says_how_to_start_it(self) -> None:
        async def waiting(screen: Screen) -> None:
            screen.source.give(Lost(Why.ABSENT, "no box is running", "start one with `dynbox up`"))
            await screen.see("start one with `dynbox up`")
            await screen.press("2", "s", "enter", "down", "tab", "r", "slash", "escape")
            await screen.give(snapshots.busy())
            await screen.see("Traffic")

        play(waiting)

    def test_the_last_screen_stays_and_another_box_takes_its_place(self) -> None:
        async def losing(screen: Screen) -> None:
            screen.source.give(Connected())
            await screen.give(with_workers("alpha"))
            screen.source.give(Lost(Why.BROKEN, "lost: the supervisor went away"))
            await screen.see("reconnecting")
            assert screen.rows("alpha") == ["alpha"]
            other = with_workers("beta", at=snapshots.NOW + 5)
            await screen.give(replace(other, box=replace(other.box, pid=77, run_id="another", profile="other")))
            await screen.see("other")
            assert "reconnecting" not in screen.text
            assert screen.rows("alpha", "beta") == ["beta"]

        play(losing)


class TestSizes:
    @pytest.mark.parametrize("screen_name", ["fleet", "routing", "memory", "requests", "models", "logs", "events"])
    @pytest.mark.parametrize("size", [(20, 5), (80, 24), (200, 60)])
    def test_every_screen_fits(self, screen_name: str, size: tuple[int, int]) -> None:
        async def looking(screen: Screen) -> None:
            await screen.give(snapshots.busy(workers=64, requests=2000))
            await screen.give(snapshots.busy(workers=64, requests=2000))
            lines = screen.text.splitlines()
            assert len(lines) <= size[1]
            assert all(len(line) <= size[0] for line in lines)

        play(looking, Options(screen=screen_name), size)

    @pytest.mark.parametrize("screen_name", ["fleet", "memory", "models"])
    @pytest.mark.parametrize("size", [(40, 10), (80, 24)])
    def test_64_sleeping_models_fit(self, screen_name: str, size: tuple[int, int]) -> None:
        async def looking(screen: Screen) -> None:
            for snapshot in (snapshots.sleepers(), snapshots.hostile(), snapshots.sleepers()):
                await screen.give(snapshot)
                lines = screen.text.splitlines()
                assert len(lines) <= size[1]
                assert all(cell_len(line) <= size[0] for line in lines)

        play(looking, Options(screen=screen_name), size)

    def test_a_terminal_that_shrinks_to_nothing_and_grows_again(self) -> None:
        async def resizing(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            for columns, rows in ((20, 5), (1, 1), (40, 10), (300, 100), (20, 5)):
                await screen.pilot.resize_terminal(columns, rows)
                await screen.pilot.pause()
                await screen.give(snapshots.busy())
                assert ("terminal too" in screen.text) == (columns == 20)
                await screen.press("2", "down", "enter", "escape", "1")
            await screen.pilot.resize_terminal(80, 24)
            await screen.see("PROCESS")
            assert "too small" not in screen.text

        play(resizing)

    def test_nothing_lies_over_the_lines(self) -> None:
        async def looking(screen: Screen) -> None:
            await screen.give(snapshots.busy())
            for widget in screen.app.screen.query(LineWidget):
                if widget.display and widget.size:
                    corner, _ = screen.app.screen.get_widget_at(*widget.region.offset)
                    assert corner is widget

        play(looking)

    def test_only_the_lines_that_changed_are_painted(self) -> None:
        async def counting(screen: Screen) -> None:
            await screen.give(with_workers("alpha", "beta"))
            body = screen.app.query_one("#body", LineWidget)
            painted: list[int] = []
            original = body.render_line

            def counted(y: int):  # type: ignore[no-untyped-def]
                painted.append(y)
                return original(y)

            body.render_line = counted  # type: ignore[method-assign]
            changed = with_workers("alpha", "beta")
            first, second = changed.processes
            await screen.give(replace(changed, processes=(first, replace(second, restarts=7))))
            assert set(painted) == {3}

        play(counting)


def test_foreign_names_are_shown_as_they_are_written() -> None:
    name = "w[bold]0[/]"

    async def looking(screen: Screen) -> None:
        await screen.give(with_workers(name, "模型🚀", "e\x1b[2J"))
        assert name in screen.text
        assert "模型🚀" in screen.text
        assert "\x1b" not in screen.text
        await screen.press("enter")
        assert name in screen.text
        await screen.press("escape", "r")
        assert name in screen.text

    play(looking)


def test_a_filter_from_the_command_line_is_there_from_the_start() -> None:
    async def looking(screen: Screen) -> None:
        await screen.give(with_workers("alpha", "beta"))
        assert screen.rows("alpha", "beta") == ["beta"]

    play(looking, Options(wanted=Filter.parse("beta")))
