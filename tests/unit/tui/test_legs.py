"""Disaggregated serving on the screens: roles, both legs of a request, the policy, what is measured and advised."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.protocol.figures import Decision, RouterFigures
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo, Targets
from dynamo_box.tui import legs
from dynamo_box.tui.bars import status
from dynamo_box.tui.feed import Feed
from dynamo_box.tui.filter import EVERYTHING, Filter
from dynamo_box.tui.history import History
from dynamo_box.tui.lately import SPAN_S
from dynamo_box.tui.model import Frame, Lines, Table, Tone
from dynamo_box.tui.screens import view
from dynamo_box.tui.session import Options, Session
from dynamo_box.tui.source import Ended, NewSnapshot
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.views import advice, decisions

BOX = snapshots.disaggregated()
BEFORE_ROLES = [snapshots.busy(), snapshots.tiered(), snapshots.shared(), snapshots.tiny(), snapshots.degraded()]
MODEL = BOX.models[0]


def watched(snapshot: BoxSnapshot = BOX, seconds: int = 12) -> Frame:
    history = History()
    for moment in snapshots.moments(snapshot, seconds):
        history.feed(moment)
    return snapshots.frame(moment, history)


def table(screen: str, frame: Frame, width: int = 120) -> Table:
    return next(panel for panel in view(screen).panels(frame, width) if isinstance(panel, Table))


def panel(screen: str, frame: Frame, key: str, width: int = 120) -> list[str]:
    lines = (each for each in view(screen).panels(frame, width) if isinstance(each, Lines) and each.key == key)
    return as_text(next(lines, None))


def as_text(page: Lines | None) -> list[str]:
    return [] if page is None else ["".join(span.text for span in line) for line in page.lines]


def detail(screen: str, frame: Frame, key: str) -> str:
    return "\n".join(as_text(view(screen).detail(frame, table(screen, frame).key, key)))


def row(found: Table, key: str) -> dict[str, str]:
    texts = next(each for each in found.rows if each.key == key)
    return {column.key: cell.text for column, cell in zip(found.columns, texts.cells, strict=True)}


def shown(screen: str, frame: Frame, width: int, wanted: Filter = EVERYTHING) -> list[str]:
    """The lines of a screen as wide as that, without the panels above its table."""
    found = table(screen, frame, width)
    stack = Stack()
    stack.show((found,), wanted)
    return ["".join(span.text for span in line.spans) for line in stack.lines(width, stack.natural_height)]


def changed(name: str, snapshot: BoxSnapshot = BOX, figures: dict[str, Any] | None = None, **given: Any) -> BoxSnapshot:
    """With one process as `given`, and its figures as `figures`."""

    def change(process: ProcessInfo) -> ProcessInfo:
        if process.name != name:
            return process
        new = process.figures if figures is None or process.figures is None else replace(process.figures, **figures)
        return replace(process, figures=new, **given)

    return replace(snapshot, processes=tuple(map(change, snapshot.processes)))


# roles


def test_a_worker_has_the_role_that_it_serves_as_now() -> None:
    found = table("fleet", watched())
    assert row(found, "llama70b.prefill.0")["role"] == "prefill"
    flipped = next(each for each in found.rows if each.key == "llama70b.prefill.1")
    assert row(found, "llama70b.prefill.1")["role"] == "decode"
    assert flipped.cells[[column.key for column in found.columns].index("role")].tone is Tone.ACCENT
    assert "decode (planned: prefill)" in detail("fleet", watched(), "llama70b.prefill.1")
    starting = changed("llama70b.prefill.1", state="starting", figures={"role": ""})
    assert row(table("fleet", watched(starting)), "llama70b.prefill.1")["role"] == "prefill", "nothing else is known"


def test_busy_share_and_hand_overs_are_of_the_last_ten_seconds() -> None:
    found = table("fleet", watched())
    prompts, answers = row(found, "llama70b.prefill.0"), row(found, "llama70b.decode.0")
    assert (prompts["busy"], prompts["handed"]) == ("97%", "4.0")
    assert (answers["busy"], answers["handed"]) == ("33%", "1.0")
    columns = {column.key for column in table("fleet", snapshots.frame(BOX)).columns}
    assert not columns & {"busy", "handed"}, "one snapshot has no rates"
    history = History()
    for moment in (*snapshots.moments(BOX, 3), *snapshots.moments(replace(BOX, at=BOX.at + 60), 12)):
        history.feed(moment)
    assert history.lately.busy(moment.processes[2]) == pytest.approx(0.97), "what was a minute ago is forgotten"


def test_a_worker_that_began_anew_counts_from_zero_and_time_that_goes_back_starts_over() -> None:
    history = History()
    for moment in snapshots.moments(BOX, 5):
        history.feed(moment)
    name = "llama70b.prefill.0"
    history.feed(replace(changed(name, moment, {"busy_s": 3.0, "handed_over": 12}, pid=99), at=moment.at + 1))
    reborn = changed(name, moment, {"busy_s": 3.0, "handed_over": 12}, pid=99).processes[2]
    assert history.lately.busy(reborn) == pytest.approx(0.5)
    assert history.lately.handed_over(reborn) == pytest.approx(2.0)
    history.feed(BOX)
    assert history.lately.busy(BOX.processes[2]) is None


def test_80_columns_show_the_roles_and_how_busy_they_keep() -> None:
    head = shown("fleet", watched(), 80)[1].split()
    assert {"PROCESS", "ROLE", "STATE", "TOK/S", "QUEUE", "BUSY"} <= set(head)


def test_the_detail_of_a_worker_tells_of_its_legs() -> None:
    prompts = detail("fleet", watched(), "llama70b.prefill.0")
    for said in (
        "handed over             8,448",
        "mean time until held    85 ms",
        "prompt tokens computed  2,300,000",
        "req-00022, prefill: llama70b.prefill.0: 32 of 190 blocks cached",
    ):
        assert said in prompts, prompts
    answers = detail("fleet", watched(), "llama70b.decode.1")
    for said in (
        "taken over              2,802",
        "transfers failed        3",
        "req-00022, decode: llama70b.decode.1: 312",
    ):
        assert said in answers, answers


@pytest.mark.parametrize("snapshot", BEFORE_ROLES)
def test_a_box_without_roles_has_nothing_of_all_this(snapshot: BoxSnapshot) -> None:
    frame = watched(snapshot, 3)
    assert not {"busy", "handed"} & {column.key for column in table("fleet", frame).columns}
    assert not {"ttft", "itl"} & {column.key for column in table("models", frame).columns}
    for screen in ("routing", "requests"):
        assert not any(column.title in ("PREFILL", "DECODE") for column in table(screen, frame).columns)
    assert panel("models", frame, "advice") == []
    assert "policy" not in "".join(panel("routing", frame, "traffic"))
    worker = next(process for process in snapshot.processes if process.kind == "worker")
    assert "Legs" not in detail("fleet", frame, worker.name)
    assert legs.traits(snapshot) == set()
    assert not snapshot.simulated


# both legs


def test_a_decision_in_two_legs_names_both_workers_and_one_in_one_leg_says_why() -> None:
    found = table("routing", watched())
    both = next(each for each in found.rows if "req-00022" in each.key)
    texts = row(found, both.key)
    assert (texts["prefill"], texts["winner"]) == ("llama70b.prefill.0", "llama70b.decode.1")
    assert texts["overlap"] == "32/190  17%", "of the worker that computes the prompt"
    assert texts["load"] == "118.0+312", "to compute at the one, in use at the other"
    assert texts["cost"] == "214.0+312.0"
    assert texts["reason"] == "32 of 190 blocks cached, 40 in host memory, the only one; 312 blocks in use, the fewest"
    one = row(found, next(each.key for each in found.rows if "req-00023" in each.key))
    assert (one["prefill"], one["winner"], one["load"]) == ("-", "llama70b.prefill.1", "12.0+300")
    assert one["reason"].startswith("conditional: 192 uncached tokens are fewer than 1024; 12 of 24")


def test_80_columns_show_both_workers_whole() -> None:
    for screen in ("routing", "requests"):
        lines = shown(screen, watched(), 80)
        assert any("llama70b.prefill.0 llama70b.decode.1" in line for line in lines), screen
        assert max(map(len, lines)) <= 80


def test_filter_and_sort_work_on_both_workers() -> None:
    frame = watched()
    for wanted, count in ((r"prefill\.0", 18), (r"prefill\.0 llama70b\.decode\.0", 6), (r"- llama70b\.decode\.0", 2)):
        lines = shown("routing", frame, 120, Filter.parse(wanted))
        assert sum("req-" in line for line in lines) == count
    stack = Stack()
    stack.show((table("routing", frame),), EVERYTHING)
    (pane,) = stack.tables
    pane.sort_by("prefill")
    assert row(pane.table, pane.rows[0].key)["prefill"] == "llama70b.prefill.0"
    assert row(pane.table, pane.rows[-1].key)["prefill"] == "-", "one leg only: last, whichever way round"
    pane.sort_by("winner")
    assert row(pane.table, pane.rows[0].key)["winner"] == "llama70b.decode.0"


def test_the_detail_of_a_decision_weighs_each_leg_by_itself() -> None:
    frame = watched()
    key = next(each.key for each in table("routing", frame).rows if "req-00021" in each.key)
    text = detail("routing", frame, key)
    prefill, decode = text.index("\nPrefill\n"), text.index("\nDecode\n")
    assert text.index("in two legs  conditional: 1921 of 3040 tokens are uncached") < prefill
    assert prefill < text.index("it was the only one to choose from") < text.index("▸ llama70b.prefill.0") < decode
    assert decode < text.index("lowest cost, by 29.0 blocks") < text.index("▸ llama70b.decode.0")
    assert text.count("What of the prompt each need not compute") == 1


def test_among_equals_each_leg_has_its_own_rule() -> None:
    router = next(each.figures for each in BOX.processes if isinstance(each.figures, RouterFigures))
    made: Decision = router.decisions[0]
    level = replace(made.candidates[0], worker="other")
    prefill, decode = decisions.legs_of(
        replace(
            made,
            candidates=(made.candidates[0], level),
            prefill_candidates=(*made.prefill_candidates, replace(made.prefill_candidates[0], worker="other")),
        )
    )
    assert "who has nothing else to do" in decisions.why(prefill, "kv")
    assert "who has most of it already" in decisions.why(decode, "kv")


def test_the_head_says_which_policy_is_in_force() -> None:
    said = "".join(panel("routing", watched(), "traffic", 80))
    assert "policy conditional: ≥1,024 tokens and ≥50% uncached, ≤32,768 queued" in said
    strict = changed("router", figures={"disagg": "strict", "disagg_settings": Disagg("strict")})
    assert "policy strict  hit rate" in "".join(panel("routing", watched(strict), "traffic", 80))
    assert "conditional: ≥1,024 tokens" in detail("fleet", watched(), "router")


def test_a_live_request_has_both_workers_and_a_phase_between_them() -> None:
    frame = watched()
    found = row(table("requests", frame), "req-00002")
    assert (found["phase"], found["prefill_worker"], found["worker"]) == (
        "handover",
        "llama70b.prefill.0",
        "llama70b.prefill.1",
    )
    text = detail("requests", frame, "req-00002")
    assert "prefill worker  llama70b.prefill.0" in text
    assert "Candidates to prefill" in text


# targets and advice


def test_what_is_measured_stands_beside_what_is_wanted() -> None:
    found = table("models", watched())
    assert row(found, MODEL.name)["ttft"] == "812 ms/500 ms"
    assert row(found, MODEL.name)["itl"] == "26 ms/30 ms"
    assert advice.against(0.812, 0.5).tone is Tone.WARN
    assert advice.against(0.3, 0.5).tone is Tone.GOOD
    assert advice.against(None, 0.5).text == "-/500 ms"
    assert advice.against(0.3, None).text == "-"


def test_advice_says_why_and_with_which_command() -> None:
    lines = panel("models", watched(), "advice", 100)
    assert lines[0] == "llama70b  first token: 812 ms for 99 of 100, the target is 500 ms"
    assert lines[-1].strip() == "→ dynbox role llama70b.decode.0 prefill"
    assert max(map(len, panel("models", watched(), "advice", 60))) <= 60
    page = detail("models", watched(), MODEL.name)
    assert "→ dynbox role llama70b.decode.0 prefill" in page
    assert "TTFT p99/target  812 ms/500 ms" in page


def test_without_need_advice_is_one_dim_remark() -> None:
    calm = replace(BOX, models=(replace(MODEL, targets=Targets(2.0, 0.05)),))
    (lines,) = (each for each in view("models").panels(watched(calm), 120) if isinstance(each, Lines))
    assert [line[-1].tone for line in lines.lines] == [Tone.DIM]
    assert as_text(lines)[0].startswith("llama70b  nothing is late; prefill 97% busy")


def test_advice_is_worked_out_anew_once_a_second_at_most() -> None:
    history = History()
    for moment in snapshots.moments(BOX, 12):
        history.feed(moment)
    first = history.lately.advice(MODEL.name)
    history.feed(snapshots.later(moment, 0.25))
    assert history.lately.advice(MODEL.name) is first
    history.feed(snapshots.later(moment, 1.0))
    assert history.lately.advice(MODEL.name) is not first
    load = history.lately.load(MODEL.name)
    assert load is not None
    assert load.span_s == pytest.approx(SPAN_S)


def test_of_many_models_those_that_need_something_come_first() -> None:
    names = [f"m{number}" for number in range(6)]
    models = tuple(replace(MODEL, name=name, targets=Targets(9.0, 9.0)) for name in names)
    worker = BOX.processes[2]
    extra = tuple(replace(worker, name=f"{name}.prefill.0", model=name) for name in names)
    many = replace(BOX, models=(*models, MODEL), processes=(*BOX.processes, *extra))
    lines = panel("models", watched(many), "advice")
    assert lines[0].startswith("llama70b")
    assert lines[-1] == "… and 4 more models; `enter` on one has its own"


# what a person sees and may do


class Still:
    acts = True

    def start(self, deliver: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("over", [False, True])
def test_a_simulated_box_says_so_first_of_all_on_every_screen(width: int, over: bool) -> None:
    session = Session(Still(), Options())
    session.take(NewSnapshot(BOX), BOX.at)
    if over:
        session.take(Ended(), BOX.at)
    line = session.status(BOX.at, width)
    assert line.spans[0].text.strip() == "SIMULATED"
    assert line.spans[0].tone is Tone.LOUD
    feed = Feed(live=True)
    feed.take(NewSnapshot(snapshots.busy()), BOX.at)
    assert "SIMULATED" not in "".join(span.text for span in status(feed, BOX.at, (), 200).spans)


def test_acts_on_roles_are_there_where_there_are_roles() -> None:
    def keys(snapshot: BoxSnapshot, screen: str, options: Options | None = None) -> str:
        session = Session(Still(), options or Options(screen=screen))
        session.take(NewSnapshot(snapshot), snapshot.at)
        session.advance(snapshot.at)
        return "".join(act.key for act in session.acts)

    assert [keys(BOX, screen) for screen in ("fleet", "routing", "models")] == ["rdo", "mp", "zwp"]
    assert keys(BOX, "routing", Options(screen="routing", readonly=True)) == ""
    for snapshot in BEFORE_ROLES:
        assert [keys(snapshot, screen) for screen in ("fleet", "routing", "models")] == ["rd", "m", "zw"]
