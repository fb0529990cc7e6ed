"""What may befall a request between its two legs, each in a box of real processes: it is stopped at a point, something
is killed, lost, damaged or full there, and it goes on.

Two requests are at that point each time, one that was placed under the policy `strict` and one under `fallback`: so the
policy has changed in the middle of the first. It must end with an error that says why, wherever its prompt would have
to be computed again, and the second must say what an undisturbed worker says. Nothing may be held afterwards.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually
from mock_box import MockBox
from two_legs import Ask, BrokenOff, Failed, figures, nothing_is_held

from dynamo_box.control.client import ControlClient
from dynamo_box.paths import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFILL, DECODE, STORE = "tiny.prefill.0", "tiny.decode.0", "kvstore"
PROFILE = """
model:
  name: tiny
  source: {source}
  engine: native
  block_size: 16
  kv_memory: 768KiB
  workers: {{prefill: 1, decode: 1}}
memory: {{tiers: {{host: 8MiB, disk: 8MiB}}}}
kv: {{disk_admission: second_hit}}
disagg: {{transfer_lease: 2s}}
frontend: {{discovery_timeout: 60s}}
restart: {{first: 50ms, longest: 200ms, give_up_after: 1000, silence: 2m}}
"""
BLOCK = 16
LENGTH = 100
"""Of most prompts, in tokens: its last block is a partial one."""
LONG = 1600
"""Two such prompts are more than a pool holds."""
MAGIC = b"DYNBOXKV"
HEADER_BYTES = 64


class Scene:
    """The box, a prompt whose first token is a text by itself (so that its client sees it), and the answer to it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.prompt = self._talkative()
        self.expected = Ask(box, self.body("alone", nvext={"backend_instance_id": PREFILL})).whole().said

    def _talkative(self) -> list[int]:
        rng = random.Random(6)
        while True:
            self.prompt = [rng.randrange(3, 288) for _ in range(LENGTH)]
            first = Ask(self.box, self.body("first token", max_tokens=1, nvext={"backend_instance_id": PREFILL}))
            if first.whole().text.isprintable() and first.text:
                return self.prompt

    def body(self, salt: str, **more: Any) -> dict[str, Any]:
        """Requests with another `salt` share no KV."""
        settings = {"model": "tiny", "prompt": self.prompt, "max_tokens": 60, "temperature": 1.0, "seed": 6}
        return {**settings, "cache_salt": salt, **more}

    def policy(self, name: str) -> None:
        self.set("router", "disagg", name)

    def set(self, process: str, key: str, value: str) -> str:
        with ControlClient.connect(RunDir(self.box.run_dir)) as client:
            return client.set_option(process, key, value, COMMAND_DEADLINE_S)

    def pair(self, salt: str, **more: Any) -> tuple[Ask, Ask]:
        """Requests that have said their first token: one that is placed under `strict`, one under `fallback`."""
        asks = []
        for policy in ("strict", "fallback"):
            self.policy(policy)
            asks.append(ask := Ask(self.box, self.body(f"{salt}, {policy}", **more)))
            assert next(ask.pieces())
        return asks[0], asks[1]

    def placed(self, salt: str) -> tuple[Ask, Ask]:
        """The same, on their way to the prefill worker: it must be stopped."""
        asks = []
        for number, policy in enumerate(("strict", "fallback"), 1):
            self.policy(policy)
            asks.append(Ask(self.box, self.body(f"{salt}, {policy}")))
            eventually(lambda number=number: in_phase(self.box, "prefill") == number, "they have their places")
        return asks[0], asks[1]

    def in_two_legs(self) -> None:
        """Return when everybody knows everybody, and nothing is held."""
        nothing_is_held(self.box)
        self.policy("fallback")  # what can't go in two legs yet isn't refused
        eventually(
            lambda: Ask(self.box, self.body("in two legs", prompt=[5], max_tokens=2)).whole().workers[0], "two legs"
        )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Scene]:
    box = MockBox(tmp_path_factory.mktemp("box"), PROFILE.format(source=tiny_model))
    box.start_again()
    box.wait_routed()
    yield Scene(box)
    box.destroy()


@contextmanager
def stopped(box: Box, process: str) -> Iterator[None]:
    """It is there and does nothing. If it is killed meanwhile, its successor is not stopped."""
    pid = box.process(process)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if box.process(process)["pid"] == pid:
            os.kill(pid, signal.SIGCONT)


