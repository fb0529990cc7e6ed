"""Engines in processes of their own, on the real service: the same bytes, through deaths of either side."""

from __future__ import annotations

import hashlib
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gms_peers
import pytest
from gms_peers import DEADLINE_S, MIB, Service

TENSORS, BYTES = 400, 64 * 1024
ALLOCATED = 26 * MIB  # all of them, rounded up to the granularity

CHILD = """
import ctypes, hashlib, json, resource, sys
from pathlib import Path
from dynamo_box.gms.client import GmsFailure, TensorSpec, Weights
from dynamo_box.gms.vmm.host import view

TENSORS, BYTES = int(sys.argv[3]), int(sys.argv[4])
weights = Weights(Path(sys.argv[1]), "m", owner=sys.argv[2], content="c")

def specs():
    return [TensorSpec(f"layer.{n}.weight", "u8", (BYTES,), (1,), BYTES) for n in range(TENSORS)]

def fill(views):
    for n in range(TENSORS):
        if n == TENSORS // 2:
            print(json.dumps("filling"), flush=True)
            if len(sys.argv) > 5: sys.stdin.readline()
        views[f"layer.{n}.weight"][:] = n.to_bytes(4, "little") * (BYTES // 4)

def open_():
    got = weights.open(specs, fill, timeout_s=120)
    return [got.wrote, got.round_trips, got.bytes_sent, got.bytes_received, got.phases]

def digest():
    whole = hashlib.sha256()
    for _, tensor in sorted(weights.tensors().items()):
        whole.update(view(tensor.address, tensor.nbytes))
    return whole.hexdigest()

commands = {
    "open": open_,
    "digest": digest,
    "addresses": lambda: sorted(tensor.address for tensor in weights.tensors().values()),
    "unmap": weights.unmap,
    "remap": lambda: weights.remap(timeout_s=120),
    "stray": lambda: ctypes.memset(weights.tensors()["layer.7.weight"].address, 255, 1),
    "shrink": lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space() + 8 * 1024 * 1024, -1)),
    "grow": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
    "pss": lambda: sum(int(line.split()[1]) for line in pss_lines()),
}

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def pss_lines():
    ours = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]: ours = "/memfd:dynbox:" in line
        elif ours and line.startswith("Pss:"): yield line

for line in sys.stdin:
    try:
        answer = commands[line.strip()]()
    except GmsFailure as error:
        answer = type(error).__name__
    print(json.dumps(answer), flush=True)
"""


