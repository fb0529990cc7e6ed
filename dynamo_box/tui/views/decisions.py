"""One placement of the router, as a row and explained in full. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from dynamo_box.protocol.figures import Candidate, Decision, RouterFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.model import Cell, Column, Row, Span, Tone
from dynamo_box.tui.text import fill, one_line
from dynamo_box.tui.views import cells, charts, sources
from dynamo_box.tui.views.cells import Line

_NAME_COLUMNS = 24
_PROMPT_COLUMNS = 40

COLUMNS = (
    Column("time", "TIME", least=8),
    Column("request", "REQUEST", keep=6, least=8, widest=36),
    Column("model", "MODEL", keep=1, least=6, widest=24),
    Column("mode", "MODE", keep=3),
    Column("prefill", "PREFILL", least=10, widest=36, help="who computes the prompt; - : whoever answers", tail=True),
    Column("winner", "WINNER", least=10, widest=36, help="the worker that took it", tail=True),
    cells.number_column("overlap", "OVERLAP", help="blocks of the prompt cached there, of all of them"),
    cells.number_column("host", "HOST", keep=7, help="blocks after these that it would load from the host tier"),
    cells.number_column("disk", "DISK", keep=7, help="blocks after these that it would load from the disk tier"),
    Column(
        "prompt",
        "PROMPT",
        keep=8,
        least=sources.CREDIT_COLUMNS,
        widest=sources.CREDIT_COLUMNS,
        help="█ cached there  ▓ in the host tier  ▒ on disk  · to compute",
    ),
    cells.number_column("load", "LOAD", keep=7, help="blocks to compute first + blocks in use, with this request"),
    cells.number_column("cost", "COST", keep=9, help="in blocks: what the lowest of wins"),
    Column("runner_up", "RUNNER-UP", keep=4, least=10, widest=36, help="the cheapest of the others", tail=True),
    cells.number_column("its_cost", "ITS COST", keep=5),
    Column("reason", "REASON", keep=2, least=16, widest=80),
)
OF_TIERS = ("host", "disk", "prompt")
"""Columns of a box with KV tiers."""
_OF_TWO_LEGS: dict[str, dict[str, Any]] = {
    "prefill": {"least": 18},
    "winner": {"least": 18, "title": "DECODE", "help": "who answers, and computes the prompt too where PREFILL is -"},
    "request": {"keep": 8},
    "overlap": {"keep": 10, "help": "blocks of the prompt cached where it is computed, of all of them"},
    "prompt": {"keep": 9},
    "load": {"keep": 6, "help": "blocks to compute first for the prompt + blocks in use where it is answered"},
    "cost": {"keep": 5, "help": "in blocks: what the lowest of wins; of two legs prefill+decode"},
    "runner_up": {"help": "the cheapest of the others; of two legs, for the first"},
    "its_cost": {"keep": 3},
}
"""Both workers' names are worth more than what they cost."""
COLUMNS_OF_TWO_LEGS = tuple(replace(column, **_OF_TWO_LEGS.get(column.key, {})) for column in COLUMNS)
"""The same, in the words of a box where some requests go in two legs."""


class Leg(NamedTuple):
    """`role` is what it is called: winner (of the whole request), prefill or decode."""

    role: str
    winner: str
    reason: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        return next((each for each in self.candidates if each.worker == self.winner), None)

    @property
    def runner_up(self) -> Candidate | None:
        """The cheapest of the others, which a mode that doesn't ask for the cost may have passed over."""
        others = [each for each in self.candidates if each.worker != self.winner]
        return min(others, key=lambda each: each.cost, default=None)

    @property
    def said(self) -> str:
        """The reason without the name that it begins with."""
        return self.reason.removeprefix(f"{self.winner}: ")


_AMONG_EQUALS = {
    "winner": "the smallest index, then chance",
    "prefill": "who has nothing else to do, then the smallest index, then chance",
    "decode": "who has most of it already, then the smallest index, then chance",
}


