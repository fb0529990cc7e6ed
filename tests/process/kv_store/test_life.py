"""The store under its supervisor: how it starts, fails and ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
from store_peers import DEADLINE_S, MIB, Store, chain

from dynamo_box.protocol import status
from dynamo_box.protocol.spec import GmsSpec

MakeStore = Callable[..., Store]


def fails(store: Store, spec: object) -> status.Failed:
    store.launch()
    store.status.send(status.Start(spec))  # type: ignore[arg-type]
    failed = store.expect(status.Failed)
    assert store.ends() == 1
    store.status.close()
    return failed


def test_it_ends_with_its_supervisor_or_when_told_and_says_why_it_can_not_start(store: Store, tmp_path: Path) -> None:
    assert store.ready.info == {"host_bytes": str(4 * MIB), "disk_bytes": "0"}
    worker = store.worker()
    worker.store(*chain(1))
    store.status.close()
    assert store.ends() == 0
    assert worker.channel.receive(DEADLINE_S) is None

    store.start()
    store.process.send_signal(signal.SIGTERM)
    assert store.ends() == 0
    store.status.close()

    failed = fails(store, GmsSpec("gms@cpu", str(tmp_path), "cpu", 1, 1, ""))
    assert failed.permanent and "gms@cpu" in failed.cause
    failed = fails(store, msgspec.structs.replace(store.spec, disk_bytes=MIB))
    assert failed.permanent and "directory" in failed.cause and "disk_bytes" in failed.remedy
    failed = fails(store, msgspec.structs.replace(store.spec, run_dir=str(tmp_path / "nowhere")))
    assert not failed.permanent and "nowhere" in failed.cause

    store.start()
    assert store.worker().found(1) == "", "the host tier doesn't outlive its store"


def test_messages_for_others_are_answered_or_left_alone(store: Store) -> None:
    store.status.send(status.CancelRequest(3, "r"))
    answer = store.expect(status.Answer, lambda each: each.id == 3)
    assert "no requests" in answer.error
    store.status.send(status.Sleep(4, 1.0))
    store.status.send(status.Start(store.spec))
    assert store.set("clear", "g3").text == "0 blocks gone from disk"
    assert store.worker().found(1) == ""
