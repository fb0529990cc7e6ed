"""Processes of a loaded box are killed, one after another, at random: every client hears how its request ended, what
was killed comes back, and in the end nothing is left over.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter

import openai
import pytest
from box_under_test import Box, eventually

CLIENTS = 8
REQUEST_DEADLINE_S = 120


class Load:
    """Clients that stream one answer after another and count how each ended."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._over = threading.Event()
        self.endings: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        client = self._box.client(timeout=REQUEST_DEADLINE_S)
        while not self._over.is_set():
            try:
                stream = client.completions.create(
                    model="tiny", prompt=f"{number} once upon a time " * 8, max_tokens=100, stream=True
                )
                finish = None
                for chunk in stream:
                    finish = chunk.choices[0].finish_reason or finish if chunk.choices else finish
                self.endings["finished" if finish == "length" else "cut short"] += 1
            except openai.APITimeoutError:
                self.endings["silence"] += 1
            except openai.APIError as error:
                self.endings[type(error).__name__] += 1

    def stop(self) -> Counter[str]:
        self._over.set()
        for thread in self._threads:
            thread.join(REQUEST_DEADLINE_S * 2)
            assert not thread.is_alive(), "a client hangs"
        return self.endings


def kill_rounds(box: Box, rounds: int) -> None:
    chance = random.Random(rounds)
    load = Load(box)
    kills: Counter[str] = Counter()
    for _ in range(rounds):
        processes = box.wait_ready()["processes"]
        victim = chance.choice(processes)
        part = chance.choice(["pid", "guard_pid"])
        os.kill(victim[part], signal.SIGKILL)
        kills[f"{victim['kind']} {part}"] += 1

        def noticed(name: str = victim["name"], before: int = victim["restarts"]) -> bool:
            return bool(box.process(name)["restarts"] > before)

        eventually(noticed, f"{victim['name']} was restarted")
    box.wait_ready()
    endings = load.stop()
    print(f"kills: {dict(kills)}; endings of requests: {dict(endings)}")
    assert endings["silence"] == endings["cut short"] == 0
    assert endings["finished"] > 0
    answer = box.client(timeout=REQUEST_DEADLINE_S).completions.create(
        model="tiny", prompt="still there?", max_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    state = box.ps()
    expected = 1 + 2 * len(state["processes"])  # the supervisor; a guard and its program each
    eventually(lambda: len(box.pids()) == expected, "no orphans are left")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_kills(mock_box: Box) -> None:
    kill_rounds(mock_box, 10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_kills(mock_box: Box) -> None:
    kill_rounds(mock_box, 100)
