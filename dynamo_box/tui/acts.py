"""Acts: what a person may tell the box to do, and to which of its parts. `order` decides, `carry_out` asks the box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dynamo_box import wording
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.protocol import control
from dynamo_box.protocol.figures import FrontendFigures, RouterFigures
from dynamo_box.protocol.gms import Place
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot, ModelInfo
from dynamo_box.tui import tiers
from dynamo_box.tui.layouts import whereabouts
from dynamo_box.tui.legs import POLICY, ROLE
from dynamo_box.tui.model import Act, Tone
from dynamo_box.tui.text import one_line, span_of_time
from dynamo_box.tui.tiers import CLEAR, DISK_TIER, HOST_TIER

DRAIN_S = 30.0
ANSWER_S = 300.0
"""A restart or a wake is answered when it is ready again, which takes as long as a model takes to load."""

MODE = "mode"
ROUTER_MODES = ("kv", "round-robin", "random")
SLEEP, WAKE = "sleep", "wake"
PLACES: tuple[Place, ...] = ("device", "host", "disk")
TIER_WORDS = {HOST_TIER: "g2", DISK_TIER: "g3"}
"""What the store calls the tiers."""


@dataclass(frozen=True)
class Order:
    """`kind` as in Act; `target` is a process, a request, a model, a mode, a policy or a KV tier. `process` is whose
    setting it is: the router's for a mode or a policy, the store's for a tier. `run_id` is that of the box which the
    person saw. `to` and `force` are of a sleep: where the weights go (None: where the profile says), and whether what
    runs is cancelled. `role` is what a worker shall serve as.
    """

    kind: str
    target: str
    process: str = ""
    run_id: str = ""
    to: Place | None = None
    force: bool = False
    role: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, one_line(self.target), self.role) if part)


@dataclass(frozen=True)
class Refusal:
    """Why there is nothing to order."""

    reason: str


class Outcome(NamedTuple):
    """What the box says it has done; the tone tells whether it is what was wanted."""

    text: str
    tone: Tone = Tone.GOOD


def order(act: Act, row: str | None, snapshot: BoxSnapshot) -> Order | Refusal:
    """What `act` means for the row under the cursor."""
    box = snapshot.box.run_id
    if act.kind in (MODE, POLICY):
        router = next((each.name for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)
        if router is None:
            return Refusal("there is no router that says how it routes")
        return Order(act.kind, "", router, box)
    if act.kind == CLEAR:
        store = tiers.store_of(snapshot)
        return (
            Refusal("there is no store that says what it holds")
            if store is None
            else (Order(CLEAR, "", store.process.name, box))
        )
    if row is None:
        return Refusal(f"{act.title}: there is no row under the cursor")
    if act.kind == "cancel":
        frontends = [each.figures for each in snapshot.processes if isinstance(each.figures, FrontendFigures)]
        live = any(request.request_id == row for each in frontends for request in each.live)
        return Order("cancel", row, run_id=box) if live else Refusal(f"{act.title}: {one_line(row)} is no live request")
    if act.kind in (SLEEP, WAKE):
        model = model_of(row, snapshot)
        refused = f"{one_line(row)} is no model" if model is None else _against(act.kind, model)
        return Refusal(f"{act.title}: {refused}") if refused else Order(act.kind, row, run_id=box)
    process = next((each for each in snapshot.processes if each.name == row), None)
    if process is None:
        return Refusal(f"{act.title}: {one_line(row)} is no process")
    if act.kind == "drain" and process.kind != "worker":
        return Refusal(f"{act.title}: {one_line(row)} is no worker; r replaces it without losing a request")
    if act.kind == ROLE and process.kind != "worker":
        return Refusal(f"{act.title}: {one_line(row)} is no worker")
    return Order(act.kind, row, run_id=box)


def model_of(row: str, snapshot: BoxSnapshot) -> ModelInfo | None:
    return next((each for each in snapshot.models if each.name == row), None)


def _against(kind: str, model: ModelInfo) -> str:
    """Why this model can't sleep, or wake, as it is; empty if it can. What is under way the supervisor puts in turn."""
    name, now = one_line(model.name), model.residency
    if now is None:
        return f"the box doesn't say where the weights of {name} are"
    state = now.state.replace("_", " ")
    if kind == SLEEP:
        at = f", its weights {whereabouts(now.place)}" if now.place else ""
        held = "; only w wakes it" if now.held else ""
        if now.state == "asleep":
            return f"{name} is asleep already{at}{held}"
        return f"{name} is {state}" if now.state in ("starting", "falling_asleep") else ""
    return f"{name} is {state} already" if now.state in ("awake", "waking", "starting") else ""


