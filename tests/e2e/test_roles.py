"""Workers of a real box change their role, come and go under load: no request notices, each is answered as ever."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from box_under_test import Box, eventually
from two_legs import Ask, figures, nothing_is_held

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFILL, DECODE, SECOND = "smollm2.prefill.0", "smollm2.decode.0", "smollm2.decode.1"
PROMPTS = [f"{number}: " + "one two three four five six seven eight nine ten " * (2 + number) for number in range(4)]
CLIENTS = 3


def body(prompt: str, salt: str, **nvext: Any) -> dict[str, Any]:
    """Requests with another `salt` share no KV."""
    return {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": 12,
        "temperature": 0,
        "cache_salt": salt,
        "nvext": nvext,
    }


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Any) -> Iterator[Box]:
    root = tmp_path_factory.mktemp("roles")
    (root / "home").mkdir()
    (root / "home" / "models").symlink_to(smollm2_home / "models")
    made = Box(root / "run", root / "home")
    made.up("smollm2-disagg")
    made.wait_routed()
    yield made
    made.destroy()


@pytest.fixture(scope="module")
def told(box: Box) -> list[tuple[str, int, int]]:
    """What one worker alone says to each prompt."""
    return [Ask(box, body(prompt, "alone", backend_instance_id=PREFILL)).whole().said for prompt in PROMPTS]


def under_load(box: Box, told: list[tuple[str, int, int]], salt: str, act: Callable[[], None]) -> set[str | None]:
    """Do something while clients ask, check all that they are told, and say who answered; some ask only afterwards."""
    over = threading.Event()
    begun = threading.Semaphore(0)
    numbers = itertools.count()

    def ask() -> set[str | None]:
        answered_by: set[str | None] = set()
        while not over.is_set():
            number = next(numbers)
            answer = Ask(box, body(PROMPTS[number % len(PROMPTS)], f"{salt} {number}")).whole()
            assert answer.said == told[number % len(PROMPTS)], answer.workers
            answered_by.add(answer.workers[1])
            begun.release()
        return answered_by

    with ThreadPoolExecutor(CLIENTS) as clients:
        asking = [clients.submit(ask) for _ in range(CLIENTS)]
        try:
            assert begun.acquire(timeout=120)
            act()
            while begun.acquire(blocking=False):
                continue
            for _ in range(CLIENTS + 1):  # the last of them has begun after the act
                assert begun.acquire(timeout=120)
        finally:
            over.set()
        return set().union(*(one.result() for one in asking))


def goes_in_two_legs(box: Box, told: tuple[str, int, int], prompt: str, salt: str, workers: tuple[str, str]) -> None:
    """Whoever says what has become of a worker is a moment ahead of the router."""
    numbers = itertools.count()

    def goes() -> bool:
        answer = Ask(box, body(prompt, f"{salt} {next(numbers)}")).whole()
        assert answer.said == told
        return answer.workers == workers

    eventually(goes, f"a request goes to {workers}")


def test_roles_flip_under_load(box: Box, told: list[tuple[str, int, int]]) -> None:
    pids = {name: box.process(name)["pid"] for name in (PREFILL, DECODE)}

    def flip() -> None:
        for name, role in ((DECODE, "both"), (PREFILL, "decode"), (DECODE, "prefill"), (PREFILL, "both")):
            box.dynbox("role", name, role, "--drain", "60")

    under_load(box, told, "flips", flip)
    assert [(box.process(name)["role"], box.process(name)["pid"]) for name in (PREFILL, DECODE)] == [
        ("aggregated", pids[PREFILL]),
        ("prefill", pids[DECODE]),
    ]
    box.dynbox("role", PREFILL, "decode")
    goes_in_two_legs(box, told[0], PROMPTS[0], "turned round", (DECODE, PREFILL))
    box.dynbox("role", PREFILL, "both")
    box.dynbox("role", DECODE, "decode")
    box.dynbox("role", PREFILL, "prefill")
    goes_in_two_legs(box, told[0], PROMPTS[0], "as it was", (PREFILL, DECODE))
    nothing_is_held(box)


def test_workers_come_and_go_under_load(box: Box, told: list[tuple[str, int, int]]) -> None:
    def more() -> None:
        _scale(box, 2, "3 workers share ")
        box.wait_routed()

    answered = under_load(box, told, "more", more)
    assert answered <= {DECODE, SECOND}
    assert SECOND in answered | under_load(box, told, "with two", lambda: None)
    eventually(lambda: figures(box, SECOND).get("taken_over"), "the new one took something over")
    assert figures(box, SECOND)["computed_prompt_tokens"] == 0
    cpu = next(device for device in box.ps()["devices"] if device["id"] == "cpu")
    planned = cpu["planned_bytes"]
    assert cpu["note"].startswith("3 workers share "), "each of the two that were planned has half of the cores"
    assert f"cpu: {cpu['note']}" in box.dynbox("ps").stdout.splitlines()

    answered = under_load(box, told, "fewer", lambda: _scale(box, 0))
    assert PREFILL in answered, "nobody else was left"
    assert [each["name"] for each in box.ps()["processes"] if each["kind"] == "worker"] == [PREFILL]
    fewer = next(device for device in box.ps()["devices"] if device["id"] == "cpu")["planned_bytes"]
    assert (fewer["weights"], 3 * fewer["KV"]) == (planned["weights"], planned["KV"])

    _scale(box, 1)
    goes_in_two_legs(box, told[1], PROMPTS[1], "back", (PREFILL, DECODE))
    nothing_is_held(box)


def _scale(box: Box, count: int, says: str = "") -> None:
    assert says in box.dynbox("scale", "smollm2", "decode", str(count), "--drain", "60").stdout
