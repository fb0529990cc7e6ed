"""What outlives a service of weight memory: the descriptors of every committed epoch, held by the supervisor.

The service hands them over at each commit and each move (`Keep`), and is not believed to have freed anything before
the supervisor has closed its own (`Kept`). A new life of the service gets all of them (`Adopt`) before it listens, so
that nothing is lost when it is killed: a descriptor keeps the memory, and readers have their own mappings.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dynamo_box.protocol import gms
from dynamo_box.protocol.descriptors import FdChannel

MAX_KEPT = 4096
"""Descriptors for one service. A layout has a handful; this is far below what a process may open."""

KeeperChannel = FdChannel[gms.KeeperRequest]


@dataclass(frozen=True)
class KeptEpoch:
    record: gms.EpochRecord
    descriptors: tuple[int, ...]


class Keeper:
    """For one service. `emit(level, text)` hears what goes wrong."""

    def __init__(self, emit: Callable[[str, str], None]) -> None:
        self._emit = emit
        self._kept: dict[str, KeptEpoch] = {}
        self._parts: list[int] = []
        self._channel: KeeperChannel | None = None

    @property
    def kept(self) -> Mapping[str, KeptEpoch]:
        """By layout."""
        return self._kept

    @contextlib.contextmanager
    def connect(self) -> Iterator[Mapping[str, int]]:
        """A socket for a new life of the service, which first gets what the last one had committed."""
        self._disconnect()
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            channel: KeeperChannel = FdChannel(ours, gms.keeper_request_decoder, self._on_message, self._on_close)
            self._channel = channel
            for epoch in self._kept.values():
                for descriptors, more in parts(epoch.descriptors):
                    channel.send(gms.Adopt(epoch.record, more, len(descriptors)), descriptors)
            channel.send(gms.Adopted())
            yield {gms.KEEPER_FD_VARIABLE: theirs.fileno()}

    def close(self) -> None:
        """Let go of everything: the memory goes with the last process that maps it."""
        self._disconnect()
        for layout in list(self._kept):
            self._let_go(layout)

    def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._drop_parts()

    def _on_close(self, channel: KeeperChannel, error: Exception | None) -> None:
        if channel is self._channel:
            self._channel = None
            self._drop_parts()
            if error is not None:
                self._emit("warning", f"its descriptors are no longer kept up to date: {error}")

    def _on_message(self, channel: KeeperChannel, message: gms.KeeperRequest, descriptors: list[int]) -> None:
        if channel is not self._channel:
            close_all(descriptors)  # an earlier life, speaking after its end
        elif isinstance(message, gms.Forget):
            close_all(descriptors)
            self._let_go(message.layout)
            channel.send(gms.Kept(message.number))
        else:
            self._take(channel, message, descriptors)

    def _take(self, channel: KeeperChannel, message: gms.Keep, descriptors: list[int]) -> None:
        self._parts += descriptors
        if message.more and len(self._parts) <= MAX_KEPT:
            return
        held, self._parts = tuple(self._parts), []
        problem = self._problem(message.record, held)
        if problem:
            close_all(held)
            channel.send(gms.Kept(message.number, problem))
            return
        self._let_go(message.record.layout)
        self._kept[message.record.layout] = KeptEpoch(message.record, held)
        channel.send(gms.Kept(message.number))

    def _problem(self, record: gms.EpochRecord, descriptors: tuple[int, ...]) -> str:
        wanted = 0 if record.place == "disk" else len(record.allocations)
        if len(descriptors) != wanted:
            return f"{len(descriptors)} descriptors came for {wanted} allocations"
        others = sum(len(one.descriptors) for name, one in self._kept.items() if name != record.layout)
        if others + len(descriptors) > MAX_KEPT:
            return f"{others + len(descriptors)} descriptors are more than the {MAX_KEPT} that are kept for one service"
        return ""

    def _let_go(self, layout: str) -> None:
        epoch = self._kept.pop(layout, None)
        if epoch is not None:
            close_all(epoch.descriptors)

    def _drop_parts(self) -> None:
        close_all(self._parts)
        self._parts = []


def parts(descriptors: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Descriptors for messages of at most MAX_DESCRIPTORS each, and whether more follow."""
    step = gms.MAX_DESCRIPTORS
    for start in range(0, max(len(descriptors), 1), step):
        yield descriptors[start : start + step], start + step < len(descriptors)


def close_all(descriptors: list[int] | tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
