"""The mock on the KV tiers of a rehearsal: real processes, a real store, and no bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from store_peers import Store
from worker_process import BLOCK_SIZE, ISOLATION, Peer, WorkerProcess, readable, worker

from dynamo_box.protocol.figures import WorkerFigures, WorkerTiers
from dynamo_box.protocol.request import Cancel, Delta, Generate, GiveUp, Leg, Sampling, Transfer, pack_tokens
from dynamo_box.protocol.spec import Offload, TierRehearsal
from engines.contract import KV_TIERS

GIB = 1 << 30
PROMPT = list(range(100, 200))  # six full blocks and a quarter of one
FULL = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
SAMPLING = Sampling(16, temperature=0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    rates = TierRehearsal(disk_read_bytes_per_s=1e15, disk_write_bytes_per_s=1e15)
    store = Store(tmp_path, host_bytes=512 * GIB, disk_bytes=4096 * GIB, rehearsal=rates)
    yield store
    store.close()


@contextmanager
def worker_on(
    store: Store, name: str, role: str = "aggregated", **changes: Any
) -> Iterator[tuple[WorkerProcess, Peer]]:
    """One that is connected."""
    with worker(store.run.root, name=name, role=role, kvstore="kvstore", **changes) as process, process.peer() as peer:
        tiers(process, lambda tiers: not tiers.connected)
        yield process, peer


def tiers(process: WorkerProcess, fit: Callable[[WorkerTiers], bool]) -> WorkerTiers:
    found = process.figures(lambda figures: figures.tiers is not None and fit(figures.tiers)).tiers
    assert found is not None
    return found


def ran(peer: Peer, tokens: Sequence[int] = PROMPT, *, stream: int = 1, **fields: Any) -> tuple[list[int], Delta]:
    sampling = fields.pop("sampling", SAMPLING)
    peer.send(Generate(stream, f"r{stream}", pack_tokens(tokens), sampling, ISOLATION, **fields))
    return peer.finish(stream)[stream]


def prefilled(peer: Peer) -> tuple[int, Transfer]:
    (first,), last = ran(peer, leg="prefill", kv_priority=10)
    assert last.finish == "prefilled" and last.transfer is not None, last
    return first, last.transfer


def legs(peer: Peer, first: int, transfer: Transfer, **fields: Any) -> tuple[list[int], Delta]:
    leg: Leg = "decode"
    rest = Sampling(SAMPLING.max_tokens - 1, temperature=0.0)
    return ran(peer, [*PROMPT, first], leg=leg, transfer=transfer, sampling=rest, **fields)


def test_what_one_worker_computed_others_load_from_host_memory_and_disk(store: Store) -> None:
    with worker_on(store, "m.0") as (one, peer):
        assert KV_TIERS in one.instance().capabilities
        whole, _ = ran(peer)
        blocks = (len(PROMPT) + len(whole) - 1) // BLOCK_SIZE
        figures = tiers(one, lambda tiers: tiers.offloaded == blocks)
        assert (figures.unset, figures.host.matched, figures.dropped) == (blocks, 0, {})
        assert figures.offloaded_bytes == blocks * BLOCK_SIZE * 131_072
        assert ran(peer, stream=2)[0] == whole
    store.figures_when(lambda now: now.disk.blocks == blocks)
    for name, tier in (("m.1", "host"), ("m.2", "disk")):
        with worker_on(store, name) as (other, peer):
            assert ran(peer)[0] == whole
            figures = tiers(other, lambda tiers: tiers.host.loaded + tiers.disk.loaded > 0)
            use = figures.host if tier == "host" else figures.disk
            assert (use.matched, use.loaded, use.failed, use.wasted) == (FULL, FULL, 0, 0)
            assert figures.loads == 1
            now = other.figures(lambda figures: figures.output_tokens == len(whole))
            assert (now.computed_prompt_tokens, now.cached_tokens) == (len(PROMPT) - FULL, FULL)
        store.set("clear", "g2")
    assert store.figures_when(lambda now: now.disk.out_blocks == FULL // BLOCK_SIZE and now.leases == 0)


def test_a_prompt_is_handed_over_through_a_hold_whatever_its_priority_keeps_out(store: Store) -> None:
    """With the block that it leaves unfinished. The hold ends when it is claimed, or given up."""
    keeps_out: dict[str, Any] = {"offload": Offload(min_priority=90)}
    blocks = FULL // BLOCK_SIZE
    with (
        worker_on(store, "m.p", "prefill", **keeps_out) as (prefill, one),
        worker_on(store, "m.d", "decode", **keeps_out) as (decode, other),
    ):
        whole, _ = ran(one, kv_priority=10)
        kept_out = tiers(prefill, lambda tiers: tiers.filtered > blocks)
        assert (kept_out.offloaded, kept_out.terminated, kept_out.min_priority) == (0, {"priority": 1}, 90)
        first, transfer = prefilled(one)
        store.figures_when(lambda now: (now.leases, now.host.blocks) == (1, blocks + 1))
        rest, last = legs(other, first, transfer, must_transfer=True)
        assert ([first, *rest], last.finish, last.error) == (whole, "length", "")
        store.figures_when(lambda now: now.leases == 0)
        figures = decode.figures(lambda figures: figures.taken_over == 1)
        assert (figures.computed_prompt_tokens, figures.transfers_failed) == (0, 0)

        _, unwanted = prefilled(one)
        store.figures_when(lambda now: now.leases == 1)
        one.send(GiveUp(unwanted.key))
        store.figures_when(lambda now: now.leases == 0)
        assert prefill.figures(lambda figures: figures.handed_over == 2).kv_blocks_used == 0


def test_one_that_waits_with_a_lease_gives_it_back_when_it_is_cancelled(store: Store) -> None:
    with worker_on(store, "m.0") as (one, peer):
        ran(peer)
        tiers(one, lambda tiers: tiers.offloaded > 5)
    with worker_on(store, "m.1", options={"kv_blocks": 8}) as (other, peer):
        peer.generate(1, [5] * 100, annotations=("mock:stall:after=1",))
        assert next(peer.deltas()).tokens
        peer.generate(2, PROMPT)
        store.figures_when(lambda now: now.leases == 1)
        assert not readable([peer.socket], 0.2), "the pool is full"
        peer.send(Cancel(2))
        assert peer.finish(2)[2][1].finish == "cancelled"
        store.figures_when(lambda now: now.leases == 0)
        assert tiers(other, lambda tiers: tiers.host.wasted > 0).host.wasted == FULL


def test_without_the_store_prompts_are_computed_and_with_the_next_one_it_goes_on(store: Store) -> None:
    with worker_on(store, "m.p", "prefill") as (prefill, one), worker_on(store, "m.d", "decode") as (decode, other):
        whole, _ = ran(one, stream=9)
        first, transfer = prefilled(one)
        store.kill()
        for process in (prefill, decode):
            tiers(process, lambda tiers: tiers.connected != "")
        strict = legs(other, first, transfer, must_transfer=True)[1]
        assert strict.error == "the KV of the prompt can't be loaded: 0 of its 7 blocks are there"
        assert [first, *legs(other, first, transfer, stream=2)[0]] == whole
        assert decode.figures(lambda figures: figures.transfers_failed == 2).taken_over == 0
        said, failed = ran(one, leg="prefill")
        assert (said, failed.finish, failed.transfer) == ([first], "prefilled", None)
        assert failed.error.startswith("the KV of the prompt could not be handed over: ")

        store.start()
        for process in (prefill, decode):
            tiers(process, lambda tiers: not tiers.connected)
        ran(one, [8] * 100, stream=3)
        assert store.figures_when(lambda now: now.host.blocks >= 6).disk.state == "on"
        figures: WorkerFigures = decode.figures(lambda figures: figures.running == 0)
        assert figures.kv_blocks_used == 0
