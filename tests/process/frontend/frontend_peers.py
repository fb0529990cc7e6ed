"""A real frontend process, and around it a supervisor's end, a router and workers that a test plays itself.

async with FrontendUnderTest(tmp_path, tiny_model) as box:
    worker = await box.add_worker("w0")
    await box.ready()
    answer = box.post({...})            # a task
    generate = await worker.generated()
    worker.emit(generate, "hello", finish="length")
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import tokenizers

from dynamo_box.discovery.instances import Instance, announce, process_start_time, withdraw
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.framing import STATUS_FD_VARIABLE, Channel, ChannelServer, listen_unix, serve_channels
from dynamo_box.protocol.request import (
    Cancel,
    Delta,
    FinishReason,
    Generate,
    GiveUp,
    Hello,
    PeerMessage,
    Step,
    peer_decoder,
    unpack_tokens,
)
from dynamo_box.protocol.residency import ModelState, Residency
from dynamo_box.protocol.route import (
    Adopt,
    Place,
    Placed,
    Policy,
    PrefillDone,
    PrefillLeg,
    Release,
    RouteRequest,
    Unplaced,
    request_decoder,
)
from dynamo_box.protocol.spec import ChildSpec, FrontendSpec, ModelSpec

DEADLINE_S = 120.0
MODEL = "tiny"
BLOCK = 16

T = TypeVar("T")


def scenario(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine under a deadline."""

    async def bounded() -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await work()

    asyncio.run(bounded())


