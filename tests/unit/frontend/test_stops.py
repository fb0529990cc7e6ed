"""The result depends on the text alone, not on the pieces in which it arrives."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamo_box.frontend.detokenize import Detokenizer
from dynamo_box.frontend.output import Output
from dynamo_box.frontend.stops import StopMatcher
from dynamo_box.protocol.request import Delta

few_letters = st.text(alphabet="ab", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4).map(tuple)


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    said = "".join(matcher.feed(piece) for piece in pieces)
    return said + matcher.finish(), matcher.stopped


def expected(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """By brute force: the shortest beginning of the text that ends in a stop string, without the longest such."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(few_letters, stop_lists, st.lists(st.integers(0, 4), max_size=24))
@example("abab", ("abab", "ba"), [])
def test_any_split_gives_the_text_before_the_stop_that_is_complete_first(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    pieces, rest = [], text
    for length in cuts:
        pieces.append(rest[:length])
        rest = rest[length:]
    assert run([*pieces, rest], stops) == expected(text, stops)


@settings(max_examples=300, deadline=None)
@given(few_letters, stop_lists)
def test_only_what_could_become_a_stop_string_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    said = ""
    for at, character in enumerate(text):
        said += matcher.feed(character)
        if matcher.stopped:
            return
        held = text[len(said) : at + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


class Letters(Detokenizer):
    """Token n is the n-th letter."""

    def feed(self, tokens: object) -> str:
        return "".join(chr(97 + token) for token in tokens)  # type: ignore[attr-defined]

    def finish(self) -> str:
        return ""


def test_the_token_that_stops_is_counted_but_not_shown() -> None:
    output = Output(Letters(), ())
    said = output.feed(Delta(1, (0, 1))) + output.feed(Delta(1, (2,), "stop"))
    assert (said, output.tokens, output.finish) == ("ab", 3, "stop")


def test_what_was_held_back_is_shown_at_the_end_but_not_after_a_stop() -> None:
    output = Output(Letters(), ("bcd",))
    assert output.feed(Delta(1, (0, 1, 2))) == "a"
    assert output.feed(Delta(1, (), "length")) == "bc"
    assert output.finish == "length"
    output = Output(Letters(), ("bcd",))
    assert output.feed(Delta(1, (0, 1, 2))) + output.feed(Delta(1, (3, 4))) == "a"
    assert (output.finish, output.tokens) == ("stop", 5)


def test_no_stop_string_counts_before_min_tokens() -> None:
    output = Output(Letters(), ("b",), min_tokens=4)
    assert "".join(output.feed(Delta(1, (token,))) for token in (1, 1, 1, 0, 1, 0)) == "bbba"
    assert output.finish == "stop"
