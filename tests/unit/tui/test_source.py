"""The live source against a supervisor that does what real ones mustn't: cut a frame, speak nonsense, fall silent."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.paths import RunDir
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import encode_frame, listen_unix
from dynamo_box.snapshot import BoxSnapshot
from dynamo_box.tui.source import Connected, LiveSource, Lost, NewSnapshot, SourceEvent, Why

DEADLINE_S = 60.0

Script = Callable[[socket.socket], None]


def frame_of(snapshot: object) -> bytes:
    return encode_frame(control.SnapshotReply(1, msgspec.Raw(msgspec.msgpack.encode(snapshot))))


def in_state(state: str) -> BoxSnapshot:
    whole = snapshots.tiny()
    return replace(whole, box=replace(whole.box, state=state))


class Supervisor:
    """Answers each connection by the next of its scripts, and hangs up after it."""

    def __init__(self, run_dir: RunDir) -> None:
        self.scripts: queue.SimpleQueue[Script | None] = queue.SimpleQueue()
        self._listening = listen_unix(run_dir.control_socket)
        self._listening.setblocking(True)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while (script := self.scripts.get()) is not None:
            connection, _ = self._listening.accept()
            with connection:
                assert connection.recv(65536)
                script(connection)

    def close(self) -> None:
        self.scripts.put(None)
        self._thread.join(DEADLINE_S)
        self._listening.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


@pytest.fixture
def supervisor(run_dir: RunDir) -> Iterator[Supervisor]:
    made = Supervisor(run_dir)
    yield made
    made.close()


@pytest.fixture
def events(run_dir: RunDir) -> Iterator[Callable[[], SourceEvent]]:
    """The next event of a started source."""
    arrived: queue.Queue[SourceEvent] = queue.Queue()
    source = LiveSource(run_dir)
    source.start(arrived.put)
    yield lambda: arrived.get(timeout=DEADLINE_S)
    source.close()


def lost(event: SourceEvent) -> Lost:
    assert isinstance(event, Lost), event
    return event


def test_without_a_box_it_says_so_once_and_goes_on_looking(run_dir: RunDir, events: Callable[[], SourceEvent]) -> None:
    absent = lost(events())
    assert absent.why is Why.ABSENT
    assert "dynbox up" in absent.remedy
    supervisor = Supervisor(run_dir)
    try:
        supervisor.scripts.put(lambda peer: peer.sendall(frame_of(in_state("ready"))))
        assert isinstance(events(), NewSnapshot)
    finally:
        supervisor.close()


def test_a_frame_that_breaks_off_is_a_loss_and_the_next_connection_goes_on(
    supervisor: Supervisor, events: Callable[[], SourceEvent]
) -> None:
    whole = frame_of(in_state("ready"))
    supervisor.scripts.put(lambda peer: peer.sendall(whole + whole[: len(whole) // 2]))
    assert isinstance(events(), Connected)
    assert isinstance(events(), NewSnapshot)
    assert lost(events()).why is Why.BROKEN
    supervisor.scripts.put(lambda peer: peer.sendall(whole))
    assert isinstance(events(), NewSnapshot)


def test_a_box_that_was_stopping_has_stopped(supervisor: Supervisor, events: Callable[[], SourceEvent]) -> None:
    supervisor.scripts.put(lambda peer: peer.sendall(frame_of(in_state("stopping"))))
    assert isinstance(events(), Connected)
    assert isinstance(events(), NewSnapshot)
    assert lost(events()).why is Why.STOPPED


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (frame_of({"box": {"state": "ready"}}), "another version"),
        (frame_of([1, 2]), "another version"),
        (b"\xff\xff\xff\xff and more", "no answer"),
        (encode_frame({"type": "unheard-of"}), "no answer"),
        (encode_frame(control.Error(1, 1, "watching is not for you", "ask somebody")), "watching is not for you"),
        (b"", "went away"),
    ],
    ids=["missing-fields", "no-snapshot", "too-long", "unknown-message", "refusal", "nothing"],
)
def test_what_cannot_be_understood_is_said_in_words(
    supervisor: Supervisor, events: Callable[[], SourceEvent], sent: bytes, said: str
) -> None:
    supervisor.scripts.put(lambda peer: peer.sendall(sent))
    assert isinstance(events(), Connected)
    broken = lost(events())
    assert broken.why is Why.BROKEN
    assert said in broken.reason


def test_it_can_be_closed_while_the_supervisor_is_silent(run_dir: RunDir, supervisor: Supervisor) -> None:
    arrived: queue.Queue[SourceEvent] = queue.Queue()
    watching, hung_up = threading.Event(), threading.Event()

    def half_a_frame_and_silence(peer: socket.socket) -> None:
        peer.sendall(frame_of(in_state("ready"))[:50])
        watching.set()
        peer.settimeout(DEADLINE_S)
        assert peer.recv(1) == b""
        hung_up.set()

    supervisor.scripts.put(half_a_frame_and_silence)
    source = LiveSource(run_dir)
    source.start(arrived.put)
    assert isinstance(arrived.get(timeout=DEADLINE_S), Connected)
    assert watching.wait(DEADLINE_S)
    source.close()
    assert hung_up.wait(DEADLINE_S)
    assert arrived.empty()