async def eventually(check: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not check():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(what) from None


class FakeRouter:
    """Places on the first of `workers` that isn't excluded, and keeps count of leases. Under a `policy` it names one of
    the `prefill` workers too, and in one leg it places on whoever is left.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._server: ChannelServer | None = None
        self._channels: list[Channel[RouteRequest]] = []
        self.workers: list[str] = []
        self.prefill: list[str] = []
        self.policy = ""
        self.silent = False
        self.places: list[Place] = []
        self.adopted: list[Adopt] = []
        self.prefilled: list[int] = []
        self.leases: dict[int, str] = {}

    async def listen(self) -> None:
        sock = listen_unix(self._run_dir.router_socket)
        self._server = await serve_channels(
            sock, lambda: Channel(request_decoder, self._on_message, on_open=self._on_open)
        )

    def set_policy(self, name: str) -> None:
        """A person has set it."""
        self.policy = name
        for channel in self._channels:
            channel.send(Policy(name))

    def _on_open(self, channel: Channel[RouteRequest]) -> None:
        self._channels.append(channel)
        if self.policy:
            channel.send(Policy(self.policy))

    def close(self) -> None:
        """As a killed process goes: listening socket and connections gone, leases forgotten."""
        if self._server is not None:
            self._server.close()
        for channel in self._channels:
            channel.abort(ConnectionResetError("router dies"))
        self._channels.clear()
        self.leases.clear()

    def _on_message(self, channel: Channel[RouteRequest], message: RouteRequest) -> None:
        match message:
            case Place():
                self.places.append(message)
                if not self.silent:
                    channel.send(self._place(message))
            case PrefillDone(id=number):
                self.prefilled.append(number)
            case Release(id=number):
                self.leases.pop(number, None)
            case Adopt(id=number, worker=worker):
                self.adopted.append(message)
                self.leases[number] = worker

    def answer_late(self) -> None:
        """Place what was asked for last, though it was passed over in silence."""
        self._channels[-1].send(self._place(self.places[-1]))

    def _place(self, place: Place) -> Placed | Unplaced:
        two_legs = bool(self.policy and self.prefill) and not place.one_leg
        wanted = [place.pin] if place.pin else self.workers if two_legs else self.workers + self.prefill
        choice = next((name for name in wanted if name not in place.exclude), None)
        first = next((name for name in self.prefill if name not in place.exclude), None) if two_legs else None
        if choice is None or (first is None and two_legs and self.policy == "strict"):
            return Unplaced(place.id, "no_workers", "none is left")
        self.leases[place.id] = choice
        prefill = PrefillLeg(first, 0, "the test says so") if first is not None else None
        return Placed(
            place.id, choice, 0, "the test says so", took_us=20.0, match_us=5.0, prefill=prefill, policy=self.policy
        )


class FakeWorker:
    """A worker that says what the test tells it to."""

    def __init__(
        self,
        run_dir: RunDir,
        name: str,
        tokenizer: tokenizers.Tokenizer,
        *,
        context_length: int,
        role: str = "aggregated",
    ) -> None:
        self.name = name
        self.role = role
        self._run_dir = run_dir
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._server: ChannelServer | None = None
        self._channels: list[Channel[PeerMessage]] = []
        self._channel: Channel[PeerMessage] | None = None
        self._arrivals: asyncio.Queue[Generate] = asyncio.Queue()
        self.hello: Hello | None = None
        self.cancelled: list[int] = []
        self.given_up: list[bytes] = []
        self.cancels = asyncio.Event()

    async def appear(self) -> None:
        path = self._run_dir.worker_socket(self.name)
        self._server = await serve_channels(
            listen_unix(path), lambda: Channel(peer_decoder, self._on_message, on_open=self._channels.append)
        )
        self.announce()

    def announce(self, kv_blocks_total: int = 64) -> None:
        """With another size it counts as another process of this name."""
        path = self._run_dir.worker_socket(self.name)
        start_time = process_start_time(os.getpid())
        assert start_time is not None
        announce(
            self._run_dir.instances,
            Instance(
                name=self.name,
                model=MODEL,
                role=self.role,
                engine="fake",
                socket=str(path),
                pid=os.getpid(),
                start_time=start_time,
                fingerprint="f00",
                block_size=BLOCK,
                kv_blocks_total=kv_blocks_total,
                kv_dtype="float64",
                context_length=self._context_length,
            ),
        )

    def withdraw(self) -> None:
        """As at the begin of a drain: the file goes, the connection stays."""
        withdraw(self._run_dir.instances, self.name)

    def close(self) -> None:
        """As a killed process goes."""
        self.withdraw()
        self.die()

    def die(self) -> None:
        """The same, before anybody has taken its file away."""
        if self._server is not None:
            self._server.close()
        self.drop()

    def drop(self) -> None:
        """Only the connection breaks."""
        for channel in self._channels:
            channel.abort(ConnectionResetError("worker dies"))
        self._channels.clear()

    def _on_message(self, channel: Channel[PeerMessage], message: PeerMessage) -> None:
        self._channel = channel
        match message:
            case Hello():
                self.hello = message
            case Generate():
                self._arrivals.put_nowait(message)
            case Cancel(id=number):
                self.cancelled.append(number)
                self.cancels.set()
            case GiveUp(key=key):
                self.given_up.append(key)

    async def generated(self) -> Generate:
        """The next sequence that is asked for."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._arrivals.get()

    def prompt_of(self, generate: Generate) -> str:
        return self._tokenizer.decode(unpack_tokens(generate.tokens), skip_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def send(self, *deltas: Delta) -> None:
        assert self._channel is not None
        self._channel.send(Step(list(deltas)))

    def emit(
        self, generate: Generate, text: str, *, finish: FinishReason | None = None, cached_tokens: int = 0
    ) -> list[int]:
        """One step for each token of `text`; the tokens."""
        tokens = self.ids(text)
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            self.send(Delta(generate.id, (token,), finish if last else None, cached_tokens if place == 0 else 0))
        return tokens


@dataclass
class Answer:
    """`events` are the payloads of a stream's `data:` lines, as text."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[str] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json()["error"]
        return found

    def chunks(self) -> list[Any]:
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    def text(self) -> str:
        """The text of a streamed answer of either kind."""
        choices = [choice for chunk in self.chunks() for choice in chunk.get("choices", ())]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


class Connection:
    """One HTTP/1.1 connection, low enough to misbehave on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    @classmethod
    async def open_narrow(cls, port: int) -> Connection:
        """One that holds next to nothing of what nobody reads."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=1024))

    def send(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        lines = {"host": "127.0.0.1", "content-length": str(len(body)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    def send_raw(self, data: bytes) -> None:
        self._writer.write(data)

    async def head(self) -> Answer:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return Answer(int(lines[0].split()[1]), headers)

    async def chunk(self) -> bytes:
        """The next piece of a chunked body, as it was sent; b"" at the end."""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        data = await self._reader.readexactly(size + 2)
        return data[:-2]

    async def answer(self) -> Answer:
        answer = await self.head()
        if "content-length" in answer.headers:
            answer.body = await self._reader.readexactly(int(answer.headers["content-length"]))
            return answer
        return await self.rest(answer)

    async def rest(self, answer: Answer) -> Answer:
        """The rest of a stream of which `answer` has the head and perhaps some chunks."""
        while piece := await self.chunk():
            answer.body += piece
        answer.events = [
            line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line.startswith("data: ")
        ]
        return answer

    async def at_end(self) -> bool:
        return await self._reader.read(1) == b""

    def close(self) -> None:
        self._writer.close()


class Child:
    """A process as its supervisor sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.messages: asyncio.Queue[status.ChildMessage] = asyncio.Queue()
        self.heard: list[status.ChildMessage] = []
        """Everything it has said, reports left out."""
        self.channel: Channel[status.ChildMessage]

    @classmethod
    async def start(cls, module: str, spec: ChildSpec, log: Path, listening: socket.socket | None = None) -> Child:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, STATUS_FD_VARIABLE: str(theirs.fileno()), "DYNBOX_PROCESS": spec.name}
        inherited = [theirs.fileno()]
        if listening is not None:
            environment["DYNBOX_LISTEN_FD"] = str(listening.fileno())
            inherited.append(listening.fileno())
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module],
                env=environment,
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        theirs.close()
        ours.setblocking(False)
        child = cls(process)
        _, child.channel = await asyncio.get_running_loop().create_unix_connection(
            lambda: Channel(status.child_decoder, lambda _channel, message: child._hear(message)),
            sock=ours,
        )
        child.channel.send(status.Start(spec))
        return child

    def _hear(self, message: status.ChildMessage) -> None:
        self.messages.put_nowait(message)
        if not isinstance(message, status.Report):
            self.heard.append(message)

    async def expect(self, kind: type[T], fits: Callable[[T], bool] = lambda _message: True) -> T:
        """The next message of this kind that fits; others are passed over."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                message = await self.messages.get()
                if isinstance(message, kind) and fits(message):
                    return message

    def forget_reports(self) -> None:
        """Expect none of those that have come, nor what else was passed over."""
        while not self.messages.empty():
            self.messages.get_nowait()

    async def exit_status(self) -> int:
        return await asyncio.to_thread(self.process.wait, DEADLINE_S)

    async def close(self) -> None:
        self.channel.close()
        try:
            await self.exit_status()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class FrontendUnderTest:
    """The process, its supervisor's end, and its peers."""

    def __init__(self, root: Path, model: Path, *, context_length: int = 2048, **spec: Any) -> None:
        self.run_dir = RunDir(root / "run")
        self.run_dir.create()
        self.log = root / "frontend.log"
        self._model = model
        self._context_length = context_length
        self._spec = spec
        self._listening: socket.socket | None = None
        self.child: Child
        self.router = FakeRouter(self.run_dir)
        self.workers: dict[str, FakeWorker] = {}
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))

    async def __aenter__(self) -> FrontendUnderTest:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.router.close()
        for worker in self.workers.values():
            worker.close()
        await self.child.close()
        assert self._listening is not None
        self._listening.close()
        if error is not None:
            print(self.log.read_text())
            return
        for line in self.log.read_text().splitlines():
            json.loads(line)  # whatever happened, the log is JSON lines

    async def start(self, spec: Any = None) -> None:
        """Start the process and hand it its spec."""
        self.child = await Child.start("dynamo_box.frontend", spec or self.spec(), self.log, self._listening)

    @property
    def supervisor(self) -> Channel[status.ChildMessage]:
        return self.child.channel

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.child.process

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(MODEL, str(self._model), "f00", self._context_length, BLOCK)

    def spec(self) -> FrontendSpec:
        defaults: dict[str, Any] = {"discovery_timeout_s": DEADLINE_S}
        return FrontendSpec(
            name="frontend",
            run_dir=str(self.run_dir.root),
            models=(self.model,),
            host="127.0.0.1",
            port=self.port,
            **(defaults | self._spec),
        )

    def says(self, state: ModelState, **more: Any) -> Residency:
        """The supervisor says where the model is."""
        residency = Residency(MODEL, state, **more)
        self.supervisor.send(status.Residencies((residency,)))
        return residency

    async def asleep(self, **more: Any) -> None:
        """The supervisor says that the model is asleep, and the frontend has heard it."""
        self.says("asleep", **more)
        await self.until_state_is("asleep")

    async def until_state_is(self, state: ModelState) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (await self.get(f"/v1/models/{MODEL}")).json().get("state") != state:
                await asyncio.sleep(0.01)

    def heard(self, kind: type[T]) -> list[T]:
        """All such messages since the process started, whether expected or not."""
        return [message for message in self.child.heard if isinstance(message, kind)]

    async def asked(self) -> status.Asked:
        """What the frontend asks its supervisor next."""
        return await self.expect(status.Asked)

    async def until_said(self, generate: Generate, count: int) -> None:
        """Return when this request has got so many tokens."""
        wanted = (generate.request_id, count)

        def has_them(report: status.Report) -> bool:
            assert isinstance(report.figures, FrontendFigures)
            return wanted in [(live.request_id, live.output_tokens) for live in report.figures.live]

        await self.expect(status.Report, has_them)

    async def waiting(self, count: int) -> None:
        """Return when so many requests wait for the model to wake."""
        await self.expect(
            status.Report,
            lambda report: isinstance(report.figures, FrontendFigures) and report.figures.waking.get(MODEL, 0) == count,
        )

    async def expect(self, kind: type[T], fits: Callable[[T], bool] = lambda _message: True) -> T:
        return await self.child.expect(kind, fits)

    async def exit_status(self) -> int:
        return await self.child.exit_status()

    async def add_worker(self, name: str, role: str = "aggregated") -> FakeWorker:
        worker = FakeWorker(self.run_dir, name, self.tokenizer, context_length=self._context_length, role=role)
        await worker.appear()
        self.workers[name] = worker
        (self.router.prefill if role == "prefill" else self.router.workers).append(name)
        return worker

    async def ready(self, *workers: str) -> list[FakeWorker]:
        """A router and these workers, found by the frontend."""
        await self.expect(status.Ready)
        return await self.ready_again(*workers)

    async def ready_again(self, *workers: str) -> list[FakeWorker]:
        """The same for a frontend that has said Ready before."""
        return await self.ready_with(dict.fromkeys(workers or ("w0",), "aggregated"))

    async def ready_with(self, roles: dict[str, str]) -> list[FakeWorker]:
        """A router and workers of these roles, found by the frontend."""
        await self.router.listen()
        made = [await self.add_worker(name, role) for name, role in roles.items()]
        await self.until_healthy()
        return made

    async def until_healthy(self) -> None:
        await self.until_health_is(200)

    async def until_health_is(self, wanted: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while (await self.get("/health")).status != wanted:
                await asyncio.sleep(0.01)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        connection = await Connection.open(self.port)
        try:
            connection.send("GET", path, headers=headers)
            return await connection.answer()
        finally:
            connection.close()

    async def request(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Connection:
        """Send a request and leave the answer to be read; a dict gets a model and a message unless it has them."""
        connection = await Connection.open(self.port)
        if isinstance(body, dict):
            body = {"model": MODEL, **body}
            if "prompt" not in body and path == "/v1/chat/completions":
                body.setdefault("messages", [{"role": "user", "content": "hi"}])
            body = json.dumps(body).encode()
        connection.send("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> asyncio.Task[Answer]:
        """The whole answer, as a task, since a test plays the worker meanwhile."""

        async def exchange() -> Answer:
            connection = await self.request(body, path, **headers)
            try:
                return await connection.answer()
            finally:
                connection.close()

        return asyncio.create_task(exchange())

    async def nothing_left(self) -> None:
        """Every lease is back and no request is live: true after each ending."""
        await eventually(lambda: not self.router.leases, f"leases are left: {self.router.leases}")
        nobody = f'dynamo_frontend_active_requests{{model="{MODEL}"}} 0.0'
        async with asyncio.timeout(DEADLINE_S):
            while nobody not in (await self.get("/metrics")).body.decode():
                await asyncio.sleep(0.01)