def kill(box: Box, process: str) -> None:
    """Return when it is there again."""
    before = box.process(process)
    os.kill(before["pid"], signal.SIGKILL)
    eventually(
        lambda: (now := box.process(process))["restarts"] > before["restarts"] and now["state"] == "ready",
        f"{process} is there again",
    )


def in_phase(box: Box, phase: str) -> int:
    return sum(each["phase"] == phase for each in figures(box, "frontend").get("live", ()))


def fails(ask: Ask, *says: str) -> None:
    with pytest.raises(Failed, match="could not be handed over: .*" + ".*".join(says)):
        ask.whole()


def test_what_is_lost_behind_the_hand_over(scene: Scene) -> None:
    """Only the three of this test are handed over in the first life of the prefill worker: they can be counted."""
    box = scene.box

    def handed_over(count: int) -> None:
        eventually(lambda: figures(box, PREFILL).get("handed_over") == count, f"{count} are handed over")

    with stopped(box, DECODE):
        strict, fallback = scene.pair("expired")
        handed_over(2)
        eventually(lambda: "stay" not in scene.set(STORE, "clear", "g2"), "nothing is held any longer")
    fails(strict, f"0 of {LENGTH} tokens are there", "nothing is held for it any longer")
    assert fallback.whole().said == scene.expected

    with stopped(box, DECODE):
        strict, fallback = scene.pair("damaged")
        handed_over(4)
        flip_a_bit_of_each_header(box)
    fails(strict, f"0 of {LENGTH} tokens are there", "its slot held another")
    assert fallback.whole().said == scene.expected

    with stopped(box, DECODE):
        strict, fallback = scene.pair("whoever computed it is dead")
        handed_over(6)
        kill(box, PREFILL)
    for ask in (strict, fallback):
        assert (ask.whole().said, ask.workers) == (scene.expected, (PREFILL, DECODE))
    scene.in_two_legs()


