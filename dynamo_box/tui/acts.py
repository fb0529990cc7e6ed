"""Acts: what a person may tell the box to do, and to which of its parts. `order` decides, `carry_out` asks the box."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.protocol.figures import FrontendFigures, RouterFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.model import Act
from dynamo_box.tui.text import one_line

DRAIN_S = 30.0
ANSWER_S = 300.0
"""A restart is answered when the process is ready again, which takes as long as its model takes to load."""

MODE = "mode"
ROUTER_MODES = ("kv", "round-robin", "random")


@dataclass(frozen=True)
class Order:
    """`kind` as in Act; `target` is a process, a request or a mode. `process` is the router, for a mode. `run_id` is
    that of the box which the person saw.
    """

    kind: str
    target: str
    process: str = ""
    run_id: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {one_line(self.target)}"


@dataclass(frozen=True)
class Refusal:
    """Why there is nothing to order."""

    reason: str


def order(act: Act, row: str | None, snapshot: BoxSnapshot) -> Order | Refusal:
    """What `act` means for the row under the cursor."""
    box = snapshot.box.run_id
    if act.kind == MODE:
        router = next((each.name for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)
        return Refusal("there is no router that says how it routes") if router is None else Order(MODE, "", router, box)
    if row is None:
        return Refusal(f"{act.title}: there is no row under the cursor")
    if act.kind == "cancel":
        frontends = [each.figures for each in snapshot.processes if isinstance(each.figures, FrontendFigures)]
        live = any(request.request_id == row for each in frontends for request in each.live)
        return Order("cancel", row, run_id=box) if live else Refusal(f"{act.title}: {one_line(row)} is no live request")
    process = next((each for each in snapshot.processes if each.name == row), None)
    if process is None:
        return Refusal(f"{act.title}: {one_line(row)} is no process")
    if act.kind == "drain" and process.kind != "worker":
        return Refusal(f"{act.title}: {one_line(row)} is no worker; r replaces it without losing a request")
    return Order(act.kind, row, run_id=box)


def router_mode(snapshot: BoxSnapshot) -> str | None:
    """How the router routes now."""
    return next((each.figures.mode for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)


def question(act: Act, row: str) -> str:
    return act.question.replace("{row}", one_line(row))


def carry_out(run_dir: RunDir, wanted: Order) -> str:
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
            case unknown:
                raise BoxError(f"no act is called {unknown!r}")
    return said or f"{wanted}: done"
