"""The event plane: what a router that believes every event knows is what the worker has."""

from __future__ import annotations

import random
import time
from pathlib import Path

from worker_process import ISOLATION, Index, Peer, WorkerProcess, asks, readable, worker

from dynamo_box.kv.hashing import chain_digests, short_hashes
from dynamo_box.protocol.request import KvDump, Load, Subscribe, pack_tokens
from engines.shell_events import DUMP_PAGE_BLOCKS


def subscribe(process: WorkerProcess) -> tuple[Peer, Index]:
    peer = process.peer("router")
    peer.send(Subscribe())
    return peer, Index()


def fresh_index(process: WorkerProcess) -> set[int]:
    peer, index = subscribe(process)
    with peer:
        while index.dumping or index.next_event_id is None:
            message = peer.receive()
            assert message is not None
            index.feed(message)
    return index.blocks


def test_the_index_holds_the_blocks_of_prompt_and_output_under_the_boxs_own_hash(tmp_path: Path) -> None:
    prompt = list(range(40))
    with worker(tmp_path / "run") as process, process.peer() as client:
        router, index = subscribe(process)
        output, _ = client.run(prompt, max_tokens=30)
        computed = (prompt + output)[:-1]
        expected = set(short_hashes(chain_digests(pack_tokens(computed), 16, ISOLATION)))
        assert len(expected) == 69 // 16
        while index.blocks != expected:
            message = router.receive()
            assert message is not None
            index.feed(message)
        assert fresh_index(process) == expected
        router.close()


def test_events_leave_before_the_tokens_of_the_same_step(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as client:
        router, index = subscribe(process)
        while not index.loads:
            message = router.receive()
            assert message is not None
            index.feed(message)
        client.generate(1, list(range(64)), max_tokens=1)
        client.finish(1)
        assert readable([router.socket], 0), "the stored event is there already when the token is"
        router.close()


def test_dump_and_events_add_up_without_a_gap_under_load(tmp_path: Path) -> None:
    """Three routers come at any time and start over at any time while a small pool stores and evicts."""
    chance = random.Random(11)
    options = {"kv_blocks": 80, "chunk_tokens": 64}
    with worker(tmp_path / "run", options=options, max_batch=6) as process, process.peer() as client:
        routers = [subscribe(process) for _ in range(3)]
        for round_ in range(12):
            streams = range(round_ * 30, round_ * 30 + 30)
            for stream in streams:
                shared = [chance.randrange(4)] * chance.randrange(0, 200)
                client.generate(stream, [*shared, stream], max_tokens=chance.randrange(1, 60))
            client.finish(*streams)
            peer, index = chance.choice(routers)
            peer.send(Subscribe())
            for peer, index in routers:
                while readable([peer.socket], 0):
                    message = peer.receive()
                    assert message is not None
                    index.feed(message)
        known = fresh_index(process)
        for peer, index in routers:
            peer.send(Subscribe())  # its dump comes after every event that was on the way
            while not (isinstance(message := peer.receive(), KvDump) and message.first):
                assert message is not None
                index.feed(message)
            assert index.blocks == known
            assert index.events > 100
            peer.close()


def test_load_is_told_when_it_changes_and_not_faster_than_every_50_ms(tmp_path: Path) -> None:
    timing = {"speedup": 1, "decode_ms": 1}
    with worker(tmp_path / "run", options=timing, max_batch=4) as process, process.peer() as client:
        began = time.monotonic()
        router, index = subscribe(process)
        client.send_together(asks(stream, [stream] * 100, max_tokens=300) for stream in range(8))
        client.finish(*range(8))
        while not (len(index.loads) > 1 and index.loads[-1].kv_blocks_used == 0):
            message = router.receive()
            assert message is not None
            index.feed(message)
        assert max(load.running for load in index.loads) == 4
        assert any((load.running, load.waiting) == (4, 4) for load in index.loads), "the batch full, the rest waiting"
        assert all(first != second for first, second in zip(index.loads[1:], index.loads[2:], strict=False))
        assert len(index.loads) <= 2 + 20 * (time.monotonic() - began)
        assert index.loads[-1] == Load(0, 0, 0, 1000)
        router.close()


def test_an_index_of_many_pages_arrives_whole_while_tokens_flow(tmp_path: Path) -> None:
    options = {"kv_blocks": 60_000, "chunk_tokens": 8192}
    prompt_tokens = 8000
    with worker(tmp_path / "run", options=options) as process, process.peer() as client:
        for stream in range(60):
            client.generate(stream, [stream] * prompt_tokens, max_tokens=1)
        client.finish(*range(60))
        client.generate(99, [1, 2, 3], max_tokens=5000)
        peer, index = subscribe(process)
        pages = 0
        while index.dumping or not index.loads:
            message = peer.receive()
            assert message is not None
            pages += isinstance(message, KvDump)
            index.feed(message)
        assert len(index.blocks) >= 60 * prompt_tokens // 16 == 3 * DUMP_PAGE_BLOCKS
        assert pages >= 3
        client.finish(99)
        peer.close()
