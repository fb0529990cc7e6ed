"""One placement of the router, as a row and explained in full. Pure."""

from __future__ import annotations

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
COLUMNS_WITHOUT_TIERS = tuple(column for column in COLUMNS if column.key not in ("host", "disk", "prompt"))


def router_of(snapshot: BoxSnapshot) -> RouterFigures | None:
    """What the box's router says of itself; None if there is none, or it has not said anything yet."""
    return next((process.figures for process in snapshot.processes if isinstance(process.figures, RouterFigures)), None)


def row_key(decision: Decision) -> str:
    """A request that lost its worker is placed again: its id alone wouldn't do."""
    return f"{decision.at:.6f} {decision.request_id}"


def row(decision: Decision, now: float, *, tiers: bool = False) -> Row:
    """With what the winner would load, if the box has KV `tiers`."""
    winner, second = winner_of(decision), runner_up(decision)
    return Row(
        row_key(decision),
        (
            cells.clock(decision.at, now),
            cells.text(decision.request_id),
            cells.name(decision.model),
            cells.text(decision.mode),
            cells.name(decision.winner, Tone.ACCENT),
            _overlap(winner, decision.prompt_blocks),
            _blocks(winner.host_blocks, Tone.HOST) if winner is not None and tiers else cells.ABSENT,
            _blocks(winner.disk_blocks, Tone.DISK) if winner is not None and tiers else cells.ABSENT,
            sources.credit_cell(winner, decision.prompt_blocks) if tiers else cells.ABSENT,
            _load(winner),
            _cost(winner),
            cells.ABSENT if second is None else cells.name(second.worker),
            _cost(second),
            cells.text(decision.reason.removeprefix(f"{decision.winner}: "), Tone.DIM),
        ),
    )


def winner_of(decision: Decision) -> Candidate | None:
    return next((each for each in decision.candidates if each.worker == decision.winner), None)


def runner_up(decision: Decision) -> Candidate | None:
    """The cheapest of the others, which a mode that doesn't ask for the cost may have passed over."""
    others = [each for each in decision.candidates if each.worker != decision.winner]
    return min(others, key=lambda each: each.cost, default=None)


def why(decision: Decision) -> str:
    """What decided, read off the candidates."""
    winner, second = winner_of(decision), runner_up(decision)
    if winner is None:
        return "its figures are not on record"
    if second is None:
        return "it was the only one to choose from"
    if decision.mode != "kv":
        return f"chosen by {one_line(decision.mode)}, which doesn't ask for the cost"
    if winner.cost < second.cost:
        return f"lowest cost, by {second.cost - winner.cost:.1f} blocks"
    if winner.cost > second.cost:
        return f"drawn, at a cost {winner.cost - second.cost:.1f} blocks above the lowest"
    level = sum(each.cost == winner.cost for each in decision.candidates)
    return f"lowest cost, level with {level - 1} more: the smallest index, then chance"


def lines(decision: Decision, now: float, *, tiers: bool = False) -> list[Line]:
    """The whole placement: what was asked, who was weighed, and why the winner won."""
    ranked = sorted(decision.candidates, key=lambda each: each.cost)
    candidates = [_candidate(each, decision, tiers) for each in ranked]
    heads = ("candidate", "overlap", "host", "disk", "prefill", "decode", "cost")
    prompts = [_prompt(each, decision) for each in ranked] if tiers else []
    return [
        *cells.facts(
            [
                ("placed", cells.clock(decision.at, now)),
                ("request", cells.text(decision.request_id)),
                ("model", cells.text(decision.model)),
                ("mode", cells.text(decision.mode)),
                ("prompt", Cell(f"{decision.prompt_blocks:,} blocks")),
                ("winner", cells.text(decision.winner, Tone.ACCENT)),
                ("why", Cell(why(decision))),
                ("the router says", cells.text(decision.reason)),
            ]
        ),
        *cells.section("Candidates, in blocks, the cheapest first", charts.grid(heads, candidates)),
        *cells.section("What of the prompt each need not compute", [*prompts, sources.legend()] if prompts else []),
    ]


def _blocks(count: int, tone: Tone) -> Cell:
    return cells.count(count, tone if count else Tone.DIM)


def _prompt(candidate: Candidate, decision: Decision) -> Line:
    name = fill(one_line(candidate.worker), _NAME_COLUMNS, front=True)
    return (Span(f"{name}  "), *sources.credit(candidate, decision.prompt_blocks, _PROMPT_COLUMNS))


def _candidate(candidate: Candidate, decision: Decision, tiers: bool) -> tuple[Cell, ...]:
    won = candidate.worker == decision.winner
    return (
        Cell(("▸ " if won else "  ") + one_line(candidate.worker), Tone.ACCENT if won else Tone.PLAIN),
        _overlap(candidate, decision.prompt_blocks),
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


def _load(candidate: Candidate | None) -> Cell:
    """`12.0+340`: blocks to compute before the first token, and blocks in use; sorted by their sum."""
    if candidate is None:
        return cells.ABSENT
    text = f"{candidate.prefill_blocks:,.1f}+{candidate.decode_blocks:,}"
    return Cell(text, Tone.PLAIN, candidate.prefill_blocks + candidate.decode_blocks)


def _cost(candidate: Candidate | None) -> Cell:
    return cells.ABSENT if candidate is None else Cell(f"{candidate.cost:,.1f}", Tone.PLAIN, candidate.cost)
