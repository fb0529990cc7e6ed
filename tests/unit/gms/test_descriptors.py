"""Descriptors arrive with the message they belong to, and none is left open, whatever the peer does."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from dynamo_box.protocol.descriptors import BlockingFdChannel, FdChannel
from dynamo_box.protocol.framing import HEADER, FrameError, encode_frame
from dynamo_box.protocol.gms import MAX_DESCRIPTORS

DEADLINE_S = 60
FRAME_CAP = 4 * 1024 * 1024


class Plain(msgspec.Struct, tag="plain"):
    number: int
    padding: bytes = b""


class Carrier(msgspec.Struct, tag="carrier"):
    number: int
    descriptors: int = 0
    padding: bytes = b""


Message = Plain | Carrier
decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def open_descriptors() -> set[tuple[int, int, int]]:
    """(number, device, inode) of each; a descriptor that was closed and its number given away again differs."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            info = os.fstat(int(name))
        except OSError:
            continue  # the listing's own
        found.add((int(name), info.st_dev, info.st_ino))
    return found


@pytest.fixture(scope="module")
def uvloop_has_run() -> None:
    """Its first loop opens what it keeps for all of them."""
    uvloop.run(asyncio.sleep(0))


@pytest.fixture
def no_descriptor_left(uvloop_has_run: None) -> Iterator[None]:
    gc.collect()
    gc.freeze()  # so that the next ones need not look through what the whole suite has imported
    before = open_descriptors()
    yield
    gc.collect()
    assert open_descriptors() - before == set()


@pytest.fixture
def files(tmp_path: Path, no_descriptor_left: None) -> Iterator[Callable[[int], list[int]]]:
    """Descriptors of files that hold their own number."""
    opened: list[int] = []

    def make(count: int) -> list[int]:
        made = []
        for number in range(count):
            path = tmp_path / f"file-{len(opened)}"
            path.write_text(str(number))
            made.append(os.open(path, os.O_RDONLY))
            opened.append(made[-1])
        return made

    yield make
    for fd in opened:
        os.close(fd)


def contents(fds: list[int]) -> list[int]:
    """Of the files, which are closed."""
    numbers = []
    for fd in fds:
        assert not os.get_inheritable(fd)
        numbers.append(int(os.pread(fd, 20, 0)))
        os.close(fd)
    return numbers


class End:
    """One end of a connection on a loop, and what it has heard."""

    def __init__(self, sock: socket.socket, **options: int) -> None:
        self.messages: list[tuple[Message, list[int]]] = []
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        self.channel: FdChannel[Message] = FdChannel(sock, decoder, self._on_message, self._on_close, **options)

    def _on_message(self, _: FdChannel[Message], message: Message, fds: list[int]) -> None:
        self.messages.append((message, contents(fds)))
        self.changed.set()

    def _on_close(self, _: FdChannel[Message], error: Exception | None) -> None:
        self.closed.set_result(error)  # a second call would raise

    async def heard(self, count: int) -> list[tuple[Message, list[int]]]:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.messages) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.messages

    async def ended(self) -> Exception | None:
        async with asyncio.timeout(DEADLINE_S):
            return await self.closed