def legs_of(decision: Decision) -> tuple[Leg, ...]:
    """One, or prefill and decode; the first computes the prompt and the last answers."""
    if not decision.prefill:
        return (Leg("winner", decision.winner, decision.reason, decision.candidates),)
    return (
        Leg("prefill", decision.prefill, decision.prefill_reason, decision.prefill_candidates),
        Leg("decode", decision.winner, decision.reason, decision.candidates),
    )


def router_of(snapshot: BoxSnapshot) -> RouterFigures | None:
    """What the box's router says of itself; None if there is none, or it has not said anything yet."""
    return next((process.figures for process in snapshot.processes if isinstance(process.figures, RouterFigures)), None)


def row_key(decision: Decision) -> str:
    """A request that lost its worker is placed again: its id alone wouldn't do."""
    return f"{decision.at:.6f} {decision.request_id}"


def row(decision: Decision, now: float, *, tiers: bool = False) -> Row:
    """With what the winner would load, if the box has KV `tiers`. What is said of the prompt is said of the worker that
    computes it.
    """
    legs = legs_of(decision)
    first, last = legs[0], legs[-1]
    computing, answering, second = first.chosen, last.chosen, first.runner_up
    return Row(
        row_key(decision),
        (
            cells.clock(decision.at, now),
            cells.text(decision.request_id),
            cells.name(decision.model),
            cells.text(decision.mode),
            cells.name(decision.prefill, Tone.ACCENT),
            cells.name(decision.winner, Tone.ACCENT),
            _overlap(computing, decision.prompt_blocks),
            _blocks(computing.host_blocks, Tone.HOST) if computing is not None and tiers else cells.ABSENT,
            _blocks(computing.disk_blocks, Tone.DISK) if computing is not None and tiers else cells.ABSENT,
            sources.credit_cell(computing, decision.prompt_blocks) if tiers else cells.ABSENT,
            _load(computing, answering),
            _costs(computing, answering) if decision.prefill else _cost(answering),
            cells.ABSENT if second is None else cells.name(second.worker),
            _cost(second),
            cells.text(_reason(decision), Tone.DIM),
        ),
    )


def _reason(decision: Decision) -> str:
    """Of two legs both, and of one the policy's first, if there is one."""
    said = [leg.said for leg in legs_of(decision)]
    if len(said) == 1 and decision.policy_reason:
        said.insert(0, decision.policy_reason)
    return "; ".join(said)


def why(leg: Leg, mode: str) -> str:
    """What decided, read off the candidates."""
    chosen, second = leg.chosen, leg.runner_up
    if chosen is None:
        return "its figures are not on record"
    if second is None:
        return "it was the only one to choose from"
    if mode != "kv":
        return f"chosen by {one_line(mode)}, which doesn't ask for the cost"
    if chosen.cost < second.cost:
        return f"lowest cost, by {second.cost - chosen.cost:.1f} blocks"
    if chosen.cost > second.cost:
        return f"drawn, at a cost {chosen.cost - second.cost:.1f} blocks above the lowest"
    level = sum(each.cost == chosen.cost for each in leg.candidates)
    return f"lowest cost, level with {level - 1} more: {_AMONG_EQUALS[leg.role]}"


def lines(decision: Decision, now: float, *, tiers: bool = False) -> list[Line]:
    """The whole placement: what was asked, who was weighed for each leg, and why who won it did."""
    asked = [
        ("placed", cells.clock(decision.at, now)),
        ("request", cells.text(decision.request_id)),
        ("model", cells.text(decision.model)),
        ("mode", cells.text(decision.mode)),
        ("policy", cells.text(decision.policy)),
        ("in two legs" if decision.prefill else "in one leg", cells.text(decision.policy_reason)),
        ("prompt", Cell(f"{decision.prompt_blocks:,} blocks")),
    ]
    first, *rest = legs_of(decision)
    if not rest:
        facts = cells.facts([*asked, *_outcome(first, decision.mode)])
        return [*facts, *_weighed("Candidates", first, decision, tiers), *_prompts(first, decision, tiers)]
    found = cells.facts(asked)
    for leg, title in ((first, "Prefill"), *((each, "Decode") for each in rest)):
        found += cells.section(title, cells.facts(_outcome(leg, decision.mode)))
        found += _weighed(f"Candidates to {leg.role}", leg, decision, tiers and leg is first)
    return [*found, *_prompts(first, decision, tiers)]


