"""Acts: what a person may tell the box to do, and to which of its parts. `order` decides, `carry_out` asks the box."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.protocol.figures import FrontendFigures, RouterFigures
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.model import Act
from dynamo_box.wording import printable

DRAIN_S = 30.0
ANSWER_S = 300.0
"""A restart is answered when the process is ready again, which takes as long as its model takes to load."""

MOST_AT_ONCE = 16

ROUTER_MODES = ("kv", "round-robin", "random")


@dataclass(frozen=True)
class Order:
    """`kind` as in Act; `target` is a process, a request or a mode. `process` is the router, for a mode."""

    kind: str
    target: str
    process: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {printable(self.target)}"


@dataclass(frozen=True)
class Refusal:
    """Why there is nothing to order."""

    reason: str


def order(act: Act, row: str | None, snapshot: BoxSnapshot) -> Order | Refusal:
    """What `act` means for the row under the cursor."""
    if act.kind == "mode":
        router = next((each.name for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)
        return Refusal("there is no router that says how it routes") if router is None else Order("mode", "", router)
    if row is None:
        return Refusal(f"{act.title}: there is no row under the cursor")
    if act.kind == "cancel":
        frontends = [each.figures for each in snapshot.processes if isinstance(each.figures, FrontendFigures)]
        live = any(request.request_id == row for each in frontends for request in each.live)
        return Order("cancel", row) if live else Refusal(f"{act.title}: {printable(row)} is no live request")
    known = any(each.name == row for each in snapshot.processes)
    return Order(act.kind, row) if known else Refusal(f"{act.title}: {printable(row)} is no process")


def router_mode(snapshot: BoxSnapshot) -> str | None:
    """How the router routes now."""
    return next((each.figures.mode for each in snapshot.processes if isinstance(each.figures, RouterFigures)), None)


def question(act: Act, row: str) -> str:
    return act.question.replace("{row}", printable(row))


def carry_out(run_dir: RunDir, wanted: Order) -> str:
    """Tell the box, over a connection of its own, and wait for its answer. Blocks for as long as a drain takes.

    Returns:
        what the box says it has done, for a person.

    Raises:
        BoxError: it couldn't, or there is no box.
    """
    with ControlClient.connect(run_dir) as client:
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


@dataclass(frozen=True)
class Outcome:
    """How an order went, in words for a person."""

    wanted: Order
    text: str
    ok: bool


class Steering:
    """Orders under way, each in a thread of its own: one of them may take as long as a model takes to load.

    The threads are daemons. Who leaves the screen doesn't wait for a drain, and the box carries on with it.
    """

    def __init__(self, run_dir: RunDir, done: Callable[[Outcome], object]) -> None:
        """`done` is called from the order's thread."""
        self._run_dir = run_dir
        self._done = done
        self._under_way: set[Order] = set()
        self._lock = threading.Lock()

    def start(self, wanted: Order) -> bool:
        """Whether it was begun: not while the same is under way, or too much is."""
        with self._lock:
            if wanted in self._under_way or len(self._under_way) >= MOST_AT_ONCE:
                return False
            self._under_way.add(wanted)
        threading.Thread(target=self._run, args=(wanted,), name=f"act-{wanted.kind}", daemon=True).start()
        return True

    def _run(self, wanted: Order) -> None:
        try:
            outcome = Outcome(wanted, carry_out(self._run_dir, wanted), ok=True)
        except BoxError as error:
            outcome = Outcome(wanted, f"{error.what}; {error.remedy}" if error.remedy else error.what, ok=False)
        finally:
            with self._lock:
                self._under_way.discard(wanted)
        self._done(outcome)
