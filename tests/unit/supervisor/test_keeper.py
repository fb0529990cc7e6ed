"""Descriptors that outlive the service they came from."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import uvloop

from dynamo_box.protocol import gms
from dynamo_box.protocol.descriptors import FdChannel
from dynamo_box.supervisor.keeper import Keeper

Received = tuple[gms.KeeperReply, list[int]]


class Service:
    """The other end: what a service of weight memory does with its keeper socket."""

    def __init__(self, keeper: Keeper) -> None:
        with keeper.connect() as inherited:
            fd = os.dup(inherited[gms.KEEPER_FD_VARIABLE])
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        self.inbox: asyncio.Queue[Received] = asyncio.Queue()
        self.channel: FdChannel[gms.KeeperReply] = FdChannel(
            sock,
            gms.keeper_reply_decoder,
            lambda _channel, message, fds: self.inbox.put_nowait((message, fds)),
            lambda _channel, _error: None,
        )

    async def next(self) -> Received:
        async with asyncio.timeout(60):
            return await self.inbox.get()


def record(layout: str, sizes: list[int], place: gms.Place = "device", epoch: int = 1) -> gms.EpochRecord:
    allocations = tuple(gms.Allocation(number, size) for number, size in enumerate(sizes))
    return gms.EpochRecord(layout, epoch, "hash", "content", place, allocations, ())


def memfd(text: bytes) -> int:
    fd = os.memfd_create("kept", os.MFD_CLOEXEC)
    os.write(fd, text)
    return fd


def run(test: Callable[[Keeper], Awaitable[None]]) -> list[tuple[str, str]]:
    """In an event loop such as the supervisor's; what the keeper said. No descriptor may be left open."""
    said: list[tuple[str, str]] = []

    async def body() -> None:
        keeper = Keeper(lambda level, text: said.append((level, text)))
        try:
            await test(keeper)
        finally:
            keeper.close()
            await asyncio.sleep(0)

    async def nothing() -> None:
        """uvloop keeps descriptors of its own from its first run on."""

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(nothing())
    before = len(os.listdir("/proc/self/fd"))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())
    assert len(os.listdir("/proc/self/fd")) == before
    return said


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def keep(service: Service, what: gms.EpochRecord, fds: list[int], number: int = 1, more: bool = False) -> None:
    service.channel.send(gms.Keep(number, what, more, len(fds)), fds)
    close(fds)


def test_a_successor_gets_what_was_committed() -> None:
    async def test(keeper: Keeper) -> None:
        first = Service(keeper)
        assert await first.next() == (gms.Adopted(), [])
        await keep(first, record("a", [4, 4]), [memfd(b"one"), memfd(b"two")])
        assert await first.next() == (gms.Kept(1), [])
        first.channel.close()
        second = Service(keeper)
        adopted, fds = await second.next()
        assert isinstance(adopted, gms.Adopt) and adopted.record == record("a", [4, 4]) and not adopted.more
        assert [os.pread(fd, 10, 0) for fd in fds] == [b"one", b"two"]
        assert await second.next() == (gms.Adopted(), [])
        close(fds)
        second.channel.close()

    run(test)


def test_a_new_epoch_replaces_the_old_one_whose_memory_is_let_go_before_it_is_said() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        old = memfd(b"old")
        inode = os.fstat(old).st_ino
        await keep(service, record("a", [3]), [old])
        await service.next()
        await keep(service, record("a", [3], epoch=2), [memfd(b"new")], number=2)
        assert await service.next() == (gms.Kept(2), [])
        assert inode not in {os.fstat(fd).st_ino for epoch in keeper.kept.values() for fd in epoch.descriptors}
        service.channel.send(gms.Forget(3, "a"))
        assert await service.next() == (gms.Kept(3), [])
        assert not keeper.kept
        service.channel.close()

    run(test)


def test_an_epoch_of_many_allocations_comes_in_parts_and_counts_when_whole() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        what = record("a", [1] * 100)
        await keep(service, what, [memfd(b"x") for _ in range(60)], more=True)
        await keep(service, what, [memfd(b"x") for _ in range(40)])
        assert await service.next() == (gms.Kept(1), [])
        assert len(keeper.kept["a"].descriptors) == 100
        service.channel.close()
        successor = Service(keeper)
        parts = [await successor.next(), await successor.next()]
        assert [len(fds) for _, fds in parts] == [64, 36]
        assert [isinstance(one, gms.Adopt) and one.more for one, _ in parts] == [True, False]
        for _, fds in parts:
            close(fds)
        successor.channel.close()

    run(test)


def test_half_an_epoch_is_forgotten_with_the_life_that_sent_it() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        await keep(service, record("a", [1, 1]), [memfd(b"x")], more=True)
        service.channel.close()
        while keeper._channel is not None:
            await asyncio.sleep(0.01)
        successor = Service(keeper)
        assert await successor.next() == (gms.Adopted(), [])
        successor.channel.close()

    run(test)


def test_a_wrong_number_of_descriptors_changes_nothing() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        await keep(service, record("a", [1]), [memfd(b"x")])
        await service.next()
        await keep(service, record("a", [1, 1], epoch=2), [memfd(b"y")], number=2)
        answer, _ = await service.next()
        assert answer == gms.Kept(2, "1 descriptors came for 2 allocations")
        assert keeper.kept["a"].record.epoch == 1
        service.channel.close()

    run(test)


def test_what_sleeps_on_disk_needs_no_descriptor() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        await keep(service, record("a", [1]), [memfd(b"x")])
        await service.next()
        await keep(service, record("a", [1], place="disk"), [], number=2)
        assert await service.next() == (gms.Kept(2), [])
        assert keeper.kept["a"].descriptors == ()
        service.channel.close()

    run(test)


def test_garbage_is_said_and_loses_nothing() -> None:
    async def test(keeper: Keeper) -> None:
        service = Service(keeper)
        await service.next()
        await keep(service, record("a", [1]), [memfd(b"x")])
        await service.next()
        os.write(service.channel.sock.fileno(), b"\xff\xff\xff\xffgarbage")
        while len(said_by(keeper)) == 0:
            await asyncio.sleep(0.01)
        assert set(keeper.kept) == {"a"}
        service.channel.close()

    def said_by(keeper: Keeper) -> list[int]:
        return [1] if keeper._channel is None else []

    said = run(test)
    assert len(said) == 1 and "no longer kept up to date" in said[0][1]
