"""The workers as the frontend sees them: one connection each, and the sequences that run over it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from pathlib import Path

from dynamo_box.discovery.instances import Instance
from dynamo_box.discovery.watch import watch_instances
from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import Channel, connect_channel
from dynamo_box.protocol.request import (
    Cancel,
    Delta,
    Generate,
    Hello,
    Refused,
    Step,
    WorkerMessage,
    worker_decoder,
)

FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5

log = get_logger()


class WorkerLost(Exception):
    """The worker went away with the sequence unfinished."""


class Mailbox:
    """What comes from the worker for one sequence; one reader. `interrupt` makes the reader raise."""

    __slots__ = ("_deltas", "_interruption", "_waiter", "last_progress")

    def __init__(self) -> None:
        self._deltas: deque[Delta] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._interruption: Exception | None = None
        self.last_progress = time.monotonic()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._wake()

    def interrupt(self, reason: Exception) -> None:
        """What came before is still read. The first reason counts, but the loss of a worker gives way to any other."""
        if self._interruption is None or isinstance(self._interruption, WorkerLost):
            self._interruption = reason
            self._wake()

    def retry(self) -> None:
        """Start over on another worker: forget the loss of the last one, but no other interruption."""
        self._deltas.clear()
        if isinstance(self._interruption, WorkerLost):
            self._interruption = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Delta:
        while not self._deltas:
            if self._interruption is not None:
                raise self._interruption
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self.last_progress = time.monotonic()
        return self._deltas.popleft()


class WorkerSequence:
    """A sequence on a worker, fed into `mailbox`. `close` cancels it there unless it has finished."""

    def __init__(self, connection: WorkerConnection, number: int, mailbox: Mailbox) -> None:
        self._connection = connection
        self._number = number
        self.mailbox = mailbox

    def close(self) -> None:
        self._connection.close_sequence(self._number)


class WorkerConnection:
    """The connection to one instance; made when its file appears, ended when either is gone."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.open = False
        self._channel: Channel[WorkerMessage] | None = None
        self._numbers = itertools.count(1)
        self._sequences: dict[int, Mailbox] = {}

    async def run(self, on_change: asyncio.Event) -> None:
        """Connect, and connect again; ends when cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                channel = await connect_channel(
                    Path(self.instance.socket), lambda: Channel(worker_decoder, self._on_message)
                )
            except OSError:
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, LONGEST_RETRY_S)
                continue
            retry_s = FIRST_RETRY_S
            channel.send(Hello("frontend", PROTOCOL_VERSION))
            self._channel, self.open = channel, True
            on_change.set()
            try:
                await asyncio.wait({channel.closed})
            finally:
                self._channel, self.open = None, False
                self._lose_sequences()
                channel.close()
                on_change.set()

    def start(self, mailbox: Mailbox, generate: Generate) -> WorkerSequence:
        """Send a sequence (its id is set here).

        Raises:
            WorkerLost: there is no connection now.
        """
        if self._channel is None:
            raise WorkerLost("no connection")
        number = generate.id
        self._sequences[number] = mailbox
        self._channel.send(generate)
        return WorkerSequence(self, number, mailbox)

    def next_number(self) -> int:
        return next(self._numbers)

    def close_sequence(self, number: int) -> None:
        if self._sequences.pop(number, None) is not None and self._channel is not None:
            self._channel.send(Cancel(number))

    @property
    def sequences(self) -> int:
        return len(self._sequences)

    def _on_message(self, channel: Channel[WorkerMessage], message: WorkerMessage) -> None:
        if isinstance(message, Step):
            for delta in message.deltas:
                mailbox = self._sequences.get(delta.id)
                if mailbox is not None:
                    mailbox.put(delta)
                    if delta.finish is not None:
                        del self._sequences[delta.id]
        elif isinstance(message, Refused):
            log.error("a worker refused this frontend", worker=self.instance.name, reason=message.reason)

    def _lose_sequences(self) -> None:
        lost, self._sequences = self._sequences, {}
        for mailbox in lost.values():
            mailbox.interrupt(WorkerLost("its connection closed"))


class Workers:
    """Every instance in the run dir, connected."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._connections: dict[str, WorkerConnection] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the directory; ends when cancelled, and closes all connections."""
        try:
            async for instances in watch_instances(self._directory):
                self._follow(instances)
        finally:
            tasks = list(self._tasks.values())
            for name in list(self._tasks):
                self._drop(name)
            await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, instances: dict[str, Instance]) -> None:
        for name, connection in list(self._connections.items()):
            if instances.get(name) != connection.instance:
                self._retire(name, name in instances)
        for name, instance in instances.items():
            if name not in self._connections:
                connection = WorkerConnection(instance)
                self._connections[name] = connection
                self._tasks[name] = asyncio.create_task(connection.run(self._changed))
                log.info("worker found", worker=name, model=instance.model)
        self._changed.set()

    def _retire(self, name: str, replaced: bool) -> None:
        """A worker that drains withdraws its file but finishes what runs: its connection ends by itself then."""
        connection = self._connections.pop(name)
        task = self._tasks.pop(name)
        log.info("worker gone", worker=name, replaced=replaced, sequences=connection.sequences)
        if replaced or not connection.sequences:
            task.cancel()
            return
        lingering = asyncio.create_task(self._linger(connection, task))
        self._tasks[f"{name}#{id(connection)}"] = lingering
        lingering.add_done_callback(lambda _: self._tasks.pop(f"{name}#{id(connection)}", None))

    async def _linger(self, connection: WorkerConnection, task: asyncio.Task[None]) -> None:
        try:
            while connection.open and connection.sequences:
                await asyncio.sleep(LONGEST_RETRY_S)
        finally:
            task.cancel()

    def _drop(self, name: str) -> None:
        self._connections.pop(name, None)
        self._tasks.pop(name).cancel()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when something changed, or after `timeout_s`."""
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return

    def connection(self, name: str) -> WorkerConnection | None:
        found = self._connections.get(name)
        return found if found is not None and found.open else None

    def instance_of(self, model: str) -> Instance | None:
        """Any connected instance of a model: what they share is what the block hash is taken over."""
        return next(
            (each.instance for each in self._connections.values() if each.open and each.instance.model == model),
            None,
        )

    @property
    def served_models(self) -> set[str]:
        return {each.instance.model for each in self._connections.values() if each.open}
