"""A real worker process, driven as supervisor, frontend and router would drive it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamo_box.discovery.instances import Instance, read_instances
from dynamo_box.kv.hashing import isolation_key
from dynamo_box.paths import RunDir
from dynamo_box.protocol import PROTOCOL_VERSION, status
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, BlockingChannel, connect_unix, encode_frame
from dynamo_box.protocol.request import (
    Delta,
    Generate,
    Hello,
    KvCleared,
    KvDump,
    KvRemoved,
    KvStored,
    Load,
    PeerMessage,
    Sampling,
    Step,
    WorkerMessage,
    pack_tokens,
    worker_decoder,
)
from dynamo_box.protocol.spec import ModelSpec, WorkerSpec

DEADLINE_S = 90.0
BLOCK_SIZE = 16
ISOLATION = isolation_key("abc", block_size=BLOCK_SIZE, kv_dtype="float16")
PATIENT = """
import functools, runpy, sys
from dynamo_box.kv.client import tiers
tiers.Limits = functools.partial(tiers.Limits, attach_s=90.0, seek_s=90.0, store_s=90.0, load_s=90.0, fetch_s=90.0)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""A worker to which a store on a machine that is busy with other tests is slow, not gone."""


def asks(
    stream: int,
    tokens: Sequence[int] | bytes,
    *,
    max_tokens: int = 8,
    request_id: str = "",
    isolation: bytes = ISOLATION,
    annotations: tuple[str, ...] = (),
    **sampling: Any,
) -> Generate:
    """A whole request."""
    packed = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
    knobs = Sampling(max_tokens, temperature=sampling.pop("temperature", 0.0), **sampling)
    return Generate(stream, request_id or f"r{stream}", packed, knobs, isolation, annotations=annotations)


def worker_spec(run_dir: Path, name: str = "m.aggregated.0", **changes: Any) -> WorkerSpec:
    """A mock worker that takes no time, unless `changes` say otherwise (`options` are added to)."""
    model = ModelSpec("m", str(run_dir / "no-model"), "abc", context_length=8192, block_size=BLOCK_SIZE)
    options = {"speedup": "infinite", "kv_blocks": 1000, **changes.pop("options", {})}
    defaults = {
        "model": model,
        "engine": "mock",
        "role": "aggregated",
        "threads": 1,
        "device": "cpu",
        "kv_bytes": 0,
        "max_batch": 64,
    }
    return WorkerSpec(name=name, run_dir=str(run_dir), options=options, **{**defaults, **changes})


class Peer:
    """A frontend's or router's connection to a worker."""

    def __init__(self, path: str | Path, peer: str = "frontend", version: int = PROTOCOL_VERSION) -> None:
        self.socket = connect_unix(Path(path))
        self.channel: BlockingChannel[WorkerMessage] = BlockingChannel(self.socket, worker_decoder)
        self.send(Hello(peer, version))

    def send(self, message: PeerMessage) -> None:
        self.channel.send(message)

    def send_together(self, messages: Iterable[PeerMessage]) -> None:
        """In one piece: the worker does nothing between them."""
        self.socket.sendall(b"".join(encode_frame(message) for message in messages))

    def generate(self, stream: int, tokens: Sequence[int] | bytes, **request: Any) -> None:
        self.send(asks(stream, tokens, **request))

    def receive(self, timeout_s: float = DEADLINE_S) -> WorkerMessage | None:
        """The next message; None at the end of the stream, however it came."""
        try:
            return self.channel.receive(timeout_s)
        except ConnectionError:
            return None

    def deltas(self) -> Iterator[Delta]:
        """Deltas as they come, until the connection ends."""
        while (message := self.receive()) is not None:
            if isinstance(message, Step):
                yield from message.deltas

    def finish(self, *streams: int) -> dict[int, tuple[list[int], Delta]]:
        """Tokens and last delta of each stream, once all of them have ended."""
        tokens: dict[int, list[int]] = {stream: [] for stream in streams}
        ended: dict[int, tuple[list[int], Delta]] = {}
        for delta in self.deltas():
            tokens[delta.id].extend(delta.tokens)
            if delta.finish is not None:
                ended[delta.id] = (tokens[delta.id], delta)
            if len(ended) == len(streams):
                return ended
        raise AssertionError(f"the connection ended with {sorted(set(streams) - set(ended))} unfinished")

    def run(self, tokens: Sequence[int], stream: int = 1, **request: Any) -> tuple[list[int], Delta]:
        self.generate(stream, tokens, **request)
        return self.finish(stream)[stream]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerProcess:
    """A child with a status socket. `spec` is sent at once unless it is None."""

    def __init__(self, run_dir: Path, spec: WorkerSpec | None, module: str = "engines.mock") -> None:
        self.run_dir = RunDir(run_dir)
        self.run_dir.create()
        self.name = spec.name if spec is not None else ""
        ours, theirs = socket.socketpair()
        environment = {**os.environ, STATUS_FD_VARIABLE: str(theirs.fileno()), "DYNBOX_PROCESS": self.name}
        self.log_path = run_dir / "worker.log"
        with theirs, self.log_path.open("ab") as log:
            program = ["-c", PATIENT, module] if spec is not None and spec.kvstore else ["-m", module]
            self.process = subprocess.Popen(
                [sys.executable, *program], env=environment, stderr=log, pass_fds=[theirs.fileno()]
            )
        self.status: BlockingChannel[status.ChildMessage] = BlockingChannel(ours, status.child_decoder)
        self.seen: list[status.ChildMessage] = []
        if spec is not None:
            self.status.send(status.Start(spec))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def socket_path(self) -> Path:
        return self.run_dir.worker_socket(self.name)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def instance(self) -> Instance | None:
        return read_instances(self.run_dir.instances).get(self.name)

    def await_status(self, *kinds: type, where: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message of these kinds for which `where` holds; those before it are in `seen`."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            message = self.status.receive(max(0.01, deadline - time.monotonic()))
            assert message is not None, f"the status socket ended; saw {self.seen}\n{self.log}"
            self.seen.append(message)
            if isinstance(message, kinds) and where(message):
                return message

    def ready(self) -> WorkerProcess:
        self.await_status(status.Ready)
        return self

    def ask(self, command: status.ParentMessage) -> status.Answer:
        self.status.send(command)
        answer: status.Answer = self.await_status(status.Answer)
        return answer

    def figures(self, where: Callable[[Any], bool]) -> Any:
        """The first figures from now on that are as wanted."""
        return self.await_status(status.Report, where=lambda report: where(report.figures)).figures

    def await_frozen(self, times: int = 1) -> None:
        """Until it has stopped itself, as its faults say, so many times."""

        def frozen() -> bool:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return self.log.count("freezing, as told") == times and stat.rpartition(")")[2].split()[0] == "T"

        wait_until(frozen, "the worker is stopped")

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)

    def peer(self, peer: str = "frontend") -> Peer:
        return Peer(self.socket_path, peer)

    def end(self) -> None:
        self.status.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)


@contextmanager
def worker(run_dir: Path, module: str = "engines.mock", **changes: Any) -> Iterator[WorkerProcess]:
    """A worker that is ready."""
    process = WorkerProcess(run_dir, worker_spec(run_dir, **changes), module)
    try:
        yield process.ready()
    finally:
        process.end()


class Index:
    """What a router that believes everything would know of one worker; it insists on numbers without gaps."""

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.next_event_id: int | None = None
        self.dumping = False
        self.events = 0
        self.loads: list[Load] = []

    def feed(self, message: WorkerMessage) -> None:
        if isinstance(message, KvDump):
            if message.first:
                self.blocks.clear()
            else:
                assert self.dumping, "a further page without a first one"
                assert message.next_event_id == self.next_event_id
            self.blocks.update(message.hashes)
            self.next_event_id, self.dumping = message.next_event_id, message.more
        elif isinstance(message, KvStored | KvRemoved | KvCleared):
            assert not self.dumping, "an event in the middle of a dump"
            assert message.event_id == self.next_event_id, (message.event_id, self.next_event_id)
            self.next_event_id += 1
            self.events += 1
            self._apply(message)
        elif isinstance(message, Load):
            self.loads.append(message)

    def _apply(self, event: KvStored | KvRemoved | KvCleared) -> None:
        if isinstance(event, KvStored):
            assert event.parent is None or event.parent in self.blocks, "a block without its parent"
            assert self.blocks.isdisjoint(event.hashes), "stored twice"
            self.blocks.update(event.hashes)
        elif isinstance(event, KvRemoved):
            assert self.blocks.issuperset(event.hashes), "removed what was not there"
            self.blocks.difference_update(event.hashes)
        else:
            self.blocks.clear()


def readable(sockets: Iterable[socket.socket | BlockingChannel[Any]], timeout_s: float) -> bool:
    """Whether one of them gets something to read in time."""
    return bool(select.select(list(sockets), [], [], timeout_s)[0])


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll for something outside that nobody announces (a file, a process)."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        select.select([], [], [], 0.01)
