"""`dynbox kv`, `kv clear`, and what `ps` says of tiers that are off."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dynamo_box.protocol import control
from dynamo_box.protocol.figures import (
    KvLayoutFigures,
    KvStoreFigures,
    TierFigures,
    TierUse,
    WorkerFigures,
    WorkerTiers,
)
from dynamo_box.snapshot import BoxSnapshot, ProcessInfo

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
MIB = 1 << 20
GIB = 1 << 30

HOST = TierFigures(
    "on", capacity_bytes=GIB, used_bytes=360 * MIB, blocks=512, lookups=1000, hits=640, in_blocks=600,
    in_bytes=420 * MIB, in_seconds=0.5, out_blocks=640, out_bytes=450 * MIB, out_seconds=0.25, evicted=88,
)  # fmt: skip
DISK = TierFigures(
    "suspended", "held by box ab\x1b[2J (pid 77)", capacity_bytes=4 * GIB, failed=2, dropped={"queue_full": 3}
)
LAYOUT = KvLayoutFigures(
    "0123456789abcdef0123456789abcdef", "f00d", "float32", 16, 737_280, ("smollm2.aggregated.0",) * 2,
    host_slots=1400, host_blocks=512, host_free=880, host_leased=6, host_writing=2,
)  # fmt: skip
WORKER = WorkerTiers(
    connected="", offloaded=600, known=40, filtered=12, unset=500, queued=1, dropped={"queue_full": 3, "evicted": 0},
    terminated={"priority": 4, "length_mismatch": 1}, min_priority=40,
    host=TierUse(matched=2000, loaded=1600, failed=16), disk=TierUse(matched=320, loaded=320), loads=30, recomputes=2,
)  # fmt: skip


def box_with(supervisor: Any, *processes: ProcessInfo) -> None:
    state: BoxSnapshot = supervisor.state
    supervisor.state = msgspec.structs.replace(state, processes=(*processes, *state.processes))


def store(figures: KvStoreFigures | None = None, state: str = "ready", cause: str = "") -> ProcessInfo:
    return ProcessInfo(
        "kvstore", "kvstore", None, None, state, "", 70, 0, None, 50_000_000, cause=cause, figures=figures
    )


def worker(tiers: WorkerTiers) -> ProcessInfo:
    figures = WorkerFigures(tiers=tiers)
    name = "smollm2.aggregated.1"
    return ProcessInfo(name, "worker", "smollm2", "aggregated", "ready", "", 71, 0, "cpu", 9, figures=figures)


FIGURES = KvStoreFigures(HOST, DISK, (LAYOUT,), "/home/kv", "second_hit", indexing=1, leases=2, connections=3)


def test_kv_shows_tiers_layouts_and_what_workers_kept_out(supervisor: Any, dynbox: Dynbox) -> None:
    box_with(supervisor, store(FIGURES), worker(WORKER))
    done = dynbox("kv")
    assert done.stderr == "warning: the disk tier of KV is suspended: held by box ab\\x1b[2J (pid 77)\n"
    assert done.stdout.splitlines() == [
        "kvstore  ready  /home/kv, admits second hit  3 connected  2 leases  reading the index of 1 layouts",
        "TIER  STATE         USED       OF  BLOCKS       IN     IN/S      OUT    OUT/S   HIT  EVICTED  FAILED  DROPPED",
        "host  on         360 MiB  1.0 GiB     512  420 MiB  840 MiB  450 MiB  1.8 GiB  64 %       88       0        0",
        "disk  suspended      0 B  4.0 GiB       0      0 B        -      0 B        -     -        0       2        3",
        "",
        "LAYOUT        DTYPE    TOKENS    BLOCK  HOST  FREE  LEASED  WRITING  DISK  WORKERS",
        "0123456789ab  float32      16  720 KiB   512   880       6        2     0  smollm2.aggregated.0",
        "",
        "WORKER                OFFLOADED  KNOWN  FILTERED  UNSET  DROPPED  QUEUED        HOST HIT    DISK HIT  LOADS"
        "  RECOMPUTES",
        "smollm2.aggregated.1        600     40        12    500        3       1  1,600 of 2,000  320 of 320     30"
        "           2",
        "  smollm2.aggregated.1: keeps priorities from 40 on; offload stopped for priority 4, length mismatch 1; "
        "dropped for queue full 3; tokens that failed their check: host 16",
    ]


def test_kv_json_has_every_figure_and_the_hit_rates(supervisor: Any, dynbox: Dynbox) -> None:
    box_with(supervisor, store(FIGURES), worker(WORKER))
    found = json.loads(dynbox("kv", "--json").stdout)
    assert found["process"] == {"name": "kvstore", "state": "ready", "pid": 70, "cause": ""}
    assert (found["tiers"]["host"]["hit_rate"], found["tiers"]["disk"]["hit_rate"]) == (0.64, None)
    assert found["tiers"]["host"]["in_bytes"] == 420 * MIB
    assert (found["tiers"]["disk"]["state"], found["tiers"]["disk"]["dropped"]) == ("suspended", {"queue_full": 3})
    assert found["layouts"][0]["host_blocks"] == 512
    assert (found["directory"], found["admission"]) == ("/home/kv", "second_hit")
    (one,) = found["workers"]
    assert (one["name"], one["filtered"], one["terminated"]) == (
        "smollm2.aggregated.1", 12, {"priority": 4, "length_mismatch": 1},
    )  # fmt: skip
    assert one["host"]["loaded"] == 1600


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_store_that_is_down_is_said_to_be(supervisor: Any, dynbox: Dynbox, more: tuple[str, ...]) -> None:
    gone = msgspec.structs.replace(WORKER, connected="the store is gone")
    box_with(supervisor, store(None, "backoff", "killed by SIGKILL"), worker(gone))
    done = dynbox("kv", *more)
    assert done.stderr.splitlines() == [
        "warning: kvstore is backoff: killed by SIGKILL; workers serve without tiers meanwhile",
        "warning: smollm2.aggregated.1 goes without KV tiers: the store is gone",
    ]
    if more:
        found = json.loads(done.stdout)
        assert (found["process"]["state"], found["tiers"], len(found["workers"])) == ("backoff", {}, 1)
    else:
        assert done.stdout.splitlines()[0] == "kvstore  backoff  says nothing of its tiers"


def test_a_box_without_tiers_says_so(supervisor: Any, dynbox: Dynbox) -> None:
    done = dynbox("kv")
    assert (done.stdout, done.stderr) == (
        "", "profile smollm2 has no KV tiers; see `dynbox help kv` for how to have some\n",
    )  # fmt: skip
    assert json.loads(dynbox("kv", "--json").stdout) == {"process": None, "tiers": {}, "layouts": [], "workers": []}
    assert "this box has no KV tiers" in dynbox("kv", "clear", code=3).stderr


@pytest.mark.parametrize("arguments", [("kv",), ("kv", "--json"), ("kv", "clear")])
def test_without_a_box_it_is_exit_3(box_env: Any, dynbox: Dynbox, arguments: tuple[str, ...]) -> None:
    assert "no box is running" in dynbox(*arguments, code=3).stderr


def test_clear_asks_the_store_for_each_tier_that_is_there(supervisor: Any, dynbox: Dynbox) -> None:
    words = {"g2": "512 blocks\x1b[2J cleared", "g3": "7 files cleared"}
    supervisor.handlers[control.SetOption] = lambda request: [control.Done(request.id, words[request.value])]

    def sent() -> list[tuple[str, str, str]]:
        asked = [one for one in supervisor.requests if isinstance(one, control.SetOption)]
        supervisor.requests.clear()
        return [(one.process, one.key, one.value) for one in asked]

    box_with(supervisor, store(FIGURES))
    assert dynbox("kv", "clear").stdout == "512 blocks\\x1b[2J cleared\n7 files cleared\n"
    assert sent() == [("kvstore", "clear", "g2"), ("kvstore", "clear", "g3")], "host first: it hands blocks to disk"
    assert json.loads(dynbox("kv", "clear", "--tier", "disk", "--json").stdout) == {
        "cleared": [{"tier": "disk", "text": "7 files cleared"}]
    }
    assert sent() == [("kvstore", "clear", "g3")]

    supervisor.state = msgspec.structs.replace(supervisor.state, processes=())
    box_with(supervisor, store(msgspec.structs.replace(FIGURES, disk=TierFigures("off"))))
    assert dynbox("kv", "clear").stdout == "512 blocks\\x1b[2J cleared\n"
    done = dynbox("kv", "clear", "--tier", "disk", code=3)
    assert done.stderr.splitlines() == [
        "error: this box has no disk tier",
        "hint: memory.tiers.disk in the profile gives it one",
    ]


def test_a_refusal_and_a_wrong_tier_have_their_exit_codes(supervisor: Any, dynbox: Dynbox) -> None:
    box_with(supervisor, store(FIGURES))
    supervisor.handlers[control.SetOption] = lambda request: [
        control.Error(request.id, 3, "kvstore is backoff", "wait until `dynbox ps` shows it as ready")
    ]
    assert dynbox("kv", "clear", code=3).stderr.startswith("error: kvstore is backoff\n")
    wrong = dynbox("kv", "clear", "--tier", "moon", code=2).stderr
    assert wrong.startswith("error: Invalid value for '--tier': 'moon' is not one of 'host', 'disk'.")


def test_ps_says_why_a_tier_is_off(supervisor: Any, dynbox: Dynbox) -> None:
    box_with(supervisor, store(FIGURES), worker(msgspec.structs.replace(WORKER, connected="another block size")))
    assert dynbox("ps").stdout.splitlines()[-2:] == [
        "the disk tier of KV is suspended: held by box ab\\x1b[2J (pid 77)",
        "smollm2.aggregated.1 goes without KV tiers: another block size",
    ]