class Worker:
    def __init__(
        self, service: Service, owner: str, *, slow: bool = False, size: tuple[int, int] = (TENSORS, BYTES)
    ) -> None:
        self.service = service
        arguments = [str(service.path), owner, *map(str, size), *(["slow"] if slow else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """While the service's keeper is answered; None when the process has ended."""
        assert self.process.stdout is not None
        give_up_at = time.monotonic() + gms_peers.DEADLINE_S
        while not select.select([self.process.stdout], [], [], 0.002)[0]:
            assert time.monotonic() < give_up_at
            if self.service.process.poll() is None:
                self.service.pump(0.005)
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def do(self, text: str) -> Any:
        self.say(text)
        while (answer := self.answer()) == "filling":
            pass
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE_S)


def digest(tensors: int = TENSORS, size: int = BYTES) -> str:
    names = sorted(range(tensors), key=lambda number: f"layer.{number}.weight")
    return hashlib.sha256(b"".join(number.to_bytes(4, "little") * (size // 4) for number in names)).hexdigest()


@pytest.fixture
def worker(service: Service) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**options: Any) -> Worker:
        made.append(Worker(service, f"w{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_workers_share_one_copy_and_a_layout_costs_few_round_trips(worker: Callable[..., Worker]) -> None:
    workers = [worker() for _ in range(4)]
    opened = [one.do("open") for one in workers]
    assert [one[0] for one in opened] == [True, False, False, False]
    assert {one.do("digest") for one in workers} == {digest()}
    shares = sum(one.do("pss") for one in workers) * 1024
    assert 0.98 * ALLOCATED <= shares <= 1.02 * ALLOCATED
    # Acquire, Allocate, Put, Commit of the writer; Describe and Export of both.
    assert [one[1] for one in opened] == [6, 3, 3, 3]
    assert all(one[2] + one[3] < TENSORS * 150 for one in opened)


def test_sleep_and_wake_keep_addresses_and_bytes_wherever_the_weights_were(
    service: Service, worker: Callable[..., Worker]
) -> None:
    one = worker()
    one.do("open")
    addresses = one.do("addresses")
    for place in ("device", "host", "disk"):
        assert one.do("unmap") >= TENSORS * BYTES
        if place != "device":
            assert service.move(place).error == ""
            assert one.do("remap") == "Asleep"
            assert service.move("device").error == ""
        assert list(one.do("remap")) == ["attach", "remap", "populate"]
        assert one.do("digest") == digest()
        assert one.do("addresses") == addresses


def test_a_stray_write_ends_its_process_and_changes_nothing(worker: Callable[..., Worker]) -> None:
    one, two = worker(), worker()
    one.do("open")
    two.do("open")
    assert two.do("stray") is None
    assert two.process.wait(DEADLINE_S) == -signal.SIGSEGV
    assert one.do("digest") == digest()


def test_who_has_no_room_for_it_holds_nothing_and_is_in_nobodys_way(
    service: Service, worker: Callable[..., Worker]
) -> None:
    one, two = worker(), worker()
    for attempt in (one, two):  # as a writer, whose epoch goes, and as a reader
        attempt.do("shrink")
        assert attempt.do("open") == "OutOfMemory"
        attempt.do("grow")
        if attempt is one:
            service.layout(lambda layout: layout.state == "empty" and not layout.device_bytes)
            assert one.do("open")[0] is True
    service.layout(lambda layout: len(layout.readers) == 1)
    assert two.do("open")[0] is False
    assert {each.do("digest") for each in (one, two)} == {digest()}


def test_a_writer_killed_while_filling_leaves_nothing_and_the_one_that_waits_writes(
    service: Service, worker: Callable[..., Worker]
) -> None:
    one, two = worker(slow=True), worker()
    one.say("open")
    assert one.answer() == "filling"
    two.say("open")
    service.layout(lambda layout: bool(layout.waiters))
    one.process.kill()
    assert two.answer() == "filling"
    assert two.answer()[0] is True
    assert two.do("digest") == digest()


def test_readers_outlive_the_service_and_its_successor_counts_them(
    service: Service, worker: Callable[..., Worker]
) -> None:
    workers = [worker() for _ in range(2)]
    for one in workers:
        one.do("open")
    for _ in range(2):
        service.kill()
        assert {one.do("digest") for one in workers} == {digest()}
        service.start()
        service.layout(lambda layout: len(layout.readers) == 2)
    late = worker()
    assert late.do("open")[0] is False
    assert {one.do("digest") for one in [*workers, late]} == {digest()}


def test_a_service_killed_while_a_writer_fills_is_waited_for_and_the_writing_begins_anew(
    service: Service, worker: Callable[..., Worker]
) -> None:
    one = worker(slow=True)
    one.say("open")
    assert one.answer() == "filling"
    service.kill()
    one.say("go on")
    service.start()
    assert one.answer() == "filling"
    one.say("go on")
    assert one.answer()[0] is True
    assert one.do("digest") == digest()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_tensors_over_a_gibibyte_each_go_everywhere_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More bytes than a signed 32-bit number counts, in allocations of their own and in several files. It takes 6 GiB
    of memory and 3 GiB of disk.
    """
    monkeypatch.setattr(gms_peers, "DEADLINE_S", 600.0)
    size = 1200 * MIB
    service = Service(tmp_path, capacity_bytes=3 << 30, host_capacity_bytes=3 << 30)
    one = Worker(service, "w0", size=(2, size))
    two = Worker(service, "w1", size=(2, size))
    try:
        assert (one.do("open")[0], two.do("open")[0]) == (True, False)
        before = one.do("digest")
        assert two.do("digest") == before
        assert service.layout(lambda layout: layout.state == "committed").allocations == 2
        for place in ("host", "disk"):
            for worker in (one, two):
                assert worker.do("unmap") >= 2 * size
            for there in (place, "device"):
                moved = service.move(there)  # type: ignore[arg-type]
                assert (moved.error, moved.bytes) == ("", 2 * size)
            for worker in (one, two):
                assert list(worker.do("remap")) == ["attach", "remap", "populate"]
            assert one.do("digest") == before
        assert len(list(service.snapshots.glob("*/shard-*"))) == 3
    finally:
        for worker in (one, two):
            worker.close()
        service.close()
