"""What people are told of a model's sleep and wake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_box.protocol import control
from dynamo_box.supervisor.model import Model
from dynamo_box.supervisor.model_states import ModelState
from dynamo_box.wording import size

_WHERE = {"device": "with its weights on the device", "host": "in host memory", "disk": "on disk"}


def words(state: ModelState) -> str:
    return str(state).replace("_", " ")


def already_asleep(model: Model) -> str:
    where = f" {_WHERE[model.said.place]}" if model.said.place else ""
    return f"{model.name} sleeps{where} already"


def slept(model: Model, place: str, freed: Sequence[control.Freed], took_s: float) -> str:
    if not model.policy.gms:
        return f"{model.name}: its engine can't sleep, so its workers were stopped in {took_s:.2f} s"
    parts = ", ".join(_freed(one) for one in freed)
    return f"{model.name} sleeps {_WHERE[place]}: {parts} in {took_s:.2f} s"


def _freed(freed: control.Freed) -> str:
    text = f"{freed.device} freed {size(freed.freed_bytes)} of {size(freed.expected_bytes)}"
    return f"{text} (still held by {', '.join(freed.holders)})" if freed.fell_short else text


def woken(model: Model, phases: Mapping[str, float], reason: str) -> str:
    """`reason` is why it was a cold start, if it was."""
    parts = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in phases.items() if name != "total")
    cold = f"; a cold start: {reason}" if reason else ""
    return f"{model.name} is awake after {phases['total']:.2f} s ({parts}){cold}"
