"""A real box that computes prompts on one worker and answers on the other, with the real model: it says what one worker
would, whoever dies on the way, and in the end holds nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import pytest
from box_under_test import Box, eventually
from two_legs import Ask, Failed, figures, nothing_is_held

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFILL, DECODE = "smollm2.prefill.0", "smollm2.decode.0"
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 6},
}
COUNTING = "one two three four five six seven eight nine ten "


def body(prompt: str | list[int], salt: str, max_tokens: int = 12, way: str = "greedy", **nvext: Any) -> dict[str, Any]:
    """Requests with another `salt` share no KV."""
    settings = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "cache_salt": salt, "nvext": nvext}
    return {**settings, **WAYS[way]}


def tokens(length: int) -> list[int]:
    return [1000 + 37 * place % 9000 for place in range(length)]


def in_one_leg(box: Box, prompt: str | list[int], max_tokens: int = 12, way: str = "greedy") -> tuple[str, int, int]:
    """What the prefill worker alone says."""
    salt = f"one leg, {way}, {len(prompt)}"
    answer = Ask(box, body(prompt, salt, max_tokens, way, backend_instance_id=PREFILL)).whole()
    assert answer.workers == (None, PREFILL)
    return answer.said


def kill(box: Box, process: str) -> None:
    os.kill(box.process(process)["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Any) -> Iterator[Box]:
    root = tmp_path_factory.mktemp("disagg")
    (root / "home").mkdir()
    (root / "home" / "models").symlink_to(smollm2_home / "models")
    made = Box(root / "run", root / "home")
    made.up("smollm2-disagg")
    made.wait_routed()
    yield made
    made.destroy()


def test_two_legs_say_what_one_says_and_count_as_one_request(box: Box) -> None:
    lengths = [1, 16, 17, 600]
    Ask(box, body(tokens(3), "the first")).whole()
    before = eventually(lambda: (now := figures(box, DECODE)).get("taken_over") and now, "a first one is taken over")
    for way in WAYS:
        for length in lengths:
            prompt = tokens(length)
            expected = in_one_leg(box, prompt, way=way)
            answer = Ask(box, body(prompt, f"two legs, {way}, {length}", way=way)).whole()
            assert answer.workers == (PREFILL, DECODE)
            assert answer.said == expected, f"{way}, {length} tokens"
            assert answer.said[1:] == (length, 12)
            assert answer.usage["prompt_tokens_details"]["cached_tokens"] == 0
    served = 1 + len(WAYS) * len(lengths)
    answered = eventually(
        lambda: (now := figures(box, DECODE))["taken_over"] == served and now, f"{served} requests are taken over"
    )
    # What the box has proved itself with may have gone to whichever worker was there first.
    assert answered["computed_prompt_tokens"] == before["computed_prompt_tokens"] <= 1
    assert answered["transfers_failed"] == 0
    assert answered["cached_tokens"] == 0, "a prompt counts where it was computed"
    computed = eventually(lambda: (now := figures(box, PREFILL))["handed_over"] == served and now, "it says so too")
    assert computed["computed_prompt_tokens"] >= 2 * sum(lengths) * len(WAYS)

    again = Ask(box, body(tokens(600), "two legs, greedy, 600")).whole()
    assert again.said == in_one_leg(box, tokens(600))
    assert again.usage["prompt_tokens_details"]["cached_tokens"] == 599 // 16 * 16, "the prefill worker has it cached"


def test_the_first_token_does_not_wait_for_the_hand_over(box: Box) -> None:
    prompt = tokens(100)
    expected = in_one_leg(box, prompt)
    store = box.process("kvstore")["pid"]
    os.kill(store, signal.SIGSTOP)
    try:
        answer = Ask(box, body(prompt, "first token"))
        pieces = answer.pieces()
        assert next(pieces), "said while nobody could take the prompt's KV"
    finally:
        os.kill(store, signal.SIGCONT)
    assert "".join(pieces)
    assert answer.said == expected


@pytest.fixture(scope="module")
def told(box: Box) -> dict[str, tuple[str, int, int]]:
    """Prompts and what one worker says to each."""
    prompts = [f"{number}: " + COUNTING * (4 + 8 * (number % 3)) for number in range(4)]
    return {prompt: in_one_leg(box, prompt, 16) for prompt in prompts}


@pytest.mark.parametrize("victim", [PREFILL, DECODE])
def test_a_death_is_not_noticed(box: Box, told: dict[str, tuple[str, int, int]], victim: str) -> None:
    """Requests of which some are being computed, and some answered, when it dies."""
    prompts, expected = list(told), list(told.values())
    restarts = box.process(victim)["restarts"]
    begun = threading.Semaphore(0)

    def ask(prompt: str) -> tuple[str, int, int]:
        answer = Ask(box, body(prompt, f"death of {victim}", 16))
        for _ in answer.pieces():
            begun.release()
        return answer.said

    with ThreadPoolExecutor(len(prompts)) as many:
        answers = [many.submit(ask, prompt) for prompt in prompts]
        for _ in range(8):
            assert begun.acquire(timeout=120)
        kill(box, victim)
        assert [answer.result() for answer in answers] == expected
    eventually(lambda: box.process(victim)["restarts"] == restarts + 1, "it was restarted")
    nothing_is_held(box)

    tries = itertools.count()

    def again() -> bool:
        """The frontend and the router may hear of the successor a moment after the supervisor."""
        answer = Ask(box, body(prompts[0], f"{next(tries)} after the death of {victim}", 16)).whole()
        assert answer.said == expected[0]
        return answer.workers == (PREFILL, DECODE)

    eventually(again, "two legs again")


def test_strict_says_why_it_fails_where_fallback_goes_on(box: Box) -> None:
    expected = in_one_leg(box, COUNTING)
    box.dynbox("drain", PREFILL)
    alone = Ask(box, body(COUNTING, "nobody for prefill")).whole()
    assert (alone.workers, alone.said) == ((None, DECODE), expected)
    with urlopen(f"http://127.0.0.1:{box.port}/health", timeout=120) as answer:
        health = json.load(answer)
    assert health["roles"] == {"smollm2": {"decode": 1}}, health

    assert "strict" in box.dynbox("disagg", "--policy", "strict").stdout
    with pytest.raises(Failed, match="prefill"):
        Ask(box, body(COUNTING, "nobody for prefill")).whole()

    box.dynbox("disagg", "--policy", "fallback")
    assert Ask(box, body(COUNTING, "nobody for prefill")).whole().said == expected
    box.dynbox("restart", PREFILL)
    eventually(lambda: Ask(box, body(COUNTING, "there again")).whole().workers == (PREFILL, DECODE), "two legs again")