def flip_a_bit_of_each_header(box: Box) -> None:
    """Of those of all blocks in host memory: it says another digest then."""
    descriptors = Path(f"/proc/{box.process(STORE)['pid']}/fd")
    memory = next(path for path in descriptors.iterdir() if _points_to(path).startswith("/memfd:"))
    flipped = 0
    with memory.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place = mapped.find(MAGIC)
        while place >= 0 and place % HEADER_BYTES == 0:
            mapped[place + len(MAGIC) + 8] ^= 1
            flipped += 1
            place = mapped.find(MAGIC, place + HEADER_BYTES)
    assert flipped >= 2 * -(-LENGTH // BLOCK)


def _points_to(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:  # of a connection that has ended
        return ""


def test_a_death_before_the_first_token(scene: Scene) -> None:
    """`strict` waits for a prefill worker, `fallback` has it done in another role."""
    with stopped(scene.box, PREFILL):
        strict, fallback = scene.placed("not yet computed")
        scene.policy("strict")
        kill(scene.box, PREFILL)
    assert (strict.whole().said, strict.workers) == (scene.expected, (PREFILL, DECODE))
    assert (fallback.whole().said, fallback.workers) == (scene.expected, (None, DECODE))
    scene.in_two_legs()


def test_whoever_is_to_go_on_does_so_in_another_role_too(scene: Scene) -> None:
    with ControlClient.connect(RunDir(scene.box.run_dir)) as client:
        for role in ("aggregated", "decode"):
            with stopped(scene.box, PREFILL):
                asks = scene.placed(f"now {role}")
                client.set_role(DECODE, role, drain_s=60, timeout_s=COMMAND_DEADLINE_S)
            for ask in asks:
                assert (ask.whole().said, ask.workers) == (scene.expected, (PREFILL, DECODE))
            scene.in_two_legs()


@pytest.mark.parametrize(
    ("at", "victim", "says"),
    [
        (STORE, PREFILL, PREFILL),
        (STORE, STORE, "kvstore"),
        (DECODE, STORE, f"0 of {LENGTH} tokens are there"),
        (DECODE, DECODE, DECODE),
    ],
    ids=["prefill in the hand-over", "store in the hand-over", "store before the claim", "decode before the claim"],
)
def test_a_death_between_the_legs(scene: Scene, at: str, victim: str, says: str) -> None:
    """The hand-over is `at` whoever is stopped."""
    with stopped(scene.box, at):
        strict, fallback = scene.pair(f"{victim} dies at {at}")
        kill(scene.box, victim)
    fails(strict, says)
    assert fallback.whole().said == scene.expected
    scene.in_two_legs()


def test_a_router_that_dies_between_the_legs_is_not_missed_and_a_frontend_takes_its_requests_along(
    scene: Scene,
) -> None:
    with stopped(scene.box, DECODE):
        asks = scene.pair("router")
        kill(scene.box, "router")
    for ask in asks:
        assert (ask.whole().said, ask.workers) == (scene.expected, (PREFILL, DECODE))
    scene.in_two_legs()

    with stopped(scene.box, DECODE):
        asks = scene.pair("frontend")
        kill(scene.box, "frontend")
    for ask in asks:
        with pytest.raises(BrokenOff):
            ask.whole()
    scene.in_two_legs()


def test_clients_leave_at_each_point_of_the_way(scene: Scene) -> None:
    box = scene.box
    for number in range(3):
        Ask(box, scene.body(f"leaves at once {number}", prompt=scene.prompt * (LONG // LENGTH))).close()
    for process, phase in (("router", "routing"), (PREFILL, "prefill")):
        with stopped(box, process):
            leaver = Ask(box, scene.body(f"leaves in {phase}"))
            eventually(lambda phase=phase: in_phase(box, phase) == 1, f"it is in {phase}")
            leaver.close()
            eventually(lambda: not figures(box, "frontend")["active"], "the frontend knows")
    for process, point in ((STORE, "in the hand-over"), (DECODE, "before it is taken over")):
        with stopped(box, process):
            for leaver in scene.pair(f"leaves {point}"):
                leaver.close()
            eventually(lambda: not figures(box, "frontend")["active"], f"the frontend knows who left {point}")
    for leaver in scene.pair("leaves in its answer", max_tokens=1000):
        for _ in range(3):
            next(leaver.pieces())
        leaver.close()
    scene.in_two_legs()


def test_a_decode_worker_whose_pool_is_full_when_the_blocks_arrive(scene: Scene) -> None:
    """Of those that arrive at once only one has room. Nobody computes its prompt again: the policy forbids it."""
    box = scene.box
    prompt = scene.prompt * (LONG // LENGTH)
    assert 2 * LONG // BLOCK > figures(box, DECODE)["kv_blocks_total"] > LONG // BLOCK
    alone = scene.body("alone", prompt=prompt, nvext={"backend_instance_id": PREFILL})
    expected = Ask(box, alone).whole().said
    scene.policy("strict")
    with stopped(box, DECODE):
        asks = [Ask(box, scene.body(f"full {number}", prompt=prompt)) for number in range(4)]
        begun = [next(ask.pieces()) for ask in asks]
        asks.pop(1).close()
    assert all(begun)
    for ask in asks:
        assert (ask.whole().said, ask.workers) == (expected, (PREFILL, DECODE))
    scene.in_two_legs()


def test_blocks_that_were_damaged_on_disk(scene: Scene) -> None:
    """The prefill worker has the prompt cached, and the store has it on disk: nothing of it is computed or written."""
    box, body = scene.box, scene.body("damaged on disk")
    scene.policy("fallback")
    before = set(blocks_on_disk(box))
    assert Ask(box, body).whole().workers == (PREFILL, DECODE)
    eventually(lambda: len(set(blocks_on_disk(box)) - before) >= -(-LENGTH // BLOCK), "what was used twice is on disk")
    for number in range(2):  # the decode worker forgets what it has loaded
        prompt = scene.prompt * (LONG // LENGTH)
        Ask(box, scene.body(f"{number}", prompt=prompt, nvext={"backend_instance_id": DECODE})).whole()
    scene.set(STORE, "clear", "g2")
    for path in blocks_on_disk(box):
        with path.open("r+b") as file:
            file.seek(-BLOCK, os.SEEK_END)
            file.write(b"damage")

    scene.policy("strict")
    fails(Ask(box, body), f"of {LENGTH} tokens are there")
    scene.policy("fallback")
    assert Ask(box, body).whole().said == scene.expected
    eventually(lambda: figures(box, STORE)["disk"]["failed"], "the store says so")
    scene.in_two_legs()


def blocks_on_disk(box: Box) -> list[Path]:
    return list(Path(figures(box, STORE)["directory"]).rglob("*.kv"))
