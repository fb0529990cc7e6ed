"""From an act to the box: the question where it hurts, the order in a thread, and how it went as one line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from textual.app import App
from textual.message import Message

from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.protocol.spec import Disagg
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui import acts, legs, tiers
from dynamo_box.tui.acts import Order, Outcome
from dynamo_box.tui.dialogs import Answer, QuestionDialog
from dynamo_box.tui.model import Act, Tone
from dynamo_box.tui.themes import Theme
from dynamo_box.wording import size

MOST_AT_ONCE = 16

Say = Callable[[str, Tone], None]


class Answered(Message):
    """The box has said how an order went."""

    def __init__(self, wanted: Order, outcome: Outcome) -> None:
        super().__init__()
        self.wanted, self.outcome = wanted, outcome

    @property
    def notice(self) -> tuple[str, Tone]:
        return f"{self.wanted}: {self.outcome.text}", self.outcome.tone


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
        elif act.kind == legs.POLICY:
            now = acts.router_policy(snapshot)
            least = f", ≥{now.min_uncached_tokens:,} tokens" if now.policy == "conditional" else ""
            asked = f"Which requests shall go in two legs? Now: {now.policy}{least}"
            dialog = QuestionDialog(act.title, asked, _policies(now), look)
            self._ask(dialog, lambda policy: self._begin(replace(wanted, target=policy)))
        elif act.kind == legs.ROLE:
            dialog = QuestionDialog(act.title, acts.question(act, wanted.target), _roles(wanted, snapshot), look)
            self._ask(dialog, lambda role: self._begin(replace(wanted, role=role)))
        elif act.kind == tiers.CLEAR:
            dialog = QuestionDialog(act.title, act.question, _tiers_to_clear(snapshot), look)
            self._ask(dialog, lambda tier: self._begin(replace(wanted, target=tier)))
        elif act.kind == acts.SLEEP:
            ways = _ways_to_sleep(wanted, snapshot)
            dialog = QuestionDialog(act.title, acts.question(act, wanted.target), ways, look)
            self._ask(dialog, lambda how: self._begin(_asleep(wanted, how)))
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
            outcome = acts.carry_out(self._run_dir, wanted)
        except BoxError as error:
            outcome = Outcome(f"{error.what}; {error.remedy}" if error.remedy else error.what, Tone.BAD)
        self._app.post_message(Answered(wanted, outcome))


def _policies(now: Disagg) -> list[Answer]:
    """Each, and the threshold as it is and a step to either side."""
    tokens = now.min_uncached_tokens
    return [
        Answer("1", "fallback", "fallback: all; what can't be passed on is computed again"),
        Answer("2", "strict", "strict: all; what can't be passed on fails"),
        *(
            Answer(str(at), f"conditional:min_uncached_tokens={each}", f"conditional: from {each:,} uncached tokens on")
            for at, each in enumerate(dict.fromkeys((tokens, tokens // 2, max(tokens, 1) * 2)), 3)
        ),
    ]


def _roles(wanted: Order, snapshot: BoxSnapshot) -> list[Answer]:
    """No first, since a worker that changes serves nobody meanwhile."""
    process = next((each for each in snapshot.processes if each.name == wanted.target), None)
    now = legs.role_of(process) if process is not None else ""
    titles = {
        legs.PREFILL: "prefill: prompts only",
        legs.DECODE: "decode: answers, whose prompts others computed",
        legs.BOTH: "both: whole requests",
    }
    others = [(role, title) for role, title in titles.items() if role != now]
    return [
        Answer("n", "", f"as now: {now}" if now else "as now"),
        *(Answer(str(at), role, title) for at, (role, title) in enumerate(others, 1)),
    ]


def _tiers_to_clear(snapshot: BoxSnapshot) -> list[Answer]:
    """No first, since what is cleared is computed again."""
    store = tiers.store_of(snapshot)
    held = [] if store is None else [each for each in store.tiers.items() if each[1].state != tiers.OFF]
    places = {tiers.HOST_TIER: "in host memory", tiers.DISK_TIER: "on disk"}
    return [
        Answer("n", "", "no"),
        *(
            Answer(str(at), name, f"what is {places[name]}: {tier.blocks:,} blocks, {size(tier.used_bytes)}")
            for at, (name, tier) in enumerate(held, 1)
        ),
    ]


_AS_PROFILED, _FORCED = "as the profile says", "force"


def _ways_to_sleep(wanted: Order, snapshot: BoxSnapshot) -> list[Answer]:
    """No first, since what sleeps serves nobody."""
    model = acts.model_of(wanted.target, snapshot)
    keep = model.residency.keep if model is not None and model.residency is not None else "host"
    titles = {
        "device": "weights stay on the device; only the KV pool is freed",
        "host": "weights to host memory",
        "disk": "weights to disk",
    }
    return [
        Answer("n", "", "no"),
        Answer("y", _AS_PROFILED, f"yes, weights where the profile keeps them: {keep}"),
        *(Answer(str(at), place, titles[place]) for at, place in enumerate(acts.PLACES, 1)),
        Answer("c", _FORCED, f"yes ({keep}), and cancel what runs: its clients get an error"),
    ]


def _asleep(wanted: Order, how: str) -> Order:
    """What an answer of `_ways_to_sleep` means."""
    to = next((place for place in acts.PLACES if place == how), None)
    return replace(wanted, to=to, force=how == _FORCED)
