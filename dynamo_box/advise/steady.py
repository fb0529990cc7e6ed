"""Whether a box that may act on advice acts now. Pure.

Advice is followed only if it has been the same for `lasting_s`, nothing is changing, and the last change was
`settle_s` ago, so that its effect is in what was measured. What was just undone isn't done again: the opposite of the
last change needs `reverse_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynamo_box.advise.rules import Advice

LASTING_S = 30.0
SETTLE_S = 60.0
REVERSE_S = 300.0


@dataclass(frozen=True, slots=True)
class Steady:
    """What has been advised since when, and what was done last; times are seconds of one clock."""

    lasting_s: float = LASTING_S
    settle_s: float = SETTLE_S
    reverse_s: float = REVERSE_S
    advised: tuple[str, str, str] | None = None
    since: float = 0.0
    done: Advice | None = None
    done_at: float = float("-inf")

    def look(self, advice: Advice, now: float, *, changing: str = "") -> tuple[Steady, bool, str]:
        """The next state, whether to act on `advice` now, and why (not). `changing` says what is in transition."""
        if advice.kind == "none":
            return replace(self, advised=None), False, "nothing to do"
        about = (advice.kind, advice.role, advice.setting)  # of workers alike now one is named, now another
        state = self if about == self.advised else replace(self, advised=about, since=now)
        if changing:
            return replace(state, since=now), False, f"{changing}: one change at a time"
        if now - state.since < state.lasting_s:
            return state, False, f"advised for {now - state.since:.0f} s, acted on after {state.lasting_s:.0f} s"
        wait_s = state.reverse_s if _reverses(advice, state.done) else state.settle_s
        if now - state.done_at < wait_s:
            return (
                state,
                False,
                f"the last change was {now - state.done_at:.0f} s ago; the next may come after {wait_s:.0f} s",
            )
        return replace(state, advised=None, done=advice, done_at=now), True, "; ".join(advice.reasons)


def _reverses(advice: Advice, last: Advice | None) -> bool:
    """Does it take back what the last one gave?"""
    return last is not None and advice.relieves != last.relieves
