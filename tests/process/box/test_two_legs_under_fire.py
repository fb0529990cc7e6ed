"""Processes die, clients leave and the policy changes, at random, in a box that serves requests in two legs; or a
person changes roles, workers and policy under load. What is answered is what an undisturbed worker answers, no request
fails but those of a frontend that dies and those of which the policy `strict` says so, and in the end nothing is held.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually
from mock_box import MockBox
from two_legs import Ask, BrokenOff, Failed, nothing_is_held

from dynamo_box.control.client import ControlClient
from dynamo_box.paths import RunDir

PROFILE = """
model:
  name: tiny
  source: {source}
  engine: native
  block_size: 16
  kv_memory: 1MiB
  workers: {{prefill: 2, decode: 2}}
memory: {{tiers: {{host: 8MiB, disk: 32MiB}}}}
disagg: {{transfer_lease: 5s}}
restart: {{first: 50ms, longest: 200ms, give_up_after: 1000}}
"""
CLIENTS = 8
LENGTHS = (1, 5, 16, 17, 64, 200, 333, 700)
ANSWERS = (2, 9, 30, 80)
LONGEST_PAUSE_S = 0.3
CALM_REQUESTS = 4
"""So many in two legs end before most events, so that there is something to disturb."""
SHARE_OF_CALM = 0.7
SHARE_OF_DEATHS, SHARE_OF_POLICIES = 0.3, 0.05
KINDS = ["worker"] * 4 + ["kvstore", "router", "frontend"]
POLICIES = ["fallback", "fallback", "conditional:min_uncached_tokens=60,min_uncached_share=0.2", "strict"]
SHARE_OF_ONE_LEG = 0.1
"""Of the deaths of workers: those that may leave nobody for one of the legs. All others wait until somebody is back."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Box]:
    """Each test but the last leaves it as it was."""
    made = MockBox(tmp_path_factory.mktemp("box"), PROFILE.format(source=tiny_model))
    made.start_again()
    yield made
    made.destroy()


def bodies() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "model": "tiny",
            "prompt": [rng.randrange(3, 288) for _ in range(length)],
            "max_tokens": max_tokens,
            "temperature": float(number % 2),
            "seed": number,
        }
        for number, (length, max_tokens) in enumerate((length, answer) for length in LENGTHS for answer in ANSWERS)
    ]


class Load:
    """Clients that ask and compare. Whoever takes something from `leave` gives its request up at a random point, and
    whose frontend has died asks again. Who knew the policy `strict` may have been refused by it.
    """

    def __init__(self, box: Box, expected: list[tuple[str, int, int]], seed: int) -> None:
        self._box = box
        self._bodies = bodies()
        self._expected = expected
        self._over = threading.Event()
        self.leave: SimpleQueue[None] = SimpleQueue()
        self.frontends_killed = 0
        self.strict, self.strict_before = False, 0
        """Whether that is the policy now, and how often it came."""
        self.endings: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, rng: random.Random) -> None:
        while not self._over.is_set():
            number = rng.randrange(len(self._bodies))
            salt = rng.choice(["", "a", str(rng.random())])
            body = {**self._bodies[number], **({"cache_salt": salt} if salt else {})}
            try:
                self.leave.get_nowait()
            except Empty:
                self._ask(number, body)
            else:
                self._give_up(body, rng)

    def _ask(self, number: int, body: dict[str, Any]) -> None:
        forgives = self._forgives()
        ask = Ask(self._box, body)
        try:
            ask.whole()
        except (Failed, OSError) as error:
            if not forgives(error):
                self.wrong.append(f"request {number} failed: {error!r}")
            elif isinstance(error, BrokenOff):
                self.endings["asked again"] += 1
                self._ask(number, body)
            else:
                self.endings["refused by the policy"] += 1
            return
        if ask.said != self._expected[number]:
            self.wrong.append(f"request {number} ({ask.workers}) said {ask.said}, not {self._expected[number]}")
        self.endings["two legs" if ask.workers[0] else "one leg"] += 1

    def _forgives(self) -> Callable[[Exception], bool]:
        """Tells whether the end of a request that begins now is not wrong."""
        frontends, strict, before = self.frontends_killed, self.strict, self.strict_before

        def forgives(error: Exception) -> bool:
            if isinstance(error, BrokenOff):
                return frontends < self.frontends_killed
            return isinstance(error, Failed) and "strict" in str(error) and (strict or before < self.strict_before)

        return forgives

    def _give_up(self, body: dict[str, Any], rng: random.Random) -> None:
        forgives = self._forgives()
        ask = Ask(self._box, body)
        after = rng.choice(["no time", "a while", "some tokens"])
        self.endings[f"left after {after}"] += 1
        try:
            if after == "a while":
                self._over.wait(rng.uniform(0, LONGEST_PAUSE_S))
            elif after == "some tokens":
                wanted = rng.randrange(1, 8)
                for seen, _ in enumerate(ask.pieces(), 1):
                    if seen == wanted:
                        break
        except (Failed, OSError) as error:
            if not forgives(error):
                self.wrong.append(f"a request that was to be left failed: {error!r}")
        finally:
            ask.close()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(180)
            assert not thread.is_alive(), "a client hangs"


