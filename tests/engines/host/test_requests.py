"""The request plane: what a frontend sends to a worker, and what comes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from worker_process import WorkerProcess, asks, worker

from dynamo_box.protocol import PROTOCOL_VERSION, status
from dynamo_box.protocol.framing import HEADER, MAX_FRAME, BlockingChannel, connect_unix, encode_frame
from dynamo_box.protocol.request import Cancel, Hello, PeerMessage, Refused, Step, Subscribe, worker_decoder
from engines.shell_requests import MAX_SEQUENCES

STALL = ("mock:stall",)


def idle(process: WorkerProcess) -> bool:
    """Whether the engine comes to hold nothing; only figures from after this moment count."""
    process.ask(status.Set(1, "fault", "none"))
    figures = process.figures(lambda figures: figures.running == figures.waiting == 0)
    return figures.kv_blocks_used == 0


def test_tokens_come_with_the_reason_for_the_end_and_cached_tokens_once(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(7, list(range(100)), max_tokens=5)
        cold = [next(delta) for delta in [peer.deltas()] * 5]
        assert [len(delta.tokens) for delta in cold] == [1] * 5
        assert [delta.finish for delta in cold] == [None] * 4 + ["length"]
        assert {delta.cached_tokens for delta in cold} == {0}
        peer.generate(8, list(range(100)), max_tokens=5)
        warm = [next(delta) for delta in [peer.deltas()] * 5]
        assert [delta.tokens for delta in warm] == [delta.tokens for delta in cold]
        assert [delta.cached_tokens for delta in warm] == [96, 0, 0, 0, 0]


def test_one_frame_a_step_and_connection_carries_every_sequence_that_moved(tmp_path: Path) -> None:
    timing = {"speedup": 1, "decode_ms": 1}
    with (
        worker(tmp_path / "run", options=timing) as process,
        process.peer() as first,
        process.peer() as second,
    ):
        second.generate(0, [99] * 20, max_tokens=50)
        first.send_together(asks(stream, [stream + 1] * 20, max_tokens=50) for stream in range(10))
        frames = tokens = ended = 0
        while ended < 10:
            step = first.receive()
            assert isinstance(step, Step)
            assert len({delta.id for delta in step.deltas}) == len(step.deltas)
            frames += 1
            tokens += sum(len(delta.tokens) for delta in step.deltas)
            ended += sum(delta.finish is not None for delta in step.deltas)
        assert tokens == 500
        assert frames <= 70, "sequences that move together travel together"
        assert len(second.finish(0)[0][0]) == 50


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokens": b""}, "empty"),
        ({"tokens": b"\1\2\3"}, "malformed"),
        ({"tokens": [1], "max_tokens": 0}, "max_tokens"),
        ({"tokens": [1], "isolation": b"short"}, "isolation"),
        ({"tokens": [1] * 8192}, "8192 tokens"),
        ({"tokens": [1], "annotations": ("mock:nonsense",)}, "stall, crash, freeze"),
        ({"tokens": [1], "annotations": ("mock:refuse_start:x",)}, "of the start"),
    ],
)
def test_a_request_that_cannot_be_served_is_rejected(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, **fields)
        _, delta = peer.finish(1)[1]
        assert (delta.finish, delta.rejected) == ("error", True)
        assert says in delta.error
        assert len(peer.run([1, 2, 3], stream=1)[0]) == 8, "the stream id is free again"


def test_a_stream_id_in_use_is_rejected_and_its_owner_goes_on(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], annotations=STALL)
        peer.generate(1, [4, 5, 6])
        delta = next(peer.deltas())
        assert delta.rejected
        assert "already in use" in delta.error
        peer.send(Cancel(1))
        assert next(peer.deltas()).finish == "cancelled"
        assert idle(process)


def test_cancel_ends_a_sequence_and_unknown_ids_are_ignored(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options={"speedup": 1, "decode_ms": 2}) as process, process.peer() as peer:
        peer.send(Cancel(12345))
        peer.generate(1, [1, 2, 3], max_tokens=8000)
        next(peer.deltas())
        peer.send(Cancel(1))
        assert peer.finish(1)[1][1].finish == "cancelled"
        peer.send(Cancel(1))
        assert idle(process)


def test_cancel_by_request_id_from_the_supervisor(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        peer.generate(1, [1, 2, 3], request_id="abc", annotations=STALL)
        process.figures(lambda figures: figures.running == 1)
        assert process.ask(status.CancelRequest(1, "abc")).text == "cancelled 1"
        assert peer.finish(1)[1][1].finish == "cancelled"
        assert "no request 'abc'" in process.ask(status.CancelRequest(2, "abc")).error


def test_a_closed_connection_cancels_all_its_sequences_and_no_other(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as stays:
        leaves = process.peer()
        for stream in range(5):
            leaves.generate(stream, [stream + 1] * 40, annotations=STALL)
        stays.generate(0, [9] * 40, annotations=STALL)
        process.figures(lambda figures: figures.running == 6)
        leaves.close()
        process.figures(lambda figures: figures.running == 1)
        stays.send(Cancel(0))
        assert stays.finish(0)[0][1].finish == "cancelled"
        assert idle(process)


def test_one_sequence_too_many_gets_an_error_that_is_not_its_fault(
    tmp_path: Path,
) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        for stream in range(MAX_SEQUENCES + 1):
            peer.generate(stream, [1], annotations=STALL)
        delta = next(delta for delta in peer.deltas() if delta.finish is not None)
        assert (delta.id, delta.finish, delta.rejected) == (MAX_SEQUENCES, "error", False)
        assert str(MAX_SEQUENCES) in delta.error


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (Hello("frontend", PROTOCOL_VERSION + 1), f"version {PROTOCOL_VERSION}"),
        (Hello("stranger", PROTOCOL_VERSION), "frontend, router"),
        (Subscribe(), "hello"),
    ],
)
def test_a_peer_that_does_not_fit_is_told_why(tmp_path: Path, hello: PeerMessage, says: str) -> None:
    with worker(tmp_path / "run") as process, process.peer() as bystander:
        with BlockingChannel(connect_unix(process.socket_path), worker_decoder) as channel:
            channel.send(hello)
            refused = channel.receive(60)
            assert isinstance(refused, Refused)
            assert says in refused.reason
            assert channel.receive(60) is None
        assert len(bystander.run([1, 2])[0]) == 8


def test_hostile_bytes_cost_the_connection_and_nothing_else(tmp_path: Path) -> None:
    """Random bytes, frames of no message, wrong types, lengths over the cap: the worker serves on."""
    chance = random.Random(5)
    whole = encode_frame(Hello("frontend", PROTOCOL_VERSION))
    hostile = [
        HEADER.pack(MAX_FRAME + 1) + b"x" * 100,
        HEADER.pack(5) + b"\xc1\xc1\xc1\xc1\xc1",
        encode_frame({"type": "generate", "id": "seven"}),
        encode_frame({"type": "nothing"}),
        encode_frame([1, 2, 3]),
        whole + encode_frame({"type": "generate", "id": 1, "request_id": 5, "tokens": "x"}),
        whole[:-1],
        *(chance.randbytes(chance.randrange(1, 300)) for _ in range(60)),
        *(whole + encode_frame(chance.randbytes(chance.randrange(1, 300))) for _ in range(20)),
    ]
    with worker(tmp_path / "run") as process, process.peer() as bystander:
        for data in hostile:
            peer = process.peer()
            peer.socket.sendall(data)
            peer.close()
        assert len(bystander.run([1, 2, 3])[0]) == 8
        assert idle(process)
        assert process.process.poll() is None


def test_a_peer_that_does_not_read_does_not_hold_up_the_others(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as deaf, process.peer() as peer:
        for stream in range(50):
            deaf.generate(stream, [stream] * 5, max_tokens=8000)
        assert len(peer.run([1, 2, 3], max_tokens=200)[0]) == 200


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_nothing_is_left_behind(tmp_path: Path, seed: int) -> None:
    """Requests, cancels, duplicates, rejections, lost connections in any order: a drain finds nothing."""
    chance = random.Random(seed)
    with worker(tmp_path / "run", options={"kv_blocks": 60}, max_batch=8) as process:
        peers = [process.peer() for _ in range(3)]
        for _ in range(400):
            index = chance.randrange(len(peers))
            peer = peers[index]
            action = chance.random()
            stream = chance.randrange(20)
            if action < 0.7:
                prompt = [chance.randrange(3)] * chance.choice([0, 1, 15, 16, 17, 100, 500])
                stall = STALL if chance.random() < 0.3 else ()
                peer.generate(stream, prompt, max_tokens=chance.randrange(0, 40), annotations=stall)
            elif action < 0.95:
                peer.send(Cancel(stream))
            else:
                peer.close()
                peers[index] = process.peer()
        for peer in peers:
            peer.close()
        process.status.send(status.Drain(10.0))
        process.await_status(status.Draining, where=lambda draining: draining.in_flight == 0)
        assert process.exit_code() == 0


def test_a_seed_makes_a_request_repeatable(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        first, again, other = (
            peer.run([1, 2, 3], stream, temperature=0.5, seed=seed)[0] for stream, seed in enumerate((7, 7, 8))
        )
        assert first == again != other
