"""What would help a model whose workers have roles, or that has targets: measured against wanted, and advice. Pure."""

from __future__ import annotations

from dynamo_box.advise.load import ModelLoad
from dynamo_box.advise.rules import Advice
from dynamo_box.snapshot import ModelInfo, Targets
from dynamo_box.tui import legs
from dynamo_box.tui.model import Cell, Frame, Span, Tone
from dynamo_box.tui.text import fill, one_line, span_of_time, width_of
from dynamo_box.tui.views import cells
from dynamo_box.tui.views.cells import Fact, Line

MOST_SHOWN = 3
"""Of more models, those that need something come first."""
_WIDEST_NAME = 24
_LEAST_TEXT = 20


def concerns(frame: Frame) -> list[ModelInfo]:
    """Models that advice is given for."""
    split = legs.split_models(frame.snapshot)
    return [model for model in frame.snapshot.models if model.name in split or model.targets != Targets()]


def load(model: ModelInfo, frame: Frame) -> ModelLoad | None:
    return frame.history.lately.load(model.name)


def against(measured_s: float | None, target_s: float | None) -> Cell:
    """`812 ms/500 ms`: what was measured, and what is wanted; absent without a target."""
    if target_s is None:
        return cells.ABSENT
    target = span_of_time(target_s)
    if measured_s is None:
        return Cell(f"-/{target}", Tone.DIM)
    return Cell(f"{span_of_time(measured_s)}/{target}", Tone.WARN if measured_s > target_s else Tone.GOOD, measured_s)


def lines(frame: Frame, width: int) -> list[Line]:
    """What is said of each model, and the command that does it."""
    found = [
        (model.name, advice)
        for model in concerns(frame)
        if (advice := frame.history.lately.advice(model.name)) is not None
    ]
    found.sort(key=lambda each: not each[1].needed)
    shown = found[:MOST_SHOWN]
    margin = min(max((width_of(one_line(name)) for name, _ in shown), default=0), _WIDEST_NAME) + 2
    said: list[Line] = []
    for name, advice in shown:
        label = fill(one_line(name), margin - 2) + "  "
        for text, tone in _said(advice):
            for piece in cells.wrapped(text, max(width - margin, _LEAST_TEXT)):
                said.append((Span(label, Tone.TITLE), Span(piece, tone)))
                label = " " * margin
    if len(found) > len(shown):
        said.append(cells.remark(f"… and {len(found) - len(shown)} more models; `enter` on one has its own"))
    return said


def facts(model: ModelInfo, frame: Frame) -> list[Fact]:
    """For a model's detail; nothing for one that no advice is given for."""
    advice = frame.history.lately.advice(model.name) if model in concerns(frame) else None
    if advice is None:
        return []
    of = load(model, frame)
    return [
        ("TTFT p99/target", against(of.ttft_s if of else None, model.targets.ttft_s)),
        ("ITL p99/target", against(of.itl_s if of else None, model.targets.itl_s)),
        *(("" if number else "advice", cells.text(text, tone)) for number, (text, tone) in enumerate(_said(advice))),
    ]


def _said(advice: Advice) -> list[tuple[str, Tone]]:
    """What is wrong first, in the tone of a note that wants doing; then the command."""
    tone = Tone.WARN if advice.needed else Tone.DIM
    said = [(reason, tone if not number else Tone.PLAIN) for number, reason in enumerate(advice.reasons)]
    if not advice.needed:
        said = [("; ".join(advice.reasons), tone)]
    return [*said, (f"→ {advice.command}", Tone.ACCENT)] if advice.command else said