def kill_somebody(box: Box, load: Load, rng: random.Random) -> str:
    """No worker that is the last."""
    kind = rng.choice(KINDS)
    any_worker = rng.random() < SHARE_OF_ONE_LEG

    def candidates() -> list[dict[str, Any]]:
        ready = [each for each in box.ps()["processes"] if each["state"] == "ready" and each["kind"] == kind]
        if kind != "worker":
            return ready
        of_role = Counter(each["role"] for each in ready)
        return [each for each in ready if (len(ready) if any_worker else of_role[each["role"]]) > 1]

    victim = rng.choice(eventually(candidates, "somebody may be killed"))
    load.frontends_killed += kind == "frontend"
    os.kill(victim["pid"], signal.SIGKILL)
    load.frontends_killed += kind == "frontend"  # for requests that have begun just before its death
    name, before = victim["name"], victim["restarts"]
    eventually(lambda: box.process(name)["restarts"] > before, f"{name} was restarted")
    return str(name)


def change_policy(box: Box, load: Load, policy: str) -> str:
    strict = policy == "strict"
    if strict:
        load.strict, load.strict_before = True, load.strict_before + 1
    eventually(lambda: box.process("router")["state"] == "ready", "there is a router to be told")
    with ControlClient.connect(RunDir(box.run_dir)) as client:
        client.set_option("router", "disagg", policy, COMMAND_DEADLINE_S)
    load.strict = strict
    return policy.partition(":")[0]


@pytest.fixture(scope="module")
def expected(box: Box) -> list[tuple[str, int, int]]:
    """What an undisturbed worker says to each of the bodies."""
    told = []
    for body in bodies():
        alone = Ask(box, {**body, "cache_salt": "alone", "nvext": {"backend_instance_id": "tiny.prefill.0"}}).whole()
        assert alone.workers == (None, "tiny.prefill.0")
        told.append(alone.said)
    return told


def all_is_well(box: Box, expected: list[tuple[str, int, int]]) -> None:
    nothing_is_held(box)
    for body, said in zip(bodies()[:3], expected, strict=False):
        again = eventually(lambda body=body: (ask := Ask(box, body).whole()).workers[0] and ask, "two legs again")
        assert again.said == said
    expected = 1 + 2 * len(box.ps()["processes"])  # the supervisor; a guard and its program each
    eventually(lambda: len(box.pids()) == expected, "no orphans are left")


def under_fire(box: Box, expected: list[tuple[str, int, int]], events: int) -> None:
    rng = random.Random(events)
    load = Load(box, expected, events)
    killed: Counter[str] = Counter()
    policies: Counter[str] = Counter()
    began = time.monotonic()
    try:
        for _ in range(events):
            if rng.random() < SHARE_OF_CALM:
                enough = load.endings["two legs"] + CALM_REQUESTS
                eventually(
                    lambda enough=enough: load.wrong or load.endings["two legs"] >= enough, "requests go in two legs"
                )
            act = rng.random()
            if act < SHARE_OF_DEATHS:
                killed[kill_somebody(box, load, rng)] += 1
            elif act < SHARE_OF_DEATHS + SHARE_OF_POLICIES:
                policies[change_policy(box, load, rng.choice(POLICIES))] += 1
            else:
                load.leave.put(None)
            if load.wrong:
                break
        eventually(lambda: load.wrong or load.leave.empty(), "whoever was to leave has left")
    finally:
        load.stop()
    took_s = time.monotonic() - began
    print(f"{events} events in {took_s:.0f} s; killed: {dict(killed)}; policies: {dict(policies)}")
    print(f"requests: {dict(load.endings)}")
    assert not load.wrong, "\n".join(load.wrong)
    assert load.endings["two legs"] > events
    change_policy(box, load, "fallback")
    all_is_well(box, expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_five_deaths_and_departures(box: Box, expected: list[tuple[str, int, int]]) -> None:
    under_fire(box, expected, 25)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_five_hundred_deaths_and_departures(box: Box, expected: list[tuple[str, int, int]]) -> None:
    under_fire(box, expected, 500)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_roles_workers_and_policy_change_under_load(box: Box, expected: list[tuple[str, int, int]]) -> None:
    load = Load(box, expected, 0)

    def so_many_end(way: str) -> None:
        wanted = load.endings[way] + CLIENTS
        eventually(lambda: load.wrong or load.endings[way] >= wanted, f"requests go in {way}")

    acts = [
        (("disagg", "--policy", "conditional", "--min-uncached-tokens", "100000"), "one leg"),
        (("disagg", "--policy", "fallback"), "two legs"),
        (("role", "tiny.prefill.0", "decode"), "two legs"),
        (("role", "tiny.prefill.1", "both"), "two legs"),
        (("role", "tiny.decode.0", "prefill"), "two legs"),
        (("scale", "tiny", "prefill", "0"), "two legs"),  # whoever may do both computes prompts for the others
        (("scale", "tiny", "aggregated", "0"), "one leg"),
        (("scale", "tiny", "prefill", "1"), "two legs"),
    ]
    try:
        so_many_end("two legs")
        for command, way in acts:
            box.dynbox(*command)
            so_many_end(way)
            assert not load.wrong, f"{command}: {load.wrong}"
    finally:
        load.stop()
    assert not load.wrong, "\n".join(load.wrong)
    all_is_well(box, expected)
