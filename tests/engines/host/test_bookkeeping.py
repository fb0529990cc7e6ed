"""Nothing that the shell notes down about a request or a peer outlives it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_box.protocol import PROTOCOL_VERSION
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.framing import Channel, connect_channel, listen_unix, serve_channels
from dynamo_box.protocol.request import Cancel, Delta, Generate, Hello, Load, Sampling, Step, Subscribe, worker_decoder
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineInfo, Output, ReportProgress, RequestRejected, SequenceRequest, Sink, StoredBlocks
from engines.shell_events import EventFeed
from engines.shell_requests import PeerConnection, Requests

DEADLINE_S = 60.0


class ScriptedEngine:
    """Takes every second request or so, and moves only when the test says."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.live: set[int] = set()
        self.cancelled: set[int] = set()

    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        raise NotImplementedError

    def submit(self, sequence: SequenceRequest) -> None:
        if self.chance.random() < 0.2:
            raise RequestRejected("not this one")
        if self.chance.random() < 0.1:
            raise OSError("out of order")
        self.live.add(sequence.key)

    def cancel(self, key: int) -> None:
        if key in self.live:
            self.cancelled.add(key)

    def cached_blocks(self) -> list[bytes]:
        return []

    def figures(self) -> WorkerFigures:
        return WorkerFigures()

    def set_option(self, key: str, value: str) -> str:
        raise ValueError(key)

    async def close(self) -> None:
        return None

    def outputs(self) -> list[Output]:
        outputs = []
        for key in sorted(self.live):
            if key in self.cancelled:
                outputs.append(Output(key, finish="cancelled"))
            elif self.chance.random() < 0.1:
                outputs.append(Output(key, (1, 2), finish=self.chance.choice(["stop", "length", "error"])))
            elif self.chance.random() < 0.5:
                outputs.append(Output(key, (1,)))
        ended = {output.key for output in outputs if output.finish is not None}
        self.live -= ended
        self.cancelled -= ended
        return outputs


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


async def live_through(chance: random.Random, path: Path) -> None:
    engine = ScriptedEngine(chance)
    falls: list[int] = []
    feed = EventFeed(engine.cached_blocks, lambda: Load(0, 0, 0, 0))
    requests = Requests(engine, falls.append)
    server = await serve_channels(listen_unix(path), lambda: PeerConnection(requests, feed).channel)
    ends: dict[tuple[int, int], int] = {}
    asked: dict[tuple[int, int], int] = {}

    async def peer(number: int) -> Channel[object]:
        def on_message(_channel: Channel[object], message: object) -> None:
            for delta in message.deltas if isinstance(message, Step) else ():
                assert isinstance(delta, Delta)
                if delta.finish is not None:
                    ends[number, delta.id] = ends.get((number, delta.id), 0) + 1

        channel = await connect_channel(path, lambda: Channel(worker_decoder, on_message))
        channel.send(Hello("frontend", PROTOCOL_VERSION))
        return channel

    numbers = iter(range(1000))
    peers = {number: await peer(number) for number in (next(numbers), next(numbers))}
    for _ in range(150):
        number = chance.choice(list(peers))
        stream = chance.randrange(8)
        action = chance.random()
        if action < 0.5:
            asked[number, stream] = asked.get((number, stream), 0) + 1
            tokens = chance.choice([b"", b"\1", b"\1\0\0\0", b"\1\0\0\0"])
            peers[number].send(Generate(stream, "r", tokens, Sampling(5), bytes(32)))
        elif action < 0.6:
            peers[number].send(Cancel(stream))
        elif action < 0.65:
            peers[number].send(Subscribe())
        elif action < 0.7:
            peers.pop(number).abort(ConnectionError("gone"))
            new = next(numbers)
            peers[new] = await peer(new)
        else:
            feed.publish([StoredBlocks((b"x" * 16,), b"")])
            requests.deliver(engine.outputs())
        await asyncio.sleep(0)

    await until(lambda: len(requests.connections) == len(peers))
    survivors = set(peers)
    if chance.random() < 0.5:
        requests.fail_all("the end")
    else:
        await drain(engine, requests)
    expected = {each: count for each, count in asked.items() if each[0] in survivors}

    def all_answered() -> bool:
        requests.deliver(engine.outputs())
        return {each: count for each, count in ends.items() if each[0] in survivors} == expected

    await until(all_answered)
    assert requests.in_flight == 0
    assert all(not connection.streams and not connection.deltas for connection in requests.connections)
    assert not falls or falls[-1] == 0
    for channel in peers.values():
        channel.close()
    await until(lambda: not requests.connections)
    assert feed.subscribers == 0
    feed.close()
    server.close()


async def drain(engine: ScriptedEngine, requests: Requests) -> None:
    def empty() -> bool:
        requests.deliver(engine.outputs())
        return requests.in_flight == 0

    await until(empty)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_request_is_answered_once_and_then_forgotten(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("s") / "worker.sock"
    asyncio.run(live_through(random.Random(seed), path))
