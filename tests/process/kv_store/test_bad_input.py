"""Nonsense ends the connection it comes from, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from store_peers import DEADLINE_S, LAYOUT, Store, Worker, chain, digest, digests, room_for

from dynamo_box.kv.store.server import MAX_LEASES
from dynamo_box.protocol import PROTOCOL_VERSION, kv
from dynamo_box.protocol.framing import connect_unix, encode_frame

MakeStore = Callable[..., Store]


def attach(**changes: Any) -> kv.Attach:
    fields = {"version": PROTOCOL_VERSION, "owner": "w", "layout": LAYOUT, **changes}
    return kv.Attach(**fields)


def layout(**changes: Any) -> kv.Attach:
    return attach(layout=msgspec.structs.replace(LAYOUT, **changes))


def test_what_is_no_attach_is_answered_with_the_reason_and_the_end(store: Store) -> None:
    bystander = store.worker("bystander")
    bystander.store(*chain(1))
    for message, reason, permanent in (
        (attach(version=PROTOCOL_VERSION + 1), "speaks version", True),
        (attach(version=-1), "speaks version", True),
        (attach(owner="x" * 10_000), "characters", True),
        (layout(fingerprint="x" * 10_000), "characters", True),
        (layout(block_bytes=0), "0 bytes", True),
        (layout(block_bytes=-5), "-5 bytes", True),
        (layout(block_bytes=2**60), "bytes", True),
        (layout(block_size=0), "0 tokens", True),
        (kv.Find(1, digests(1)), "before the answer to Attach", False),
        (kv.Reserve(1, chain(1)), "before the answer to Attach", False),
        (kv.Distrust((0,)), "before the answer to Attach", False),
    ):
        refused = Worker(store).refusal(message)
        assert reason in refused.reason and refused.permanent == permanent, message
    assert bystander.found(1) == "2"
    store.figures_when(lambda now: now.refused == 11 and now.connections == 1)


def test_requests_that_can_not_be_end_the_connection(store: Store) -> None:
    bystander = store.worker("bystander")
    bystander.store(*chain(1))
    slots = bystander.attached.slots
    too_many = kv.MAX_BATCH + 1
    for message in (
        attach(),
        kv.Reserve(1, (kv.Block(b"short"),)),
        kv.Reserve(1, (kv.Block(digest(1), b"short"),)),
        kv.Reserve(1, (kv.Block(digest(1), b"", 101),)),
        kv.Reserve(1, (kv.Block(digest(1), b"", -1),)),
        kv.Reserve(1, (kv.Block(digest(1)),) * too_many),
        kv.Find(1, (b"",)),
        kv.Find(1, (digest(1),) * too_many),
        kv.Commit(1, (-1,)),
        kv.Commit(1, (slots,)),
        kv.Commit(1, (0,) * too_many),
        kv.Abandon((slots,)),
        kv.Distrust((2**62,)),
        kv.Distrust((0,) * too_many),
        kv.Release(1, loaded={"g2": -1}),
        kv.Release(1, failed={"g3": 2**60}),
        kv.Load(1, 1, -1, 1),
        kv.Load(1, 1, 0, -1),
        kv.Load(1, 1, 0, too_many),
    ):
        assert store.worker().refusal(message).reason, message
    worker = store.worker()
    lease = worker.find(1).lease
    assert "not in lease" in worker.refusal(kv.Load(1, lease, 0, 2)).reason
    assert bystander.found(1) == "2"
    figures = store.figures_when(lambda now: now.refused == 20 and now.connections == 1 and not now.leases)
    assert (figures.layouts[0].host_leased, figures.host.failed) == (0, 0)


def test_what_belongs_to_others_can_not_be_committed_abandoned_or_released(store: Store) -> None:
    one, other = store.worker("w1"), store.worker("w2")
    (slot,) = one.reserve(*chain(1))
    lease = one.find(1).lease
    assert other.commit(slot, slot).lost == (slot, slot)
    other.send(kv.Abandon((slot,)))
    other.send(kv.Release(lease))
    other.send(kv.Release(12345))
    assert other.load(12345, 0, 1).error == "the lease is over"
    assert not one.commit(slot).lost
    assert one.find(1).lease
    assert other.find().tiers == "" and other.reserve() == () and other.commit().generations == ()
    assert store.figures_when(lambda now: now.leases == 1).layouts[0].host_leased == 1


@pytest.mark.parametrize("seed", range(3))
def test_garbage_and_broken_frames_end_their_connection_only(store: Store, seed: int) -> None:
    random_ = random.Random(seed)
    bystander = store.worker("bystander")
    bystander.store(*chain(1))
    good = [
        encode_frame(attach()),
        encode_frame(kv.Reserve(1, chain(5, 6))),
        encode_frame(kv.Commit(2, (1, 2))),
        encode_frame(kv.Find(3, digests(1, 5))),
    ]
    pieces = [
        random_.randbytes(100),
        struct.pack(">I", 2**31) + b"x",
        struct.pack(">I", 0),
        encode_frame({"type": "attach"}),
        encode_frame(["attach", 1, 2, 3]),
        encode_frame({"type": "reserve", "id": "x", "blocks": None}),
        encode_frame(kv.Find(1, (b"x" * (1024 * 1024),))),
        good[0] + good[1][:-3],
    ]
    for _ in range(60):
        if random_.random() < 0.7:
            stream = bytearray(b"".join(random_.sample(good, random_.randint(1, 4))))
            for _ in range(random_.randint(1, 6)):
                stream[random_.randrange(len(stream))] = random_.randrange(256)
            pieces.append(bytes(stream))
        else:
            pieces.append(good[0] + random_.randbytes(random_.randint(1, 200)))
    for piece in pieces:
        with connect_unix(store.path, DEADLINE_S) as sock:
            try:
                sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was cut off while it was still talking
    assert bystander.found(1) == "2"
    store.set("nothing", "")  # figures from before its answer are of no interest
    store.figures_when(lambda now: (now.connections, now.host.queued, now.leases) == (1, 0, 0))
    assert store.process.poll() is None


def test_slots_of_a_worker_that_the_store_cut_off_are_not_given_away_while_it_may_still_write(
    make_store: MakeStore,
) -> None:
    """It lives, and doesn't know yet: what it copies now must not land in somebody's block."""
    store = make_store(host_bytes=room_for(2))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # a worker in a process of its own, without its parent's cleaning up
        try:
            victim = store.worker("victim")
            victim.reserve(*chain(1, 2))
            victim.refusal(kv.Find(1, (b"bad",)))
            os.write(write_end, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 1) == b"!"
        worker = store.worker("w2")
        figures = store.figures_when(lambda now: now.connections == 1 and now.refused == 1)
        assert figures.layouts[0].host_writing == 2
        assert worker.reserve(*chain(1, 3)) == (kv.BUSY, kv.FULL)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)
    store.figures_when(lambda now: now.layouts[0].host_writing == 0)
    slots = worker.reserve(*chain(1, 3))
    assert sorted(slots) == [0, 1]

    worker.refusal(kv.Find(1, (b"bad",)))
    again = store.worker("w2")
    assert sorted(again.reserve(*chain(1, 3))) == [0, 1], "it attached again, so it copies no more"


def test_one_that_asks_without_end_and_never_reads_is_cut_off(store: Store) -> None:
    bystander = store.worker("bystander")
    bystander.store(*chain(1))
    flood = store.worker("flood")
    question = encode_frame(kv.Find(1, (digest(1),) * kv.MAX_BATCH))
    sock = socket.socket(fileno=os.dup(flood.channel.fileno()))
    sock.settimeout(DEADLINE_S)
    with sock, pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            sock.sendall(question)
    assert bystander.found(1) == "2"
    store.figures_when(lambda now: now.connections == 1 and now.leases == 0)


def test_one_that_gives_no_lease_back_finds_nothing_more_in_the_end(store: Store) -> None:
    worker = store.worker("hoarder")
    worker.store(*chain(1))
    leases = [worker.find(1).lease for _ in range(MAX_LEASES + 1)]
    assert min(leases[:MAX_LEASES]) > 0 and leases[MAX_LEASES] == 0
    worker.send(kv.Release(leases[0]))
    worker.send(kv.Release(leases[0]))
    assert worker.find(1).lease > 0 and worker.find(1).lease == 0
    worker.close()
    assert store.worker("other").found(1) == "2"
    store.figures_when(lambda now: now.reclaimed == MAX_LEASES)


def test_the_most_connections_there_may_be(store: Store) -> None:
    first = store.worker("first")
    socks: list[socket.socket] = []
    for most in (*range(100, kv.MAX_CONNECTIONS, 100), kv.MAX_CONNECTIONS):  # no more may wait to be accepted than 256
        socks += [connect_unix(store.path, DEADLINE_S) for _ in range(most - 1 - len(socks))]
        store.figures_when(lambda now, most=most: now.connections == most)
    late = Worker(store)
    assert str(kv.MAX_CONNECTIONS) in late.receive().reason
    first.store(*chain(1))
    for sock in socks:
        sock.close()
    store.figures_when(lambda now: now.connections == 1)
    assert store.worker("second").found(1) == "2"
