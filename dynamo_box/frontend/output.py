"""The tokens of one sequence → the text that a client may see, and why it ended."""

from __future__ import annotations

from dynamo_box.frontend.detokenize import Detokenizer
from dynamo_box.frontend.stops import StopMatcher
from dynamo_box.protocol.request import Delta


class Output:
    """`feed` returns new text. `finish` is "stop" or "length" once there is no more; `tokens` counts all, the stop
    token too, as usage does.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self.tokens = 0
        self.cached_tokens = 0
        self.finish: str | None = None

    def feed(self, delta: Delta) -> str:
        self.tokens += len(delta.tokens)
        if delta.cached_tokens:
            self.cached_tokens = delta.cached_tokens
        shown = delta.tokens[:-1] if delta.finish == "stop" else delta.tokens
        text = self._stops.feed(self._detokenizer.feed(shown))
        if delta.finish is not None and not self._stops.stopped:
            text += self._stops.feed(self._detokenizer.finish())
            if not self._stops.stopped:
                text += self._stops.finish()
        if self._stops.stopped:
            self.finish = "stop"
        elif delta.finish is not None:
            self.finish = delta.finish
        return text