def router_mode(snapshot: BoxSnapshot) -> str | None:
    """How the router routes now."""
    return next((each.figures.mode for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)


def router_policy(snapshot: BoxSnapshot) -> Disagg:
    """When requests go in two legs now."""
    found = (each.figures.disagg_settings for each in snapshot.processes if isinstance(each.figures, RouterFigures))
    return next(found, Disagg())


def question(act: Act, row: str) -> str:
    return act.question.replace("{row}", one_line(row))


def carry_out(run_dir: RunDir, wanted: Order) -> Outcome:
    """Tell the box, over a connection of its own, and wait for its answer. Blocks for as long as a drain takes.

    Returns:
        what the box says it has done, for a person.

    Raises:
        BoxError: it couldn't, there is no box, or it is another one by now.
    """
    with ControlClient.connect(run_dir) as client:
        if client.snapshot().box.run_id != wanted.run_id:
            raise BoxError("another box runs by now", remedy="look at it, and then say it again")
        match wanted.kind:
            case "restart":
                said = client.restart(wanted.target, DRAIN_S, ANSWER_S)
            case "drain":
                said = client.drain(wanted.target, DRAIN_S, ANSWER_S)
            case "cancel":
                said = client.cancel_request(wanted.target)
            case "mode":
                said = client.set_option(wanted.process, "mode", wanted.target)
            case "disagg":
                said = client.set_option(wanted.process, POLICY, wanted.target)
            case "role":
                said = client.set_role(wanted.target, wanted.role, DRAIN_S, ANSWER_S)
            case "clear":
                said = client.set_option(wanted.process, CLEAR, TIER_WORDS[wanted.target])
            case "sleep":
                return slept(
                    client.sleep(
                        wanted.target, to=wanted.to, force=wanted.force, drain_s=DRAIN_S, timeout_s=DRAIN_S + ANSWER_S
                    )
                )
            case "wake":
                return woken(client.wake(wanted.target, timeout_s=ANSWER_S))
            case unknown:
                raise BoxError(f"no act is called {unknown!r}")
    return Outcome(said or f"{wanted}: done")


def slept(reply: control.ModelSlept) -> Outcome:
    """What a sleep gave back, device by device; what fell short comes first, since lines are cut at their end."""
    short = [each for each in reply.freed if each.fell_short]
    if short:
        return Outcome("; ".join(_fell_short(each) for each in short), Tone.BAD)
    now = reply.residency
    where = f"asleep, weights {whereabouts(now.place)}" if now.place else "stopped: its engine can't sleep"
    if reply.already:
        return Outcome(reply.text or f"was {where} already", Tone.WARN)
    freed = ", ".join(f"{wording.size(each.freed_bytes)} of {one_line(each.device)}" for each in reply.freed)
    if not freed:
        return Outcome(reply.text or where)
    return Outcome(f"freed {freed}; {where}")


def _fell_short(freed: control.Freed) -> str:
    some = f"only {wording.size(freed.freed_bytes)} of {wording.size(freed.expected_bytes)}"
    return f"{some} freed on {one_line(freed.device)}, held by {', '.join(map(one_line, freed.holders))}"


def woken(reply: control.ModelWoken) -> Outcome:
    """How long it took, and the phases that took longest; of a cold start, why it was one."""
    now = reply.residency
    if reply.already:
        return Outcome(reply.text or "was awake already", Tone.WARN)
    total = now.wake_phases.get("total")
    took = "" if total is None else f" in {span_of_time(total)}"
    if now.cold:
        why = f": {one_line(now.note)}" if now.note else ""
        return Outcome(f"awake{took} by a cold start{why}", Tone.WARN)
    longest = sorted((each for each in now.wake_phases.items() if each[0] != "total"), key=lambda each: -each[1])[:3]
    phases = ", ".join(f"{one_line(phase)} {span_of_time(spent)}" for phase, spent in longest)
    return Outcome(f"awake{took}" + (f" ({phases})" if phases else ""))
