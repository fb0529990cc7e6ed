"""Frames survive any split, refuse what is too large, and never crash on hostile bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.protocol.framing import (
    MAX_FRAME,
    BlockingChannel,
    Channel,
    FrameError,
    FrameSplitter,
    connect_channel,
    connect_unix,
    encode_frame,
    listen_unix,
    serve_channels,
)


class Ping(msgspec.Struct, tag="ping"):
    number: int
    text: str = ""


class Pong(msgspec.Struct, tag="pong"):
    number: int


decoder: msgspec.msgpack.Decoder[Ping | Pong] = msgspec.msgpack.Decoder(Ping | Pong)
DEADLINE_S = 60


@given(bodies=st.lists(st.binary(max_size=200), max_size=20), cuts=st.lists(st.integers(1, 60), min_size=1))
def test_bodies_come_back_whole_however_the_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies)
    splitter = FrameSplitter()
    got: list[bytes] = []
    position = turn = 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        got.extend(splitter.feed(stream[position : position + size]))
        position += size
        turn += 1
    assert got == bodies
    assert splitter.pending == 0


@given(data=st.binary(max_size=400))
def test_hostile_bytes_raise_frame_error_or_wait_within_the_cap(data: bytes) -> None:
    splitter = FrameSplitter(max_frame=64)
    try:
        for body in splitter.feed(data):
            assert len(body) <= 64
    except FrameError:
        return
    assert splitter.pending <= 64 + 4


def test_a_length_over_the_cap_is_refused_before_its_body_comes() -> None:
    with pytest.raises(FrameError, match="over the cap"):
        list(FrameSplitter().feed(struct.pack(">I", MAX_FRAME + 1)))


def test_a_message_over_the_cap_is_not_sent() -> None:
    with pytest.raises(FrameError, match="over the cap"):
        encode_frame(Ping(1, "x" * (MAX_FRAME + 1)))


def deep_directory(tmp_path: Path) -> Path:
    """A directory whose path is longer than the kernel takes for a socket."""
    path = tmp_path
    while len(str(path)) < 150:
        path = path / ("d" * 30)
    path.mkdir(parents=True)
    return path


def test_sockets_work_below_a_path_longer_than_the_kernel_allows(tmp_path: Path) -> None:
    path = deep_directory(tmp_path) / "control.sock"
    with listen_unix(path) as server:
        assert path.stat().st_mode & 0o777 == 0o700
        with connect_unix(path) as client:
            server.setblocking(True)
            peer, _ = server.accept()
            with peer:
                client.sendall(encode_frame(Ping(7)))
                with BlockingChannel(peer, decoder) as channel:
                    assert channel.receive(DEADLINE_S) == Ping(7)


def test_channels_carry_messages_both_ways_and_gather_one_turn_into_one_write(tmp_path: Path) -> None:
    async def scenario() -> tuple[list[object], int]:
        got: list[object] = []
        done = asyncio.Event()
        reads = 0

        def answer(channel: Channel[Ping | Pong], message: Ping | Pong) -> None:
            channel.send(Pong(message.number))

        class Counting(Channel[Ping | Pong]):
            def data_received(self, data: bytes) -> None:
                nonlocal reads
                reads += 1
                super().data_received(data)

        def collect(_channel: Channel[Ping | Pong], message: Ping | Pong) -> None:
            got.append(message)
            if len(got) == 100:
                done.set()

        server = await serve_channels(listen_unix(tmp_path / "s.sock"), lambda: Channel(decoder, answer))
        client = await connect_channel(tmp_path / "s.sock", lambda: Counting(decoder, collect))
        for number in range(100):
            client.send(Ping(number))
        await asyncio.wait_for(done.wait(), DEADLINE_S)
        client.close()
        await asyncio.wait_for(client.closed, DEADLINE_S)
        server.close()
        return got, reads

    got, reads = asyncio.run(scenario())
    assert got == [Pong(number) for number in range(100)]
    assert reads < 10


@pytest.mark.parametrize(
    "junk", [b"\xff\xff\xff\xff", struct.pack(">I", 3) + b"\xc1\xc1\xc1", struct.pack(">I", 1) + b"\x90"]
)
def test_a_channel_closes_with_the_reason_when_the_peer_sends_junk(tmp_path: Path, junk: bytes) -> None:
    async def scenario() -> Exception | None:
        reason: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        server = await serve_channels(
            listen_unix(tmp_path / "s.sock"),
            lambda: Channel(decoder, lambda *_: None, lambda _channel, error: reason.set_result(error)),
        )
        with connect_unix(tmp_path / "s.sock") as client:
            client.sendall(junk)
            result = await asyncio.wait_for(reason, DEADLINE_S)
        server.close()
        return result

    assert isinstance(asyncio.run(scenario()), FrameError | msgspec.DecodeError)


def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async def scenario() -> Exception | None:
        reason: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        def flood(channel: Channel[Ping | Pong]) -> None:
            def more() -> None:
                if channel.is_open:
                    channel.send(Ping(0, "x" * 100_000))
                    asyncio.get_running_loop().call_soon(more)

            more()

        server = await serve_channels(
            listen_unix(tmp_path / "s.sock"),
            lambda: Channel(
                decoder,
                lambda *_: None,
                lambda _channel, error: reason.set_result(error),
                on_open=flood,
                max_backlog=1_000_000,
            ),
        )
        with connect_unix(tmp_path / "s.sock"):
            result = await asyncio.wait_for(reason, DEADLINE_S)
        server.close()
        return result

    assert "unread" in str(asyncio.run(scenario()))


@pytest.mark.parametrize("turns", range(5))
def test_whoever_connects_while_a_server_closes_is_closed_too(tmp_path: Path, turns: int) -> None:
    """It takes the loop a turn to accept, one to make the transport, and one to open the channel."""

    async def scenario() -> None:
        opened: list[Channel[Ping | Pong]] = []
        server = await serve_channels(
            listen_unix(tmp_path / "s.sock"), lambda: Channel(decoder, lambda *_: None, on_open=opened.append)
        )
        with connect_unix(tmp_path / "s.sock") as client:
            client.setblocking(False)
            for _ in range(turns):
                await asyncio.sleep(0)
            server.close()
            before = list(opened)
            assert len(before) == (turns > 3)
            if not before:
                async with asyncio.timeout(DEADLINE_S):
                    with contextlib.suppress(ConnectionResetError):
                        assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        for channel in before:
            await asyncio.wait_for(channel.closed, DEADLINE_S)
        assert opened == before

    asyncio.run(scenario())
    gc.collect()


def test_receive_says_none_at_the_end_of_the_stream() -> None:
    left, right = socket.socketpair()
    with BlockingChannel(left, decoder) as channel:
        right.sendall(encode_frame(Ping(1))[:5])
        right.close()
        assert channel.receive(DEADLINE_S) is None
