"""From an act to the box: the question where it hurts, the order in a thread, and how it went as one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from textual.app import App
from textual.message import Message

from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import acts
from dynamo_box.tui.acts import Order
from dynamo_box.tui.dialogs import Answer, QuestionDialog
from dynamo_box.tui.model import Act, Tone
from dynamo_box.tui.themes import Theme

MOST_AT_ONCE = 16

Say = Callable[[str, Tone], None]


class Answered(Message):
    """The box has said how an order went."""

    def __init__(self, wanted: Order, text: str, *, ok: bool) -> None:
        super().__init__()
        self.wanted, self.text, self.ok = wanted, text, ok

    @property
    def notice(self) -> tuple[str, Tone]:
        return f"{self.wanted}: {self.text}", Tone.GOOD if self.ok else Tone.BAD


class Steering:
    """Orders under way, each in a thread of its own: one of them may take as long as a model takes to load.

    The threads are daemons. Who leaves the screen doesn't wait for a drain, and the box carries on with it. `app` gets
    an `Answered` for each.
    """

    def __init__(self, app: App[None], run_dir: RunDir, say: Say) -> None:
        self._app, self._run_dir, self._say = app, run_dir, say
        self._under_way: set[Order] = set()

    def do(self, act: Act, row: str | None, snapshot: BoxSnapshot, look: Theme) -> None:
        """Ask what has to be asked, then tell the box."""
        wanted = acts.order(act, row, snapshot)
        if isinstance(wanted, acts.Refusal):
            self._say(wanted.reason, Tone.WARN)
        elif act.kind == acts.MODE:
            modes = [Answer(str(at), mode, mode) for at, mode in enumerate(acts.ROUTER_MODES, 1)]
            asked = f"How shall requests be routed? Now: {acts.router_mode(snapshot)}"
            dialog = QuestionDialog(act.title, asked, modes, look)
            self._ask(dialog, lambda mode: self._begin(replace(wanted, target=mode)))
        elif act.question:
            answers = [Answer("n", "", "no"), Answer("y", "yes", f"yes, {act.title}")]
            dialog = QuestionDialog(act.title, acts.question(act, wanted.target), answers, look)
            self._ask(dialog, lambda _: self._begin(wanted))
        else:
            self._begin(wanted)

    def answered(self, message: Answered) -> None:
        self._under_way.discard(message.wanted)
        self._say(*message.notice)

    def _ask(self, dialog: QuestionDialog, then: Callable[[str], None]) -> None:
        def answered(value: str | None) -> None:
            if value:
                then(value)

        self._app.push_screen(dialog, answered)

    def _begin(self, wanted: Order) -> None:
        if wanted in self._under_way:
            self._say(f"{wanted}: that is under way already", Tone.WARN)
        elif len(self._under_way) >= MOST_AT_ONCE:
            self._say(f"{wanted}: {MOST_AT_ONCE} acts are under way; wait for one of them", Tone.WARN)
        else:
            self._under_way.add(wanted)
            self._say(f"{wanted}: under way", Tone.ACCENT)
            threading.Thread(target=self._run, args=(wanted,), name=f"act-{wanted.kind}", daemon=True).start()

    def _run(self, wanted: Order) -> None:
        try:
            answer = Answered(wanted, acts.carry_out(self._run_dir, wanted), ok=True)
        except BoxError as error:
            answer = Answered(wanted, f"{error.what}; {error.remedy}" if error.remedy else error.what, ok=False)
        self._app.post_message(answer)
