"""The tokens of one sequence → the text that a client may see, and why it ended."""

from __future__ import annotations

from dynamo_box.frontend.detokenize import Detokenizer
from dynamo_box.frontend.stops import StopMatcher
from dynamo_box.protocol.request import Delta, FinishReason


class Output:
    """`feed` returns new text. `finish` is set once there is no more; `tokens` counts all of them, a stop token too, as
    usage does. Stop strings are not looked for in the first `min_tokens`.
    """

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...], min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._min_tokens = min_tokens
        self.tokens = 0
        self.finish: FinishReason | None = None

    def feed(self, delta: Delta) -> str:
        self.tokens += len(delta.tokens)
        shown = delta.tokens[:-1] if delta.finish == "stop" else delta.tokens
        text = self._detokenizer.feed(shown)
        if self.tokens >= self._min_tokens:
            text = self._stops.feed(text)
        if delta.finish is not None and not self._stops.stopped:
            text += self._stops.feed(self._detokenizer.finish())
            text += self._stops.finish()
        self.finish = "stop" if self._stops.stopped else delta.finish
        return text
