"""Prefill and decode legs of the mock, as frontend and supervisor see them, with real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from worker_process import BLOCK_SIZE, ISOLATION, Index, Peer, WorkerProcess, readable, worker

from dynamo_box.kv.hashing import block_digest, chain_digests, short_hashes
from dynamo_box.protocol import status
from dynamo_box.protocol.request import Cancel, Delta, Generate, Leg, Sampling, Subscribe, Transfer, pack_tokens
from engines.contract import DISAGG, LATE_CANCEL

PROMPT = list(range(100, 140))  # two full blocks and half of one
SEEDED = Sampling(24, temperature=0.8, seed=7)
GREEDY = Sampling(24, temperature=0.0)
QUIET_S = 0.3


@contextmanager
def duo(tmp_path: Path, **changes: Any) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    """A prefill and a decode worker."""
    with (
        worker(tmp_path / "run", name="m.prefill.0", role="prefill", **changes) as prefill,
        worker(tmp_path / "run", name="m.decode.0", role="decode", **changes) as decode,
    ):
        yield prefill, decode


def send(
    peer: Peer,
    leg: Leg,
    tokens: Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    stream: int = 1,
    transfer: Transfer | None = None,
    strict: bool = False,
    annotations: tuple[str, ...] = (),
) -> None:
    peer.send(
        Generate(
            stream,
            f"r{stream}",
            pack_tokens(tokens),
            sampling,
            ISOLATION,
            annotations=annotations,
            leg=leg,
            transfer=transfer,
            must_transfer=strict,
        )
    )


def ran(peer: Peer, *request: Any, **more: Any) -> tuple[list[int], Delta]:
    send(peer, *request, **more)
    return peer.finish(more.get("stream", 1))[more.get("stream", 1)]


def prefilled(peer: Peer, tokens: Sequence[int] = PROMPT, sampling: Sampling = GREEDY) -> tuple[int, Transfer]:
    (first,), last = ran(peer, "prefill", tokens, sampling)
    assert last.finish == "prefilled", last
    assert last.transfer is not None
    return first, last.transfer


def rest(sampling: Sampling, said: int) -> Sampling:
    return msgspec.structs.replace(sampling, max_tokens=sampling.max_tokens - said)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_two_legs_say_what_one_says_and_the_second_computes_nothing_of_the_prompt(
    tmp_path: Path, sampling: Sampling
) -> None:
    with duo(tmp_path) as (prefill, decode), prefill.peer() as first_peer, decode.peer() as peer:
        assert DISAGG in decode.instance().capabilities
        send(first_peer, "prefill", PROMPT, sampling)
        deltas = first_peer.deltas()
        token, end = next(deltas), next(deltas)
        assert (len(token.tokens), token.finish, token.transfer) == (1, None, None), "the token doesn't wait for the KV"
        assert (end.tokens, end.finish, end.error) == ((), "prefilled", "")
        transfer = end.transfer
        assert transfer is not None
        assert (len(transfer.key), transfer.tokens) == (16, len(PROMPT))
        chain = chain_digests(pack_tokens(PROMPT), BLOCK_SIZE, ISOLATION)
        assert transfer.partial == block_digest(chain[-1], pack_tokens(PROMPT[2 * BLOCK_SIZE :]), ISOLATION)

        router, index = decode.peer("router"), Index()
        router.send(Subscribe())
        tokens, last = ran(peer, "decode", [*PROMPT, *token.tokens], rest(sampling, 1), transfer=transfer, strict=True)
        assert last.finish == "length"
        figures = decode.figures(lambda figures: figures.taken_over == 1)
        assert (figures.role, figures.computed_prompt_tokens) == ("decode", 0)
        assert (figures.prompt_tokens, figures.cached_tokens) == (0, 0), "which are the prefill worker's"
        while index.blocks.issuperset(short_hashes(chain)) is False:
            message = router.receive()
            assert message is not None
            index.feed(message)
        router.close()

        whole, _ = ran(first_peer, "whole", PROMPT, sampling, stream=2)
        assert [*token.tokens, *tokens] == whole
        half = whole[:10]
        assert ran(peer, "whole", PROMPT + half, rest(sampling, 10), stream=3)[0] == whole[10:]
        figures = prefill.figures(lambda figures: figures.handed_over == 1 and figures.output_tokens >= 25)
        assert (figures.role, figures.taken_over, figures.transfers_failed) == ("prefill", 0, 0)
        assert figures.kv_blocks_used == 0


def test_a_first_token_that_ends_the_request_ends_the_leg_as_usual(tmp_path: Path) -> None:
    with worker(tmp_path / "run", role="prefill") as process, process.peer() as peer:
        (first,), last = ran(peer, "prefill", PROMPT, Sampling(1, temperature=0.0))
        assert (last.finish, last.transfer) == ("length", None)
        stopping = Sampling(8, temperature=0.0, stop_token_ids=(first,))
        tokens, last = ran(peer, "prefill", PROMPT, stopping, stream=2)
        assert (tokens, last.finish, last.transfer) == ([first], "stop", None)


def test_stop_after_counts_the_token_of_the_first_leg(tmp_path: Path) -> None:
    with duo(tmp_path, options={"stop_after": 3}) as (prefill, decode), prefill.peer() as one, decode.peer() as other:
        first, transfer = prefilled(one)
        tokens, last = ran(other, "decode", [*PROMPT, first], rest(GREEDY, 1), transfer=transfer)
        assert (len(tokens), last.finish) == (2, "stop")


def test_a_transfer_that_is_none_is_computed_instead_or_fails(tmp_path: Path) -> None:
    with worker(tmp_path / "run", options={"kv_blocks": 4}) as process, process.peer() as peer:
        first, good = prefilled(peer)
        whole, _ = ran(peer, "whole", PROMPT, GREEDY, stream=2)
        spoilt: list[tuple[Transfer | None, str]] = [
            (None, "there is no transfer"),
            (Transfer(b"short", good.tokens, good.partial), "its key has 5 bytes, not 16"),
            (Transfer(good.key, 39, good.partial), "it covers 39 tokens, and there are 40 before the last one"),
            (Transfer(good.key, 10**9), "it covers 1000000000 tokens"),
            (Transfer(good.key, good.tokens), "its partial block is that of other tokens"),
        ]
        for stream, (transfer, says) in enumerate(spoilt, 3):
            tokens, last = ran(peer, "decode", [*PROMPT, first], stream=stream, transfer=transfer, strict=True)
            assert (tokens, last.finish, last.transfer) == ([], "error", None)
            assert last.error.startswith("the KV of the prompt can't be loaded: ")
            assert says in last.error
            tokens, last = ran(peer, "decode", [*PROMPT, first], rest(GREEDY, 1), stream=stream, transfer=transfer)
            assert [first, *tokens] == whole
        figures = process.figures(lambda now: now.transfers_failed == 2 * len(spoilt) and not now.running + now.waiting)
        assert (figures.taken_over, figures.kv_blocks_used) == (0, 0)


def test_a_decode_leg_that_finds_the_pool_full_waits_and_still_computes_nothing(tmp_path: Path) -> None:
    with duo(tmp_path, options={"kv_blocks": 4}) as (prefill, decode), prefill.peer() as one, decode.peer() as peer:
        first, transfer = prefilled(one)
        send(peer, "whole", [1] * 40, stream=7, annotations=("mock:stall:after=1",))
        assert next(peer.deltas()).tokens
        send(peer, "decode", [*PROMPT, first], Sampling(4, temperature=0.0), stream=8, transfer=transfer)
        figures = decode.figures(lambda figures: (figures.running, figures.waiting) == (1, 1))
        assert figures.kv_blocks_used == 3
        peer.send(Cancel(7))
        ended = peer.finish(7, 8)
        assert (ended[7][1].finish, ended[8][1].finish, len(ended[8][0])) == ("cancelled", "length", 4)
        figures = decode.figures(lambda figures: figures.taken_over == 1 and figures.kv_blocks_used == 0)
        assert figures.computed_prompt_tokens == 40, "those of the other one"


def test_the_hand_over_takes_its_time_and_keeps_its_blocks_until_then(tmp_path: Path) -> None:
    """40 tokens of 1000 bytes at 200 kB/s: 0.2 s each way, of which nothing overlaps when one step computes all."""
    options = {"speedup": 1, "decode_ms": 0, "kv_bytes_per_token": 1000, "transfer_bytes_per_s": 200_000}
    with duo(tmp_path, options=options) as (prefill, decode), prefill.peer() as one, decode.peer() as other:
        first, transfer = prefilled(one)
        figures = prefill.figures(lambda figures: figures.handed_over == 1)
        assert figures.handover_seconds >= 0.19
        assert 0 < figures.busy_s < 0.1, "copies aren't computing"
        began = time.monotonic()
        send(other, "decode", [*PROMPT, first], transfer=transfer)
        assert next(other.deltas()).tokens
        assert time.monotonic() - began >= 0.19
        assert other.finish(1)[1][1].finish == "length"


# faults


def test_a_hand_over_that_stalls_holds_its_blocks_until_it_is_cancelled(tmp_path: Path) -> None:
    with worker(tmp_path / "run", role="prefill") as process, process.peer() as peer:
        for stream, point in enumerate(("first_token", "handover"), 1):
            send(peer, "prefill", PROMPT, stream=stream, annotations=(f"mock:stall:at={point}",))
            assert len(next(peer.deltas()).tokens) == 1
            assert process.figures(lambda figures: figures.running == 1).kv_blocks_used == 3
            assert not readable([peer.socket], QUIET_S)
            peer.send(Cancel(stream))
            assert peer.finish(stream)[stream][1].finish == "cancelled"
            process.figures(lambda figures: (figures.running, figures.kv_blocks_used) == (0, 0))
        assert prefilled(peer)[1].tokens == len(PROMPT)


def test_a_leg_that_stalls_before_it_says_anything_can_be_cancelled(tmp_path: Path) -> None:
    with worker(tmp_path / "run") as process, process.peer() as peer:
        first, transfer = prefilled(peer)
        for stream, leg, tokens, point in (
            (2, "prefill", [5] * 40, "prefill"),
            (3, "decode", [*PROMPT, first], "takeover"),
        ):
            send(peer, leg, tokens, stream=stream, transfer=transfer, annotations=(f"mock:stall:at={point}",))
            process.figures(lambda figures: (figures.running, figures.kv_blocks_used) == (1, 3))
            assert not readable([peer.socket], QUIET_S)
            peer.send(Cancel(stream))
            assert peer.finish(stream)[stream] == ([], Delta(stream, finish="cancelled"))
            process.figures(lambda figures: (figures.running, figures.kv_blocks_used) == (0, 0))


def test_an_engine_that_can_not_cancel_before_the_first_token_is_not_asked_to(tmp_path: Path) -> None:
    """Whoever wants the end of a decode leg: it keeps its place until its first token, and ends with it."""
    blocker = Cancel(0)
    with worker(tmp_path / "run", options={"kv_blocks": 4, "late_cancel": True}) as process, process.peer() as peer:
        assert LATE_CANCEL in process.instance().capabilities
        first, transfer = prefilled(peer)
        said = process.figures(lambda figures: figures.output_tokens).output_tokens
        for stream, how in enumerate(("cancel", "operator", "client gone"), 1):
            send(peer, "whole", [1] * 40, stream=0, annotations=("mock:stall:after=1",))
            assert next(peer.deltas()).tokens
            client = process.peer() if how == "client gone" else peer
            send(client, "decode", [*PROMPT, first], stream=stream, transfer=transfer)
            process.figures(lambda figures: (figures.running, figures.waiting) == (1, 1))
            if how == "operator":
                process.ask(status.CancelRequest(1, f"r{stream}"))
            elif how == "client gone":
                client.close()
            peer.send(Cancel(stream))
            peer.send(Cancel(stream))
            process.ask(status.CancelRequest(2, f"r{stream}"))
            process.figures(lambda figures: (figures.running, figures.waiting) == (1, 1))
            peer.send(blocker)
            ended = peer.finish(*((0,) if how == "client gone" else (0, stream)))
            if how != "client gone":
                tokens, last = ended[stream]
                assert (len(tokens), last.finish) == (1, "cancelled"), how
            total = said + 2 * stream
            process.figures(lambda now, total=total: (now.running, now.waiting, now.output_tokens) == (0, 0, total))
        send(peer, "prefill", PROMPT, stream=7, annotations=("mock:stall:at=prefill",))
        peer.send(Cancel(7))
        assert peer.finish(7)[7] == ([], Delta(7, finish="cancelled")), "it is for decode legs alone"
        assert process.process.poll() is None


@pytest.mark.parametrize(
    ("point", "said"), [("prefill", 0), ("first_token", 1), ("handover", 1)], ids=lambda value: str(value)
)
def test_a_prefill_worker_dies_at_a_point_of_its_leg(tmp_path: Path, point: str, said: int) -> None:
    with worker(tmp_path / "run", role="prefill") as process, process.peer() as peer:
        assert process.ask(status.Set(1, "fault", f"crash:at={point}")).error == ""
        assert ran(peer, "whole", PROMPT, stream=1)[1].finish == "length", "which has no such point"
        send(peer, "prefill", PROMPT, stream=2)
        deltas = list(peer.deltas())
        assert (sum(len(delta.tokens) for delta in deltas), [delta.finish for delta in deltas]) == (said, [None] * said)
        assert process.exit_code() == -signal.SIGKILL


def test_a_decode_worker_dies_while_the_kv_arrives(tmp_path: Path) -> None:
    with duo(tmp_path) as (prefill, decode), prefill.peer() as one, decode.peer() as other:
        first, transfer = prefilled(one)
        send(other, "decode", [*PROMPT, first], transfer=transfer, annotations=("mock:crash:at=takeover",))
        assert not list(other.deltas())
        assert decode.exit_code() == -signal.SIGKILL


def test_a_worker_that_freezes_at_the_hand_over_ends_it_when_it_thaws(tmp_path: Path) -> None:
    with worker(tmp_path / "run", role="prefill") as process, process.peer() as peer:
        send(peer, "prefill", PROMPT, annotations=("mock:freeze:at=handover",))
        deltas = peer.deltas()
        assert len(next(deltas).tokens) == 1
        process.await_frozen()
        assert not readable([peer.socket], QUIET_S)
        process.thaw()
        assert next(deltas).finish == "prefilled"


def test_a_hand_over_that_fails_says_so_and_gives_no_transfer(tmp_path: Path) -> None:
    with worker(tmp_path / "run", role="prefill") as process, process.peer() as peer:
        tokens, last = ran(peer, "prefill", PROMPT, annotations=("mock:fail_handover",))
        assert (len(tokens), last.finish, last.transfer) == (1, "prefilled", None)
        assert last.error == "told to fail the hand-over"
        figures = process.figures(lambda figures: figures.transfers_failed == 1)
        assert (figures.handed_over, figures.handover_seconds, figures.kv_blocks_used) == (0, 0.0, 0)


def test_a_take_over_that_fails_is_computed_instead_unless_it_must_not_be(tmp_path: Path) -> None:
    with duo(tmp_path) as (prefill, decode), prefill.peer() as one, decode.peer() as other:
        first, transfer = prefilled(one)
        assert decode.ask(status.Set(1, "fault", "fail_takeover")).error == ""
        tokens, last = ran(other, "decode", [*PROMPT, first], transfer=transfer, strict=True)
        assert (tokens, last.finish) == ([], "error")
        assert last.error == "the KV of the prompt can't be loaded: told to fail the take-over"
        tokens, _ = ran(other, "decode", [*PROMPT, first], rest(GREEDY, 1), stream=2, transfer=transfer)
        figures = decode.figures(lambda figures: figures.transfers_failed == 2)
        assert (figures.taken_over, figures.computed_prompt_tokens) == (0, len(PROMPT))
        assert [first, *tokens] == ran(one, "whole", PROMPT, stream=3)[0]
