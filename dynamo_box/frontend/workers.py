"""The workers as the frontend sees them: one connection each, and the sequences that run over it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from pathlib import Path

import msgspec

from dynamo_box.discovery.instances import Instance, read_instances
from dynamo_box.discovery.watch import watch_instances
from dynamo_box.frontend.reconnect import keep_connected
from dynamo_box.log import get_logger
from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.framing import Channel
from dynamo_box.protocol.request import (
    Cancel,
    Delta,
    Generate,
    GiveUp,
    Hello,
    Refused,
    Step,
    Transfer,
    WorkerMessage,
    worker_decoder,
)

SETTLE_S = 3.0
"""How long a worker that has just been announced may take to be connected, for whoever asks who is there."""

WorkerChannel = Channel[WorkerMessage]

log = get_logger()


class WorkerLost(Exception):
    """The worker went away with the sequence unfinished."""


class WorkerSequence:
    """A sequence on a worker, with one reader. Close it in every ending."""

    __slots__ = ("_connection", "_deltas", "_lost", "_number", "_waiter")

    def __init__(self, connection: WorkerConnection, number: int) -> None:
        self._connection = connection
        self._number = number
        self._deltas: deque[Delta] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._lost: WorkerLost | None = None

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._wake()

    def lose(self, reason: WorkerLost) -> None:
        """What came before is still read."""
        self._lost = reason
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Delta:
        """
        Raises:
            WorkerLost: there will be no more.
        """
        while not self._deltas:
            if self._lost is not None:
                raise self._lost
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._deltas.popleft()

    def close(self) -> None:
        """Cancels it on the worker, unless it has finished there; of a transfer that came unread nobody will go on."""
        self._connection.forget(self._number, cancel=True)
        for delta in self._deltas:
            if delta.transfer is not None:
                self.give_up(delta.transfer)
        self._deltas.clear()

    def give_up(self, transfer: Transfer) -> None:
        """Nobody will go on from what it has handed over."""
        self._connection.give_up(transfer)


class WorkerConnection:
    """The connection to one instance, from when its file appears until both the file and the last sequence are gone."""

    def __init__(self, instance: Instance, workers: Workers) -> None:
        self.instance = instance
        self.last_step = self.found_at = time.monotonic()
        self._workers = workers
        self._channel: WorkerChannel | None = None
        self._numbers = itertools.count(1)
        self._sequences: dict[int, WorkerSequence] = {}
        self._retired = False
        self.task = asyncio.create_task(self._run())

    @property
    def is_open(self) -> bool:
        return self._channel is not None

    def start(self, generate: Generate) -> WorkerSequence:
        """Send a sequence; its id is set here.

        Raises:
            WorkerLost: there is no connection now.
        """
        if self._channel is None:
            raise WorkerLost("no connection")
        number = next(self._numbers)
        sequence = self._sequences[number] = WorkerSequence(self, number)
        self._channel.send(msgspec.structs.replace(generate, id=number))
        return sequence

    def forget(self, number: int, *, cancel: bool) -> None:
        if self._sequences.pop(number, None) is None:
            return
        if cancel and self._channel is not None:
            self._channel.send(Cancel(number))
        self._end_if_idle()

    def give_up(self, transfer: Transfer) -> None:
        """Have what is held for it let go of by this worker, or by another one of its model if this one is gone. Where
        none is there, the transfer's own time limit has to do.
        """
        if self._channel is not None:
            self._channel.send(GiveUp(transfer.key))
        elif (other := self._workers.connection_of(self.instance.model)) is not None:
            other.give_up(transfer)
        else:
            log.warning("a transfer is held until its time is up", worker=self.instance.name)

    def retire(self) -> None:
        """The instance has withdrawn: nothing new goes there, what runs may finish."""
        self._retired = True
        log.info("worker gone", worker=self.instance.name, sequences=len(self._sequences))
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._retired and not self._sequences:
            self.task.cancel()

    async def _run(self) -> None:
        await keep_connected(Path(self.instance.socket), lambda: Channel(worker_decoder, self._on_message), self._use)

    async def _use(self, channel: WorkerChannel) -> None:
        channel.send(Hello("frontend", PROTOCOL_VERSION))
        self._channel = channel
        self._workers.note_change()
        try:
            await asyncio.wait({channel.closed})
        finally:
            self._channel = None
            self._workers.note_change()
            lost, self._sequences = self._sequences, {}
            for sequence in lost.values():
                sequence.lose(WorkerLost("its connection closed"))
            self._end_if_idle()

    def _on_message(self, _channel: WorkerChannel, message: WorkerMessage) -> None:
        if isinstance(message, Step):
            self.last_step = time.monotonic()
            for delta in message.deltas:
                sequence = self._sequences.get(delta.id)
                if sequence is None:
                    if delta.transfer is not None:  # it crossed with our Cancel
                        self.give_up(delta.transfer)
                else:
                    sequence.put(delta)
                    if delta.finish is not None:
                        self.forget(delta.id, cancel=False)
        elif isinstance(message, Refused):
            log.error("a worker refused this frontend", worker=self.instance.name, reason=message.reason)


class Workers:
    """Every instance in the run dir, connected."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._current: dict[str, WorkerConnection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the directory; ends when cancelled, and closes all connections."""
        try:
            async for instances in watch_instances(self._directory):
                self._follow(instances)
        finally:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def look_again(self) -> None:
        """Read the directory now: something is known to have been announced."""
        self._follow(read_instances(self._directory))

    async def settle(self) -> None:
        """Know everybody who has been announced by now, as a worker is before it calls itself ready; the watch would
        need some 20 ms more. Returns once new ones are connected, or SETTLE_S after they were found.
        """
        self.look_again()
        while (left_s := max(map(_settles_in, self._current.values()), default=0.0)) > 0:
            await self.wait_for_change(left_s)

    def _follow(self, instances: dict[str, Instance]) -> None:
        for name, connection in list(self._current.items()):
            if instances.get(name) != connection.instance:
                del self._current[name]
                connection.retire()
        for name, instance in instances.items():
            if name not in self._current:
                log.info("worker found", worker=name, model=instance.model)
                connection = self._current[name] = WorkerConnection(instance, self)
                self._tasks.add(connection.task)
                connection.task.add_done_callback(self._tasks.discard)
        self.note_change()

    def note_change(self) -> None:
        self._changed.set()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when an instance or a connection came or went, or after `timeout_s`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def connection(self, name: str) -> WorkerConnection | None:
        """The open connection to a worker, if there is one."""
        found = self._current.get(name)
        return found if found is not None and found.is_open else None

    def instance(self, name: str) -> Instance | None:
        """The process that is announced under this name now, connected or not yet."""
        found = self._current.get(name)
        return found.instance if found is not None else None

    def instance_of(self, model: str) -> Instance | None:
        """Any connected instance of a model: they share all that the block hash is taken over."""
        found = self.connection_of(model)
        return found.instance if found is not None else None

    def connection_of(self, model: str) -> WorkerConnection | None:
        """The open connection to any worker of a model."""
        return next((each for each in self._current.values() if each.is_open and each.instance.model == model), None)

    def announced(self, model: str) -> list[str]:
        """The names of a model's workers, connected or not yet."""
        return sorted(name for name, each in self._current.items() if each.instance.model == model)

    @property
    def names(self) -> frozenset[str]:
        """Those that are announced, connected or not yet."""
        return frozenset(self._current)

    def names_of(self, model: str) -> list[str]:
        return sorted(each.name for each in self._connected() if each.model == model)

    def roles(self, model: str) -> dict[str, int]:
        """How many connected workers of a model serve as what, by role."""
        return dict(Counter(each.role for each in self._connected() if each.model == model))

    @property
    def served_models(self) -> set[str]:
        return {each.model for each in self._connected()}

    def _connected(self) -> list[Instance]:
        return [each.instance for each in self._current.values() if each.is_open]


def _settles_in(connection: WorkerConnection) -> float:
    """Seconds that it may still take to be connected; 0 if it is, or has had its time."""
    return 0.0 if connection.is_open else max(connection.found_at + SETTLE_S - time.monotonic(), 0.0)
