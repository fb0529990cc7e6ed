"""An engine's side of weight memory against a server that is scripted, and may fail at any step."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from dynamo_box.gms.client import (
    Asleep,
    GmsRefused,
    GmsSession,
    LockTimeout,
    OutOfMemory,
    ServerGone,
    StaleLayout,
    TensorSpec,
    Weights,
)
from dynamo_box.gms.client.packing import ALIGNMENT, pack
from dynamo_box.gms.vmm import HostVmm
from dynamo_box.gms.vmm.host import GRANULARITY, view
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import connect_unix, encode_frame, listen_unix

DEADLINE_S = 60
LAYOUT = "tiny"

Answer = tuple[gms.ServerMessage, list[int]] | bytes | None
"""A message and its descriptors, bytes instead, or the end of the connection."""
Script = Callable[[gms.EngineMessage, Answer], Answer]


class Last(bytes):
    """Bytes, and then the end of the connection."""


class ScriptedServer:
    """One layout, one client at a time as a rule, no locks; `script[kind]` answers instead of it, once for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script: dict[type, Script] = {}
        self.heard: list[gms.EngineMessage] = []
        self.readers = 0
        self.changed = threading.Condition()
        self.epoch = 0
        self.content = ""
        self.memory: dict[int, tuple[int, int]] = {}
        self.entries: list[gms.Entry] = []
        self.committed = False
        self.asleep = False
        self.vmm = HostVmm()
        self._connections: list[BlockingFdChannel[gms.EngineMessage]] = []
        self._serving: list[threading.Thread] = []
        self._turn = threading.Lock()
        """Held from the request to the close of the descriptors that were sent."""
        self.start()

    def memfds_of_others(self) -> int:
        """Open in this process, beside the server's own: an imported one would pin the memory."""
        with self._turn:
            return memfds_open() - len(self.memory)

    def start(self) -> None:
        self._listener = listen_unix(self.path)
        self._listener.setblocking(True)
        self._living = True
        self._thread = threading.Thread(target=self._accept, args=[self._listener])
        self._thread.start()

    def kill(self) -> None:
        """What is committed stays: the supervisor holds it."""
        self._living = False
        connect_unix(self.path).close()
        self._thread.join()
        self._listener.close()
        self.path.unlink()
        for channel in list(self._connections):
            channel.interrupt()

    def close(self) -> None:
        if self._living:
            self.kill()
        for thread in self._serving:
            thread.join(DEADLINE_S)
        assert not self._connections
        self.forget()

    def forget(self) -> None:
        for _, fd in self.memory.values():
            os.close(fd)
        self.memory, self.entries, self.committed = {}, [], False

    def wait_readers(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.readers == count, DEADLINE_S)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            if not self._living:
                sock.close()
                return
            channel = BlockingFdChannel(sock, gms.engine_decoder)
            self._connections.append(channel)
            self._serving.append(threading.Thread(target=self._serve, args=[channel, sock]))
            self._serving[-1].start()

    def _serve(self, channel: BlockingFdChannel[gms.EngineMessage], sock: socket.socket) -> None:
        lock, epoch = "", 0
        with contextlib.suppress(OSError):
            while (came := channel.receive(DEADLINE_S)) is not None:
                message = came[0]
                with self._turn:
                    self.heard.append(message)
                    answer = self._answer(message)
                    script = self.script.pop(type(message), None)
                    if script is not None:
                        answer = script(message, answer)
                    if answer is None:
                        break
                    if isinstance(answer, tuple) and isinstance(answer[0], gms.Granted):
                        self._count(-(lock == "ro"))
                        lock, epoch = answer[0].lock, self.epoch
                        self._count(lock == "ro")
                    elif isinstance(message, gms.Release):
                        self._count(-(lock == "ro"))
                        lock = ""
                    self._send(sock, answer)
                if isinstance(answer, Last):
                    break
        with self._turn:
            if lock == "rw" and not self.committed and epoch == self.epoch:  # nobody has begun anew meanwhile
                self.forget()
        channel.close()
        self._connections.remove(channel)
        self._count(-(lock == "ro"))

    def _count(self, step: int) -> None:
        with self.changed:
            self.readers += step
            self.changed.notify_all()

    def _send(self, sock: socket.socket, answer: tuple[gms.ServerMessage, list[int]] | bytes) -> None:
        data, fds = answer if isinstance(answer, tuple) else (answer, [])
        frame = data if isinstance(data, bytes) else encode_frame(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        sock.setblocking(True)
        try:
            sent = sock.sendmsg([frame], rights)
            sock.sendall(frame[sent:])
        finally:
            sock.setblocking(False)
            for fd in fds:
                os.close(fd)

    @property
    def layout_hash(self) -> str:
        return f"hash-{self.content}-{len(self.entries)}" if self.committed else ""

    def _granted(self, lock: str) -> gms.Granted:
        return gms.Granted("rw" if lock == "rw" else "ro", self.epoch, self.layout_hash)

    def _answer(self, message: gms.EngineMessage) -> tuple[gms.ServerMessage, list[int]]:
        match message:
            case gms.Acquire():
                if self.committed and message.expect_hash not in ("", self.layout_hash):
                    return gms.GmsError("stale", "another layout is committed"), []
                if self.committed and self.asleep:
                    return gms.GmsError("asleep", "its bytes are elsewhere"), []
                if self.committed and (message.lock == "ro" or message.content == self.content):
                    return self._granted("ro"), []
                if message.lock == "ro":
                    return gms.GmsError("timeout", "nothing is committed"), []
                self.forget()
                self.epoch += 1
                self.content = message.content
                return self._granted("rw"), []
            case gms.Allocate():
                sizes = [-(-size // GRANULARITY) * GRANULARITY for size in message.sizes]
                first = len(self.memory)
                for number, size in enumerate(sizes, first):
                    self.memory[number] = (size, self.vmm.create(size, "test-weights"))
                made = tuple(gms.Allocation(number, size) for number, size in enumerate(sizes, first))
                return gms.Allocated(made, len(made)), [os.dup(self.memory[one.id][1]) for one in made]
            case gms.Put():
                self.entries += message.entries
                return gms.Done(), []
            case gms.Commit():
                for _, fd in self.memory.values():
                    self.vmm.seal(fd)
                self.committed = True
                return self._granted("ro"), []
            case gms.Describe():
                page = self.entries[message.start : message.start + 150]
                more = message.start + len(page) < len(self.entries)
                held = tuple(gms.Allocation(id_, size) for id_, (size, _) in self.memory.items())
                return gms.Manifest(held, tuple(page), more), []
            case gms.Export():
                fds = [self.vmm.readonly(self.memory[id_][1]) for id_ in message.ids]
                return gms.Exported(message.ids, len(fds)), fds
            case _:
                return gms.Done(), []


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No descriptor, map or thread that was not there before."""
    gc.collect()
    gc.freeze()  # so that the next ones need not look through what the whole suite has imported
    before = (len(os.listdir("/proc/self/fd")), maps(), threading.active_count())
    yield
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), maps(), threading.active_count()) == before


@pytest.fixture
def server(tmp_path: Path, nothing_left: None) -> Iterator[ScriptedServer]:
    one = ScriptedServer(tmp_path / "gms.sock")
    yield one
    one.close()


@pytest.fixture
def weights(server: ScriptedServer) -> Iterator[Callable[..., Weights]]:
    made: list[Weights] = []

    def make(content: str = "v1") -> Weights:
        made.append(Weights(server.path, LAYOUT, owner=f"worker {len(made)}", content=content))
        return made[-1]

    yield make
    for one in made:
        one.close()


def maps() -> list[str]:
    with open("/proc/self/maps") as lines:
        return [line for line in lines if "/memfd:test-weights" in line]


def memfds_open() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += "/memfd:test-weights" in os.readlink(f"/proc/self/fd/{name}")
    return count


TENSORS: dict[str, bytes] = {f"layer.{number}": os.urandom(1000 + 7 * number) for number in range(400)} | {
    "large": os.urandom(GRANULARITY + 5),
    "empty": b"",
}


def specs() -> Sequence[TensorSpec]:
    return [TensorSpec(name, "u8", (len(data),), (1,), len(data)) for name, data in TENSORS.items()]


def fill(views: Mapping[str, memoryview]) -> None:
    assert set(views) == set(TENSORS)
    for name, data in TENSORS.items():
        views[name][:] = data


def never(*_: object) -> Sequence[TensorSpec]:
    raise AssertionError("a reader has nothing to write")


def read(one: Weights) -> dict[str, bytes]:
    return {name: bytes(view(tensor.address, tensor.nbytes)) for name, tensor in one.tensors().items()}


# Packing


def test_tensors_are_packed_on_boundaries_into_few_allocations() -> None:
    sizes = [100, 0, 300, 1, 5 * GRANULARITY, 7]
    wanted = [TensorSpec(str(number), "u8", (size,), (1,), size) for number, size in enumerate(sizes)]
    packing = pack(wanted, GRANULARITY, max_allocation=2 * GRANULARITY)
    assert packing.sizes == (GRANULARITY, 5 * GRANULARITY, GRANULARITY)
    assert all(place.offset % ALIGNMENT == 0 for place in packing.places)
    assert [place.allocation for place in packing.places] == [0, 0, 0, 0, 1, 2]
    taken = sorted(
        (p.allocation, p.offset, p.offset + spec.nbytes) for p, spec in zip(packing.places, wanted, strict=True)
    )
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in itertools.pairwise(taken))
    with pytest.raises(ValueError, match="comes twice"):
        pack([wanted[0], wanted[0]], GRANULARITY)


def test_a_layout_without_tensors_is_a_layout(weights: Callable[..., Weights]) -> None:
    one = weights()
    assert one.open(list, lambda views: None, timeout_s=DEADLINE_S).wrote
    assert one.tensors() == {}


# What engines do


def test_the_first_writes_and_the_rest_map_the_same_bytes(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    first, second = weights(), weights()
    wrote = first.open(specs, fill, timeout_s=DEADLINE_S)
    assert list(wrote.phases) == ["acquire", "allocate", "fill", "commit", "attach", "remap", "populate"]
    mapped = second.open(never, never, timeout_s=DEADLINE_S)  # type: ignore[arg-type]
    assert list(mapped.phases) == ["acquire", "attach", "remap", "populate"]
    assert (wrote.wrote, mapped.wrote) == (True, False)
    assert read(first) == read(second) == TENSORS
    assert first.layout_hash == second.layout_hash == server.layout_hash
    assert (first.epoch, first.bytes, wrote.bytes) == (1, mapped.bytes, second.bytes)
    assert all(tensor.address % ALIGNMENT == 0 for tensor in second.tensors().values())
    assert second.tensors()["layer.3"][2:] == ("u8", (1021,), (1,))
    assert server.memfds_of_others() == 0
    assert all(line.split()[1] == "r--s" for line in maps())
    server.wait_readers(2)


def test_sleeping_unmaps_and_gives_back_the_lock_and_waking_shows_the_same_addresses(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    one = weights()
    size = one.open(specs, fill, timeout_s=DEADLINE_S).bytes
    tensors = one.tensors()
    for _ in range(20):
        assert one.unmap() == size
        server.wait_readers(0)
        assert maps() == []
        assert one.unmap() == 0
        assert list(one.remap(timeout_s=DEADLINE_S)) == ["attach", "remap", "populate"]
        assert one.remap(timeout_s=DEADLINE_S) == {}
        assert one.tensors() == tensors
    assert read(one) == TENSORS
    server.wait_readers(1)


def test_a_writer_that_fails_leaves_nothing_and_the_next_one_writes(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    def failing(views: Mapping[str, memoryview]) -> None:
        views["large"][:10] = b"half a ten"
        raise OSError("the file is damaged")

    with pytest.raises(OSError, match="damaged"):
        weights().open(specs, failing, timeout_s=DEADLINE_S)
    assert maps() == []
    other = weights()
    assert other.open(specs, fill, timeout_s=DEADLINE_S).wrote
    assert read(other) == TENSORS


def test_views_end_with_the_filling(weights: Callable[..., Weights]) -> None:
    kept: list[memoryview] = []

    def keeping(views: Mapping[str, memoryview]) -> None:
        kept.extend(views.values())
        fill(views)

    weights().open(specs, keeping, timeout_s=DEADLINE_S)
    with pytest.raises(ValueError, match="released"):
        kept[0][0]


def test_other_content_is_written_anew(weights: Callable[..., Weights]) -> None:
    assert weights("v1").open(specs, fill, timeout_s=DEADLINE_S).wrote
    newer = weights("v2")
    assert newer.open(specs, fill, timeout_s=DEADLINE_S).wrote
    assert newer.epoch == 2


def test_who_waits_is_told_what_for(server: ScriptedServer, weights: Callable[..., Weights]) -> None:
    queued = gms.Queued(2, "worker 9")

    def later(message: gms.EngineMessage, answer: Answer) -> Answer:
        assert isinstance(answer, tuple)
        return encode_frame(queued) + encode_frame(queued) + encode_frame(gms.Granted("rw", 1))

    server.script[gms.Acquire] = later
    heard: list[gms.Queued] = []
    weights().open(specs, fill, timeout_s=DEADLINE_S, waiting=heard.append)
    assert heard == [queued, queued]


def test_a_layout_costs_few_round_trips(weights: Callable[..., Weights]) -> None:
    first, second = weights(), weights()
    wrote = first.open(specs, fill, timeout_s=DEADLINE_S)
    mapped = second.open(never, never, timeout_s=DEADLINE_S)  # type: ignore[arg-type]
    # Acquire, Allocate, Put, Commit, then as a reader: this server's pages are small, so three Describes, and Export.
    assert (wrote.round_trips, mapped.round_trips) == (8, 5)
    assert mapped.bytes_received < 402 * 60
    assert mapped.bytes_sent < 400


# What can go wrong

STEPS = [gms.Acquire, gms.Allocate, gms.Put, gms.Commit, gms.Describe, gms.Export]


def instead(answer: Answer) -> Script:
    def script(_: gms.EngineMessage, usual: Answer) -> Answer:
        for fd in usual[1] if isinstance(usual, tuple) else []:
            os.close(fd)
        return answer

    return script


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    "bad", [None, b"\0\0\0\1\xc1", Last(b"\0\0\1\0\x81"), encode_frame(gms.Adopted()), b"\xff\xff\xff\xff"]
)
def test_a_server_that_fails_at_any_step_is_tried_again(
    server: ScriptedServer, weights: Callable[..., Weights], kind: type, bad: Answer
) -> None:
    server.script[kind] = instead(bad)
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    assert read(one) == TENSORS
    assert sum(isinstance(message, gms.Acquire) for message in server.heard) == 2
    assert server.memfds_of_others() == 0


@pytest.mark.parametrize("kind", [gms.Allocate, gms.Export])
@pytest.mark.parametrize("change", ["one too few", "one too many", "said so"])
def test_wrong_numbers_of_descriptors_are_refused_and_all_are_closed(
    server: ScriptedServer, weights: Callable[..., Weights], kind: type, change: str
) -> None:
    def script(_: gms.EngineMessage, answer: Answer) -> Answer:
        assert isinstance(answer, tuple)
        message, fds = answer
        assert isinstance(message, gms.Allocated | gms.Exported)
        fds = [*fds, os.dup(fds[0])] if change != "one too few" else close_first(fds)
        if change == "said so":  # a message in order, but an answer to another question
            message = msgspec.structs.replace(message, descriptors=len(fds))
        return message, fds

    server.script[kind] = script
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    assert sum(isinstance(message, gms.Acquire) for message in server.heard) == 2
    assert server.memfds_of_others() == 0


def close_first(fds: list[int]) -> list[int]:
    os.close(fds[0])
    return fds[1:]


REFUSALS: list[tuple[gms.ErrorCode, type[GmsRefused]]] = [
    ("stale", StaleLayout),
    ("asleep", Asleep),
    ("out_of_memory", OutOfMemory),
    ("timeout", LockTimeout),
    ("too_many_waiters", GmsRefused),
    ("unknown_layout", GmsRefused),
    ("version", GmsRefused),
]


@pytest.mark.parametrize(
    ("kind", "code", "error"),
    [(gms.Acquire, *refusal) for refusal in REFUSALS] + [(kind, "out_of_memory", OutOfMemory) for kind in STEPS[1:]],
)
def test_a_refusal_at_any_step_says_why_and_leaves_nothing(
    server: ScriptedServer, weights: Callable[..., Weights], kind: type, code: gms.ErrorCode, error: type[GmsRefused]
) -> None:
    server.script[kind] = instead((gms.GmsError(code, "because of that"), []))
    one = weights()
    with pytest.raises(error, match="because of that") as caught:
        one.open(specs, fill, timeout_s=DEADLINE_S)
    assert caught.value.code == code
    assert type(caught.value) is error
    assert maps() == []
    assert server.memfds_of_others() == 0
    one.open(specs, fill, timeout_s=DEADLINE_S)  # it can be tried again
    assert read(one) == TENSORS


def test_nobody_listens(tmp_path: Path, nothing_left: None) -> None:
    one = Weights(tmp_path / "none.sock", LAYOUT, owner="w", content="v1")
    with pytest.raises(ServerGone, match="no server of weight memory"):
        one.open(specs, fill, timeout_s=0.2)
    with pytest.raises(RuntimeError, match="not open"):
        one.remap(timeout_s=1)
    one.close()


def test_a_server_that_comes_late_is_waited_for(tmp_path: Path, nothing_left: None) -> None:
    one = Weights(tmp_path / "gms.sock", LAYOUT, owner="w", content="v1")
    opened: list[bool] = []
    thread = threading.Thread(target=lambda: opened.append(one.open(specs, fill, timeout_s=DEADLINE_S).wrote))
    thread.start()
    server = ScriptedServer(tmp_path / "gms.sock")
    thread.join(DEADLINE_S)
    assert opened == [True]
    one.close()
    server.close()


def test_closing_ends_the_wait_for_a_server(
    tmp_path: Path, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Weights(tmp_path / "none.sock", LAYOUT, owner="w", content="v1")
    caught: list[Exception] = []
    tried = threading.Event()

    def nobody(*_: object) -> GmsSession:
        tried.set()
        raise ServerGone("nobody listens")

    def wait() -> None:
        try:
            one.open(specs, fill, timeout_s=600)
        except ServerGone as error:
            caught.append(error)

    monkeypatch.setattr(GmsSession, "connect", nobody)
    thread = threading.Thread(target=wait)
    thread.start()
    assert tried.wait(DEADLINE_S)
    one.close()
    thread.join(DEADLINE_S)
    assert caught


def test_a_server_that_does_not_answer_is_given_up(
    server: ScriptedServer, weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_box.gms.client.session.ANSWER_TIMEOUT_S", 0.2)
    server.script[gms.Acquire] = instead(b"")
    one = weights()
    with pytest.raises(ServerGone, match="no answer"):
        one.open(specs, fill, timeout_s=0.0)


def test_a_server_that_only_ever_says_to_wait_is_given_up(
    server: ScriptedServer, weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_box.gms.client.session.ANSWER_TIMEOUT_S", 0.2)
    server.script[gms.Acquire] = instead(b"".join(encode_frame(gms.Queued(1, "worker 9")) for _ in range(3)))
    heard: list[gms.Queued] = []
    with pytest.raises(ServerGone):
        weights().open(specs, fill, timeout_s=0.0, waiting=heard.append)
    assert len(heard) == 3


def test_a_manifest_that_points_outside_is_not_believed(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    bad = gms.Entry("evil", 0, GRANULARITY * 100, "u8", (1,), (1,), 1)
    for entry in (bad, gms.Entry("evil", 0, -1, "u8", (1,), (1,), 1), gms.Entry("evil", 77, 0, "u8", (1,), (1,), 1)):
        weights("v1").open(specs, fill, timeout_s=DEADLINE_S)
        server.entries.append(entry)
        with pytest.raises(ServerGone, match="outside its allocation"):
            weights("v1").open(never, never, timeout_s=0.0)  # type: ignore[arg-type]
        server.entries.pop()
    assert server.memfds_of_others() == 0


def test_an_endless_manifest_is_given_up(server: ScriptedServer, weights: Callable[..., Weights]) -> None:
    weights().open(specs, fill, timeout_s=DEADLINE_S)
    server.script[gms.Describe] = instead((gms.Manifest((), (), True), []))
    with pytest.raises(ServerGone, match="without an end"):
        weights().open(never, never, timeout_s=0.0)  # type: ignore[arg-type]


def test_an_allocation_of_another_size_than_said_is_not_mapped(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    weights().open(specs, fill, timeout_s=DEADLINE_S)
    before = len(maps())
    manifest = gms.Manifest((gms.Allocation(0, 64 * GRANULARITY),), tuple(server.entries), False)
    server.script[gms.Describe] = instead((manifest, []))
    with pytest.raises(GmsRefused, match="mapped as a whole"):
        weights().open(never, never, timeout_s=DEADLINE_S)  # type: ignore[arg-type]
    assert len(maps()) == before
    assert server.memfds_of_others() == 0


# Waking


@pytest.mark.parametrize(("code", "error"), REFUSALS[:4])
@pytest.mark.parametrize("kind", [gms.Acquire, gms.Export])
def test_a_wake_that_is_refused_maps_nothing_and_the_next_one_works(
    server: ScriptedServer, weights: Callable[..., Weights], kind: type, code: gms.ErrorCode, error: type[GmsRefused]
) -> None:
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    tensors = one.tensors()
    one.unmap()
    server.script[kind] = instead((gms.GmsError(code, "not now"), []))
    with pytest.raises(error):
        one.remap(timeout_s=DEADLINE_S)
    assert maps() == []
    server.wait_readers(0)
    one.remap(timeout_s=DEADLINE_S)
    assert (one.tensors(), read(one)) == (tensors, TENSORS)


def test_a_layout_that_changed_while_asleep_is_stale(server: ScriptedServer, weights: Callable[..., Weights]) -> None:
    sleeper = weights("v1")
    sleeper.open(specs, fill, timeout_s=DEADLINE_S)
    sleeper.unmap()
    weights("v2").open(specs, fill, timeout_s=DEADLINE_S)
    with pytest.raises(StaleLayout):
        sleeper.remap(timeout_s=DEADLINE_S)
    server.wait_readers(1)


def test_the_same_layout_written_again_while_asleep_is_mapped_at_the_same_addresses(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    sleeper = weights()
    sleeper.open(specs, fill, timeout_s=DEADLINE_S)
    tensors = sleeper.tensors()
    sleeper.unmap()
    server.wait_readers(0)
    server.forget()
    weights().open(specs, fill, timeout_s=DEADLINE_S)
    sleeper.remap(timeout_s=DEADLINE_S)
    assert (sleeper.epoch, sleeper.tensors(), read(sleeper)) == (2, tensors, TENSORS)


def test_a_wake_that_fails_half_way_maps_nothing(
    server: ScriptedServer, weights: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_box.gms.client.weights.pack", functools.partial(pack, max_allocation=GRANULARITY))
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    assert len(server.memory) >= 2
    one.unmap()

    def script(message: gms.EngineMessage, answer: Answer) -> Answer:
        assert isinstance(answer, tuple)
        os.close(answer[1][-1])
        wrong = server.vmm.create(100 * GRANULARITY, "test-other")
        return answer[0], [*answer[1][:-1], wrong]

    server.script[gms.Export] = script
    with pytest.raises(GmsRefused):
        one.remap(timeout_s=DEADLINE_S)
    assert maps() == []
    one.remap(timeout_s=DEADLINE_S)
    assert read(one) == TENSORS


# The server dies


def test_mappings_outlive_the_server_and_its_successor_knows_its_readers(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    one, two = weights(), weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    two.open(never, never, timeout_s=DEADLINE_S)  # type: ignore[arg-type]
    for _ in range(3):
        server.kill()
        server.wait_readers(0)
        assert read(one) == read(two) == TENSORS
        server.heard.clear()
        server.start()
        server.wait_readers(2)
        again = [message for message in server.heard if isinstance(message, gms.Acquire)]
        assert {message.owner for message in again} == {"worker 0", "worker 1"}
        assert {(message.lock, message.expect_hash) for message in again} == {("ro", server.layout_hash)}
        assert read(one) == TENSORS
    one.unmap()
    server.wait_readers(1)
    one.remap(timeout_s=DEADLINE_S)
    server.wait_readers(2)


def test_sleeping_without_a_server_works_and_ends_the_attempts_to_reach_one(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    server.kill()
    server.wait_readers(0)
    assert one.unmap() == one.bytes
    assert not [thread for thread in threading.enumerate() if thread.name == "gms-watch"]
    with pytest.raises(ServerGone):
        one.remap(timeout_s=0.1)
    server.start()
    one.remap(timeout_s=DEADLINE_S)
    assert read(one) == TENSORS


def test_sleeping_while_the_successor_makes_it_wait_for_the_lock_takes_no_time(
    server: ScriptedServer, weights: Callable[..., Weights]
) -> None:
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    server.kill()
    asked = threading.Event()

    def silent(_: gms.EngineMessage, answer: Answer) -> Answer:
        asked.set()
        return b""

    server.script[gms.Acquire] = silent
    server.start()
    assert asked.wait(DEADLINE_S)
    start = time.monotonic()
    assert one.unmap() == one.bytes
    assert time.monotonic() - start < DEADLINE_S / 2
    server.wait_readers(0)


def test_a_successor_that_does_not_know_the_epoch_is_asked_again_and_again(
    server: ScriptedServer, weights: Callable[..., Weights], caplog: pytest.LogCaptureFixture
) -> None:
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    server.kill()
    server.asleep = True
    refused = threading.Semaphore(0)

    def counting(_: gms.EngineMessage, answer: Answer) -> Answer:
        server.script[gms.Acquire] = counting
        refused.release()
        return answer

    server.script[gms.Acquire] = counting
    with caplog.at_level(logging.WARNING):
        server.start()
        for _ in range(3):
            assert refused.acquire(timeout=DEADLINE_S)
        assert read(one) == TENSORS
        assert not one.attached
        server.asleep = False
        server.wait_readers(1)
    assert [record.message for record in caplog.records if "its bytes are elsewhere" in record.message][1:] == []


def test_calls_from_several_threads_take_turns(server: ScriptedServer, weights: Callable[..., Weights]) -> None:
    one = weights()
    one.open(specs, fill, timeout_s=DEADLINE_S)
    failures: list[Exception] = []

    def toggle() -> None:
        try:
            for _ in range(15):
                one.unmap()
                one.remap(timeout_s=DEADLINE_S)
        except Exception as error:  # noqa: BLE001  # the test is told
            failures.append(error)

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failures == []
    assert read(one) == TENSORS
    server.wait_readers(1)


# Call by call


def test_a_session_is_the_protocol_call_by_call(server: ScriptedServer) -> None:
    with GmsSession.connect(server.path, "someone") as session:
        granted = session.acquire(LAYOUT, "rw", timeout_s=1.0, content="c", make_room=True)
        assert (granted.lock, granted.epoch) == ("rw", 1)
        allocated = session.allocate([1] * (gms.MAX_DESCRIPTORS + 6))
        assert [one.id for one, _ in allocated] == list(range(gms.MAX_DESCRIPTORS + 6))
        for one, fd in allocated:
            assert os.fstat(fd).st_size == one.size == GRANULARITY
            os.close(fd)
        entries = [gms.Entry(f"t{n}", 0, 0, "u8", (1,), (1,), 1) for n in range(gms.MAX_ENTRIES_A_PAGE + 1)]
        session.put(entries)
        assert session.commit().lock == "ro"
        allocations, described = session.describe()
        assert described == entries
        fds = session.export([one.id for one in allocations])
        assert len(fds) == gms.MAX_DESCRIPTORS + 6
        for fd in fds:
            os.close(fd)
        session.release()
        server.wait_readers(0)
    assert server.heard[0] == gms.Acquire(PROTOCOL_VERSION, "someone", LAYOUT, "rw", "c", "", 1.0, True)
    assert [len(message.entries) for message in server.heard if isinstance(message, gms.Put)] == [4096, 1]