def _outcome(leg: Leg, mode: str) -> list[cells.Fact]:
    return [
        (leg.role if leg.role == "winner" else "worker", cells.text(leg.winner, Tone.ACCENT)),
        ("why", Cell(why(leg, mode))),
        ("the router says", cells.text(leg.reason)),
    ]


def _weighed(title: str, leg: Leg, decision: Decision, tiers: bool) -> list[Line]:
    heads = ("candidate", "overlap", "host", "disk", "prefill", "decode", "cost")
    rows = [_candidate(each, leg, decision.prompt_blocks, tiers) for each in _ranked(leg)]
    return cells.section(f"{title}, in blocks, the cheapest first", charts.grid(heads, rows))


def _prompts(leg: Leg, decision: Decision, tiers: bool) -> list[Line]:
    """What each who was weighed has of the prompt; nothing in a box without tiers."""
    if not tiers or not leg.candidates:
        return []
    rows = [_prompt(each, decision) for each in _ranked(leg)]
    return cells.section("What of the prompt each need not compute", [*rows, sources.legend()])


def _ranked(leg: Leg) -> list[Candidate]:
    return sorted(leg.candidates, key=lambda each: each.cost)


def _blocks(count: int, tone: Tone) -> Cell:
    return cells.count(count, tone if count else Tone.DIM)


def _prompt(candidate: Candidate, decision: Decision) -> Line:
    name = fill(one_line(candidate.worker), _NAME_COLUMNS, front=True)
    return (Span(f"{name}  "), *sources.credit(candidate, decision.prompt_blocks, _PROMPT_COLUMNS))


def _candidate(candidate: Candidate, leg: Leg, prompt_blocks: int, tiers: bool) -> tuple[Cell, ...]:
    won = candidate.worker == leg.winner
    return (
        Cell(("▸ " if won else "  ") + one_line(candidate.worker), Tone.ACCENT if won else Tone.PLAIN),
        _overlap(candidate, prompt_blocks),
        _blocks(candidate.host_blocks, Tone.HOST) if tiers else cells.ABSENT,
        _blocks(candidate.disk_blocks, Tone.DISK) if tiers else cells.ABSENT,
        Cell(f"{candidate.prefill_blocks:,.1f}"),
        Cell(f"{candidate.decode_blocks:,}"),
        _cost(candidate),
    )


def _overlap(candidate: Candidate | None, prompt_blocks: int) -> Cell:
    """`5/12  42%`; sorted by the blocks."""
    if candidate is None:
        return cells.ABSENT
    share = cells.ratio(candidate.overlap_blocks, prompt_blocks)
    text = f"{candidate.overlap_blocks:,}/{prompt_blocks:,}"
    if share is not None:
        text += f" {cells.percentage(share):>4}"
    return Cell(text, Tone.CACHED if candidate.overlap_blocks else Tone.DIM, candidate.overlap_blocks)


def _load(computing: Candidate | None, answering: Candidate | None) -> Cell:
    """`12.0+340`: blocks to compute before the first token, and blocks in use; sorted by their sum."""
    if computing is None or answering is None:
        return cells.ABSENT
    text = f"{computing.prefill_blocks:,.1f}+{answering.decode_blocks:,}"
    return Cell(text, Tone.PLAIN, computing.prefill_blocks + answering.decode_blocks)


def _cost(candidate: Candidate | None) -> Cell:
    return cells.ABSENT if candidate is None else Cell(f"{candidate.cost:,.1f}", Tone.PLAIN, candidate.cost)


def _costs(computing: Candidate | None, answering: Candidate | None) -> Cell:
    """`4.5+12.0`, of two legs; sorted by their sum."""
    if computing is None or answering is None:
        return cells.ABSENT
    return Cell(f"{computing.cost:,.1f}+{answering.cost:,.1f}", Tone.PLAIN, computing.cost + answering.cost)
