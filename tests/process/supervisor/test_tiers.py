"""A store of KV tiers among the children: the box serves without it, tells of it, and lets it write out at the end."""

from __future__ import annotations

import os
import signal

import msgspec
import pytest
from supervised_box import DEADLINE_S, QUICK, BoxUnderTest, eventually

from dynamo_box.errors import BoxError
from dynamo_box.protocol import status

WORKER = "tiny.aggregated.0"
LATE = msgspec.structs.replace(QUICK, first_s=2.5, longest_s=2.5)
"""So that a look once a second sees that something is gone."""


def told(box: BoxUnderTest) -> list[status.Tiers]:
    """What the frontend heard."""
    path = box.run_dir.root / "frontend.told"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=status.Tiers) for line in lines]


def test_the_frontend_hears_of_the_tiers_and_what_is_killed_comes_back(box: BoxUnderTest) -> None:
    box.up(box.plan(kvstore="blocks:7", worker="offers:3", restart=LATE))
    news = eventually(lambda: [one for one in told(box) if one.store and one.workers], "the frontend was told")[-1]
    assert news.store is not None and news.store.host.blocks == 7
    assert (news.workers[WORKER].offloaded, news.models) == (3, {WORKER: "tiny"})
    heard = len(told(box))

    pid = box.process("kvstore").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: any(one.store is None for one in told(box)), "the frontend was told that it is gone")
    assert box.snapshot().box.state == "ready"
    box.until("kvstore", lambda one: one.state == "ready" and one.restarts == 1, "is back")
    eventually(lambda: told(box)[-1].store is not None, "the frontend was told that it is back")
    assert len(told(box)) <= heard + 4, "nothing was told twice"

    before = len(told(box))
    with box.client() as client:
        client.restart("frontend", 1.0, DEADLINE_S)
    eventually(lambda: len(told(box)) > before, "a new frontend is told everything")


def test_a_box_whose_store_can_not_live_serves_all_the_same(box: BoxUnderTest) -> None:
    box.up(box.plan(kvstore="log:no-memory fail:permanent"))
    snapshot = box.snapshot()
    assert (snapshot.box.state, snapshot.models[0].state) == ("degraded", "ready")
    assert snapshot.box.cause == "kvstore: it was told to fail"
    assert box.answers()


def test_the_store_stops_last_and_has_time_to_write_out(box: BoxUnderTest) -> None:
    box.up(box.plan(kvstore=""))
    with box.client() as client:
        stopped = client.down(0.0, DEADLINE_S)
    assert (stopped.processes, stopped.killed) == (4, 0)
    drained = (box.run_dir.root / "drained").read_text().split()
    assert drained == ["kvstore"], "the others had no time to drain"


def test_a_setting_reaches_the_store_and_its_disk_is_shown(box: BoxUnderTest) -> None:
    box.up(box.plan(kvstore="blocks:1"))
    with box.client() as client:
        assert client.set_option("kvstore", "clear", "disk") == "disk"
        with pytest.raises(BoxError, match="no setting volume"):
            client.set_option("kvstore", "volume", "11")
    disks = eventually(lambda: box.snapshot().disks, "disks were read")
    assert any("KV tier" in disk.purpose.split(", ") for disk in disks)