@pytest.fixture(params=["asyncio", "uvloop"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)

    return run


def test_messages_arrive_in_order_each_with_its_own_descriptors(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        left, right = (End(sock) for sock in socket.socketpair())
        counts = [0, 1, 3, 0, 0, MAX_DESCRIPTORS, 2, 0]
        for number, count in enumerate(counts):
            fds = files(count)
            left.channel.send(Carrier(number, count) if count else Plain(number), fds)
        heard = await right.heard(len(counts))
        assert [message.number for message, _ in heard] == list(range(len(counts)))
        assert [numbers for _, numbers in heard] == [list(range(count)) for count in counts]
        left.channel.close()
        assert await left.ended() is None
        assert await right.ended() is None
        assert not right.channel.is_open

    on_loop(main())


def test_a_message_larger_than_the_socket_takes_keeps_its_descriptors(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        left, right = (End(sock) for sock in socket.socketpair())
        padding = os.urandom(3 * 1024 * 1024)
        fds = files(5)
        for number in range(4):
            left.channel.send(Carrier(number, 5, padding), fds)
            left.channel.send(Plain(number, padding))
        assert left.channel.backlog > 0
        for message, numbers in await right.heard(8):
            assert message.padding == padding
            assert numbers == ([0, 1, 2, 3, 4] if isinstance(message, Carrier) else [])
        assert left.channel.backlog == 0
        left.channel.close()
        await asyncio.gather(left.ended(), right.ended())

    on_loop(main())


def test_a_sender_may_close_its_descriptors_at_once_even_when_nothing_could_be_sent(
    on_loop: Any, tmp_path: Path, no_descriptor_left: None
) -> None:
    async def main() -> None:
        left_socket, right_socket = socket.socketpair()
        left = End(left_socket)
        left.channel.send(Plain(0, bytes(4 * 1024 * 1024)))  # nobody reads yet
        (tmp_path / "file").write_text("7")
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        left.channel.send(Carrier(1, 1), [fd])
        os.close(fd)
        right = End(right_socket)
        assert (await right.heard(2))[1] == (Carrier(1, 1), [7])
        left.channel.close()
        await asyncio.gather(left.ended(), right.ended())

    on_loop(main())


def raw(*parts: tuple[bytes, list[int]]) -> Callable[[socket.socket], None]:
    def send(sock: socket.socket) -> None:
        for data, fds in parts:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
            sock.sendmsg([data], rights)

    return send


def hostile(fds: list[int]) -> dict[str, Callable[[socket.socket], None]]:
    """What a peer may do, by what is wrong with it."""
    one = encode_frame(Carrier(1, 1))
    two = encode_frame(Carrier(2, 2))
    plain = encode_frame(Plain(3))
    long = encode_frame(Carrier(4, 1, bytes(1000)))
    return {
        "fewer than it says": raw((two, fds[:1])),
        "none of those it says": raw((one, [])),
        "more than it says": raw((one, fds[:2])),
        "some where it says none": raw((plain, fds[:1])),
        "more than a message may have": raw(
            (encode_frame(Carrier(1, MAX_DESCRIPTORS + 1)), fds[: MAX_DESCRIPTORS + 1])
        ),
        "in the middle of a message": raw((long[:100], fds[:1]), (long[100:], fds[:1])),
        "of the next message in the middle of this": raw((long[:100], fds[:1]), (long[100:] + one, fds[1:3])),
        "a negative number of them": raw((encode_frame(Carrier(1, -1)), [])),
        "garbage": raw((HEADER.pack(5) + b"\xc1\xc1\xc1\xc1\xc1", fds[:3])),
        "garbage after a whole message": raw((one, fds[:1]), (HEADER.pack(2) + b"\xc1\xc1", fds[:2])),
        "a tag that nobody knows": raw((encode_frame({"type": "other", "descriptors": 1}), fds[:1])),
        "nested without end": raw((HEADER.pack(100_000) + b"\x91" * 100_000, fds[:1])),
        "an oversized frame": raw((HEADER.pack(FRAME_CAP + 1), fds[:3])),
        "an oversized frame after a whole one": raw((two, fds[:2]), (HEADER.pack(0xFFFFFFFF), fds[:3])),
        "an end within the header": raw((one[:3], fds[:1])),
        "an end within the body": raw((one[:-1], fds[:1])),
    }


KINDS = sorted(hostile([0] * (MAX_DESCRIPTORS + 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_peer_is_cut_off_and_nothing_of_it_stays_open(on_loop: Any, files: Any, kind: str) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            end = End(ours, max_frame=FRAME_CAP)
            await asyncio.to_thread(hostile(files(MAX_DESCRIPTORS + 1))[kind], theirs)
            theirs.shutdown(socket.SHUT_WR)
            assert isinstance(await end.ended(), FrameError)
            assert not end.channel.is_open
            theirs.settimeout(DEADLINE_S)
            assert theirs.recv(1) == b""

    on_loop(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocking_receiver_refuses_the_same(files: Any, kind: str) -> None:
    ours, theirs = socket.socketpair()
    send = hostile(files(MAX_DESCRIPTORS + 1))[kind]

    def peer() -> None:
        send(theirs)
        theirs.shutdown(socket.SHUT_WR)

    with theirs, BlockingFdChannel(ours, decoder, max_frame=FRAME_CAP) as channel:
        thread = threading.Thread(target=peer)
        thread.start()
        with pytest.raises(FrameError):
            for _ in range(3):
                came = channel.receive(DEADLINE_S)
                assert came is not None
                contents(came[1])
        thread.join()


def test_descriptors_beyond_what_this_process_may_open_end_the_connection(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        end = End(ours)
        with theirs:
            fds = files(8)
            raw((encode_frame(Carrier(1, 8)), fds))(theirs)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 4, limits[1]))
            try:
                assert isinstance(await end.ended(), FrameError)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    on_loop(main())


def test_a_peer_that_does_not_read_is_cut_off(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        end = End(ours, max_backlog=1024 * 1024)
        with theirs:
            fds = files(2)
            sent = 0
            while end.channel.is_open:
                end.channel.send(Carrier(sent, 2, bytes(64 * 1024)), fds)
                sent += 1
                assert sent < 1000
            assert "unread" in str(await end.ended())
            end.channel.send(Plain(0))  # nobody hears it, and nothing breaks

    on_loop(main())


def test_what_waits_is_closed_with_the_channel(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        end = End(ours)
        with theirs:
            fds = files(3)
            for number in range(20):
                end.channel.send(Carrier(number, 3, bytes(256 * 1024)), fds)
            assert end.channel.backlog > 0
            reason = RuntimeError("enough")
            end.channel.abort(reason)
            assert await end.ended() is reason

    on_loop(main())


def test_messages_behind_the_one_that_closed_the_channel_are_dropped_with_their_descriptors(
    on_loop: Any, files: Any
) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        heard: list[int] = []

        def on_message(channel: FdChannel[Message], message: Message, fds: list[int]) -> None:
            contents(fds)
            heard.append(message.number)
            channel.close()

        with theirs:
            closed = asyncio.get_running_loop().create_future()
            FdChannel(ours, decoder, on_message, lambda _, error: closed.set_result(error))
            # One read brings all three: the last has descriptors, which end it.
            raw((encode_frame(Plain(1)) + encode_frame(Plain(2)), []), (encode_frame(Carrier(3, 2)), files(2)))(theirs)
            async with asyncio.timeout(DEADLINE_S):
                assert await closed is None
        assert heard == [1]

    on_loop(main())


def test_a_message_must_say_how_many_it_brings(files: Any) -> None:
    ours, theirs = socket.socketpair()
    with BlockingFdChannel(ours, decoder) as channel, theirs:
        with pytest.raises(FrameError, match="says 2 descriptors, 1 are given"):
            channel.send(Carrier(1, 2), files(1))
        with pytest.raises(FrameError, match=f"{MAX_DESCRIPTORS} may go together"):
            channel.send(Carrier(1, MAX_DESCRIPTORS + 1), files(MAX_DESCRIPTORS + 1))


def test_blocking_ends_talk_to_each_other_and_to_one_on_a_loop(on_loop: Any, files: Any) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        end = End(ours)

        def peer() -> list[int]:
            with BlockingFdChannel(theirs, decoder) as channel:
                channel.send(Carrier(1, 2, bytes(2 * 1024 * 1024)), fds[:2])
                came = channel.receive(DEADLINE_S)
                assert came is not None
                assert channel.bytes_sent > 2 * 1024 * 1024
                numbers = contents(came[1])
                assert channel.receive(DEADLINE_S) is None
                return numbers

        fds = files(3)
        answer = asyncio.create_task(asyncio.to_thread(peer))
        assert (await end.heard(1))[0][1] == [0, 1]
        end.channel.send(Carrier(2, 3), fds)
        end.channel.close()
        assert await answer == [0, 1, 2]

    on_loop(main())


def test_a_blocking_receiver_gives_up_in_time_and_keeps_what_came(files: Any) -> None:
    ours, theirs = socket.socketpair()
    frame = encode_frame(Carrier(1, 2))
    with BlockingFdChannel(ours, decoder) as channel, theirs:
        raw((frame[:6], files(2)))(theirs)
        with pytest.raises(TimeoutError):
            channel.receive(0.05)
        raw((frame[6:], []))(theirs)
        came = channel.receive(DEADLINE_S)
        assert came is not None
        assert contents(came[1]) == [0, 1]


def test_a_blocking_sender_gives_up_on_a_peer_that_does_not_read(files: Any) -> None:
    ours, theirs = socket.socketpair()
    with BlockingFdChannel(ours, decoder) as channel, theirs, pytest.raises(TimeoutError):
        channel.send(Carrier(1, 2, bytes(8 * 1024 * 1024)), files(2), timeout_s=0.05)


def test_closing_a_blocking_channel_closes_what_was_not_fetched(files: Any) -> None:
    ours, theirs = socket.socketpair()
    fds = files(2)
    with BlockingFdChannel(ours, decoder) as channel, theirs:
        raw((encode_frame(Plain(1)), []), (encode_frame(Carrier(2, 2)), fds), (encode_frame(Carrier(3, 2))[:5], fds))(
            theirs
        )
        assert channel.receive(DEADLINE_S) == (Plain(1), [])


def test_interrupting_ends_a_receive_in_another_thread(no_descriptor_left: None) -> None:
    ours, theirs = socket.socketpair()
    with BlockingFdChannel(ours, decoder) as channel, theirs:
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(channel.receive(DEADLINE_S)))
        thread.start()
        channel.interrupt()
        thread.join(DEADLINE_S)
        assert got == [None]
