"""The routing screen: hit rate and share by worker, and why a request went where it went."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.protocol.figures import Candidate, Decision, RouterFigures, WorkerFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.filter import EVERYTHING
from dynamo_box.tui.history import BUCKET_S, History
from dynamo_box.tui.model import Frame, Lines, Span, Table, Tone
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.text import spans_width
from dynamo_box.tui.views import charts, decisions, sources
from dynamo_box.tui.views.routing import MAX_ROWS, VIEW


def parts(frame: Frame, width: int = 80) -> tuple[list[str], Table]:
    *lines, table = VIEW.panels(frame, width)
    assert isinstance(table, Table)
    return [text for panel in lines for text in as_text(panel)], table


def as_text(panel: object) -> list[str]:
    assert isinstance(panel, Lines)
    return ["".join(span.text for span in line) for line in panel.lines]


def worked(snapshot: BoxSnapshot, steps: list[dict[str, tuple[int, int, int]]]) -> Frame:
    """A frame at the end of `steps`, a bucket each: prompt tokens, cached tokens and requests by worker."""
    history = History()
    history.feed(snapshot)
    for step in steps:
        processes = []
        for process in snapshot.processes:
            figures = process.figures
            if process.name in step and isinstance(figures, WorkerFigures):
                prompt, cached, requests = step[process.name]
                figures = replace(
                    figures,
                    prompt_tokens=figures.prompt_tokens + prompt,
                    cached_tokens=figures.cached_tokens + cached,
                    requests=figures.requests + requests,
                )
            processes.append(replace(process, figures=figures))
        snapshot = replace(snapshot, processes=tuple(processes), at=snapshot.at + BUCKET_S)
        history.feed(snapshot)
    return snapshots.frame(snapshot, history)


def test_the_heat_map_has_a_row_a_worker_and_a_column_a_bucket_newest_to_the_right() -> None:
    first, second = "llama.aggregated.0", "llama.aggregated.1"
    frame = worked(snapshots.busy(2), [{first: (100, 0, 1)}, {}, {first: (100, 100, 1), second: (100, 50, 2)}])
    lines, _ = parts(frame)
    rows = {line.split()[0]: line for line in lines if line.startswith("llama")}
    assert "· █ 100%" in rows[first]
    assert "  ▒  50%" in rows[second]
    assert rows[first].split() == [first, "·", "█", "100%", "━━━━━─────", "50%", "2"]
    assert rows[second].split() == [second, "▒", "50%", "━━━━━─────", "50%", "2"]


def test_the_heat_map_is_as_wide_as_the_screen_allows_and_says_how_far_back_it_goes() -> None:
    snapshot = snapshots.busy()
    lines, _ = parts(worked(snapshot, [{}] * 40))
    assert any("hit rate, the last 2m35s" in line for line in lines)
    lines, _ = parts(worked(snapshot, [{}] * 200), 500)
    assert any("hit rate, the last 15m00s" in line for line in lines)
    lines, _ = parts(worked(snapshot, [{}] * 3))
    assert any("hit rate, watched for 15s" in line for line in lines)


def test_heat_reads_without_colour() -> None:
    assert charts.heat([None, 0.0, 0.25, 0.5, 0.7, 1.0]) == (
        Span(" "),
        Span("·", Tone.HEAT_0),
        Span("░", Tone.HEAT_1),
        Span("▒", Tone.HEAT_2),
        Span("▓", Tone.HEAT_3),
        Span("█", Tone.HEAT_4),
    )
    assert charts.heat([1.0, 0.9, 0.0]) == (Span("██", Tone.HEAT_4), Span("·", Tone.HEAT_0))


def test_of_many_workers_the_busiest_have_rows_in_their_order() -> None:
    busiest = {f"llama.aggregated.{number}": (10, 5, 100 + number) for number in range(50, 62)}
    lines, _ = parts(worked(snapshots.crowded(62, 1), [{"llama.aggregated.3": (10, 5, 7)} | busiest]))
    rows = [line.split()[0] for line in lines if line.startswith("llama")]
    assert rows == [f"llama.aggregated.{number}" for number in range(52, 52 + MAX_ROWS)]
    assert "… and 52 more with 308 requests" in lines


def test_a_short_line_says_how_the_router_is() -> None:
    lines, _ = parts(snapshots.frame(snapshots.busy()))
    assert lines[0] == "mode kv  hit rate 61%  routed 7,300  active 190  indexed 81,000  resyncs 0"


def test_decisions_are_listed_newest_first() -> None:
    _, table = parts(snapshots.frame(snapshots.busy()))
    requests = [row.cells[1].text for row in table.rows]
    assert requests == [f"req-{number:04}" for number in reversed(range(32))]
    assert len({row.key for row in table.rows}) == 32
    assert table.note == "latest 32 of 7,300"


def decision(*candidates: Candidate, winner: str = "w.0", mode: str = "kv", **given: Any) -> Decision:
    reason = f"{winner}: 3 of 6 blocks cached, cost 4.0 vs 6.0"
    return Decision("r", "m", snapshots.NOW, mode, winner, reason, 6, candidates, **given)


CHEAP = Candidate("w.0", 3, 3.0, 1, 4.0)
DEAR = Candidate("w.1", 0, 6.0, 0, 6.0)
LEVEL = Candidate("w.2", 3, 3.0, 1, 4.0)


def test_a_row_says_who_won_at_what_cost_and_who_came_next() -> None:
    row = decisions.row(decision(DEAR, CHEAP), snapshots.NOW)
    texts = dict(zip((column.key for column in decisions.COLUMNS), (cell.text for cell in row.cells), strict=True))
    assert texts["overlap"] == "3/6  50%"
    assert texts["load"] == "3.0+1"
    assert (texts["winner"], texts["cost"]) == ("w.0", "4.0")
    assert (texts["runner_up"], texts["its_cost"]) == ("w.1", "6.0")
    assert texts["reason"] == "3 of 6 blocks cached, cost 4.0 vs 6.0"


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (decision(CHEAP), "it was the only one to choose from"),
        (decision(CHEAP, DEAR), "lowest cost, by 2.0 blocks"),
        (decision(CHEAP, DEAR, LEVEL), "lowest cost, level with 1 more: the smallest index, then chance"),
        (decision(CHEAP, DEAR, winner="w.1"), "drawn, at a cost 2.0 blocks above the lowest"),
        (decision(CHEAP, DEAR, mode="random"), "chosen by random, which doesn't ask for the cost"),
        (decision(DEAR), "its figures are not on record"),
    ],
)
def test_what_decided_is_read_off_the_candidates(made: Decision, why: str) -> None:
    (leg,) = decisions.legs_of(made)
    assert decisions.why(leg, made.mode) == why


def test_a_detail_has_all_candidates_and_why_the_winner_won() -> None:
    frame = snapshots.frame(snapshots.busy())
    _, table = parts(frame)
    oldest = VIEW.detail(frame, "decisions", table.rows[-1].key)
    text = "\n".join(as_text(oldest))
    assert "lowest cost, by 1.0 blocks" in text
    assert "▸ llama.aggregated.0" in text
    assert all(f"llama.aggregated.{number}" in text for number in range(8))
    assert VIEW.detail(frame, "decisions", "0.0 gone") is None


def test_a_box_without_decisions_says_why() -> None:
    for snapshot, reason in (
        (snapshots.empty(), "This box has no router."),
        (snapshots.gaps(), "The router is planned and has reported nothing yet."),
        (snapshots.tiny(), "The router has placed no request yet."),
    ):
        _, table = parts(snapshots.frame(snapshot))
        assert table.rows == ()
        assert table.empty == reason


def test_expired_leases_are_named_when_there_are_any() -> None:
    whole = snapshots.tiny()
    router, *others = whole.processes
    router = replace(router, figures=RouterFigures(expired_leases=3))
    lines, _ = parts(snapshots.frame(replace(whole, processes=(router, *others))), 120)
    assert "expired leases 3" in lines[0]


def test_the_mode_of_the_router_can_be_set_without_a_row() -> None:
    act = VIEW.acts[0]
    assert (act.key, act.kind, act.needs_row) == ("m", "mode", False)


@pytest.mark.parametrize("kind", snapshots.all_kinds())
@pytest.mark.parametrize("width", [1, 5, 20, 40, 80, 200])
def test_lines_are_never_wider_than_the_screen(kind: str, width: int) -> None:
    frame = snapshots.frame(snapshots.later(snapshots.all_kinds()[kind]))
    for panel in VIEW.panels(frame, width):
        if isinstance(panel, Lines):
            assert all(spans_width(line) <= width for line in panel.lines)


def test_names_have_no_power_over_the_terminal() -> None:
    frame = snapshots.frame(snapshots.hostile())
    lines, table = parts(frame, 200)
    texts = lines + [cell.text for row in table.rows for cell in row.cells]
    texts += as_text(VIEW.detail(frame, "decisions", table.rows[0].key))
    assert not [text for text in texts if "\x1b" in text or "\u202e" in text or "\r" in text]


class TestTiers:
    """What a prompt gets from the box's KV tiers, beside the pool of its worker."""

    HELD = Candidate("w.0", 3, 3.0, 1, 4.0, 1, 1)

    def watched(self, snapshot: BoxSnapshot) -> Frame:
        history = History()
        for moment in snapshots.moments(snapshot):
            history.feed(moment)
        return snapshots.frame(moment, history)

    def row(self, made: Decision) -> dict[str, str]:
        row = decisions.row(made, snapshots.NOW, tiers=True)
        return dict(zip((column.key for column in decisions.COLUMNS), (cell.text for cell in row.cells), strict=True))

    def test_a_row_shows_own_host_and_disk_blocks_and_a_bar_of_the_prompt(self) -> None:
        row = self.row(decision(self.HELD, DEAR))
        assert (row["overlap"], row["host"], row["disk"]) == ("3/6  50%", "1", "1")
        assert row["prompt"] == "██████▓▓▒▒··"
        lost = self.row(decision(self.HELD, DEAR, winner="w.1"))
        assert (lost["host"], lost["disk"], lost["prompt"]) == ("0", "0", "·" * 12), "another would have had some"

    def test_without_tiers_a_row_has_no_credit(self) -> None:
        keys = [column.key for column in decisions.COLUMNS]
        row = decisions.row(decision(self.HELD, DEAR), snapshots.NOW)
        assert [row.cells[keys.index(key)].text for key in ("host", "disk", "prompt")] == ["-"] * 3
        row = decisions.row(decision(self.HELD), snapshots.NOW, tiers=True)
        assert [span.tone for span in row.cells[keys.index("prompt")].parts][:2] == [Tone.CACHED, Tone.HOST]

    def test_the_parts_of_a_bar_have_tones_and_add_up_whatever_the_router_says(self) -> None:
        found = sources.credit_cell(self.HELD, 6)
        assert [span.tone for span in found.parts] == [Tone.CACHED, Tone.HOST, Tone.DISK, Tone.FREE]
        assert sources.credit(Candidate("w", 9, 0.0, 0, 0.0, 9, 9), 6, 4) == (Span("████", Tone.CACHED),)
        assert sources.credit(Candidate("w", -3, 0.0, 0, 0.0, 3, -1), 6, 4) == (
            Span("▓▓", Tone.HOST),
            Span("··", Tone.FREE),
        )
        assert sources.credit_cell(self.HELD, 0).text == sources.credit_cell(None, 6).text == "-"

    def test_a_detail_shows_what_each_candidate_would_load(self) -> None:
        frame = self.watched(snapshots.tiered())
        _, table = parts(frame)
        text = "\n".join(as_text(VIEW.detail(frame, "decisions", table.rows[0].key)))
        (heads,) = [line.split() for line in text.splitlines() if line.startswith("candidate")]
        assert heads == ["candidate", "overlap", "host", "disk", "prefill", "decode", "cost"]
        assert "smollm2.aggregated.0      █████" in text
        assert "█ own pool  ▓ host  ▒ disk  · computed" in text

    def test_sizes_of_the_index_and_whether_the_router_hears_of_the_tiers(self) -> None:
        lines, _ = parts(self.watched(snapshots.tiered()), 120)
        assert "in host 5,800  on disk 23,900" in lines[0]
        lines, _ = parts(self.watched(snapshots.tier_suspended()), 120)
        assert "tiers not connected" in lines[0]

    def test_where_prompts_came_from_lately(self) -> None:
        lines, _ = parts(self.watched(snapshots.tiered()), 120)
        (now,) = [line for line in lines if line.startswith("prompts now")]
        assert now.endswith("█ own pool 12%  ▓ host 25%  ▒ disk 12%  · computed 50%")
        assert "prompts now none" in parts(snapshots.frame(snapshots.tiered()))[0], "nothing jumps when one comes"

    def test_what_is_handed_over_is_no_source_of_the_prompts_of_others(self) -> None:
        """Who goes on from a prompt loads it, and counts it no more."""
        history = History()
        for moment in snapshots.moments(snapshots.tiered()):
            processes = []
            for process in moment.processes:
                figures = process.figures
                if process.name.endswith(".1") and isinstance(figures, WorkerFigures):
                    figures = replace(figures, prompt_tokens=0, cached_tokens=0)
                processes.append(replace(process, figures=figures))
            history.feed(replace(moment, processes=tuple(processes)))
        names = [process.name for process in moment.processes if process.kind == "worker"]
        line = "".join(span.text for span in sources.lately(names, history, 4, 120))
        assert line.endswith("█ own pool 12%  ▓ host 25%  ▒ disk 12%  · computed 50%")

    @pytest.mark.parametrize(
        ("counts", "found"),
        [
            ((100, 60, 20, 10), [30, 20, 10, 40]),
            ((100, 0, 20, 10), [0, 0, 0, 100]),
            ((100, 150, 90, 90), [0, 90, 10, 0]),
            ((0, 0, 0, 0), [0, 0, 0, 0]),
            ((-5, 3, -1, 2), [0, 0, 0, 0]),
        ],
    )
    def test_sources_of_tokens_add_up_to_the_prompt(self, counts: tuple[int, int, int, int], found: list[int]) -> None:
        assert sources.shares(*counts) == found

    def test_80_columns_show_the_credit(self) -> None:
        stack = Stack()
        stack.show(VIEW.panels(self.watched(snapshots.tiered()), 80), EVERYTHING)
        text = "\n".join("".join(span.text for span in line.spans) for line in stack.lines(80, 21))
        for said in ("HOST DISK PROMPT", "█████▓▓▓▓▒··", "prompts now", "on disk 23,900", "COST"):
            assert said in text
