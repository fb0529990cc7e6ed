"""What /metrics says of the KV tiers."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_box.frontend.tier_metrics import TierMetrics
from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, TierUse, WorkerTiers
from dynamo_box.protocol.status import Tiers

W0 = WorkerTiers(
    connected="",
    queued=3,
    pinned=2,
    offloaded=40,
    offloaded_bytes=4000,
    offload_seconds=0.5,
    known=7,
    dropped={"queue_full": 2, "store_gone": 1},
    filtered=9,
    unset=11,
    terminated={"priority": 4, "length_mismatch": 1},
    min_priority=30,
    host=TierUse(matched=1600, loaded=800, failed=16, wasted=784, bytes=5000, seconds=0.25),
    disk=TierUse(matched=320, loaded=320, bytes=2000, seconds=0.75),
    loads=5,
    recomputes=2,
)
W1 = WorkerTiers(connected="the store is gone", offloaded=2)
STORE = KvStoreFigures(
    host=TierFigures("on", capacity_bytes=1000, used_bytes=600, blocks=6, lookups=200, hits=50, evicted=8),
    disk=TierFigures(
        "suspended",
        "no space left",
        lookups=100,
        hits=25,
        in_blocks=70,
        in_bytes=7000,
        in_seconds=1.5,
        out_blocks=21,
        out_bytes=2100,
        out_seconds=0.7,
        failed=3,
        dropped={"queue_full": 12},
        queued=5,
    ),
    leases=1,
    reclaimed=2,
    connections=3,
    requests=900,
    metadata_bytes=12345,
)
MODELS = {"w0": "m", "w1": "m"}


class Rig:
    def __init__(self) -> None:
        self.metrics = TierMetrics({"m": 16})
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    def tell(self, store: KvStoreFigures | None = STORE, **workers: WorkerTiers) -> None:
        self.metrics.update(Tiers(store, workers, MODELS))

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    def value(self, name: str, **labels: str) -> float:
        """The one sample of this name and these labels."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name == name and sample.labels == labels
        ]
        assert len(found) == 1, (name, labels, found)
        return found[0]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_box_without_tiers_says_nothing_of_them(rig: Rig) -> None:
    assert rig.text() == ""
    rig.tell(None)
    assert rig.text() == ""


def test_tokens_by_tier_and_worker(rig: Rig) -> None:
    rig.tell(w0=W0, w1=W1)
    for name, host, disk in (("matched", 1600, 320), ("loaded", 800, 320), ("failed", 16, 0), ("wasted", 784, 0)):
        family = f"dynbox_kv_{name}_tokens_total"
        assert rig.value(family, model="m", worker="w0", tier="host") == host
        assert rig.value(family, model="m", worker="w0", tier="disk") == disk
        assert rig.value(family, model="m", worker="w1", tier="host") == 0


def test_each_direction_is_named(rig: Rig) -> None:
    rig.tell(w0=W0, w1=W1)
    moved = {
        ("device_to_host", "w0"): (40, 4000, 0.5),
        ("device_to_host", "w1"): (2, 0, 0.0),
        ("host_to_device", "w0"): (50, 5000, 0.25),
        ("disk_to_device", "w0"): (20, 2000, 0.75),
        ("host_to_disk", ""): (70, 7000, 1.5),
        ("disk_to_host", ""): (21, 2100, 0.7),
    }
    for (direction, worker), expected in moved.items():
        labels = {"direction": direction, "worker": worker, "model": "m" if worker else ""}
        found = tuple(rig.value(f"dynbox_kv_moved_{unit}_total", **labels) for unit in ("blocks", "bytes", "seconds"))
        assert found == expected, direction


def test_what_became_of_offloads(rig: Rig) -> None:
    rig.tell(w0=W0)
    who = {"model": "m", "worker": "w0"}
    assert rig.value("dynbox_kv_offload_filtered_blocks_total", **who) == 9
    assert rig.value("dynbox_kv_offload_unset_blocks_total", **who) == 11
    assert rig.value("dynbox_kv_offload_known_blocks_total", **who) == 7
    assert rig.value("dynbox_kv_offload_terminated_total", **who, reason="priority") == 4
    assert rig.value("dynbox_kv_offload_terminated_total", **who, reason="length_mismatch") == 1
    assert rig.value("dynbox_kv_offload_dropped_blocks_total", **who, reason="queue_full") == 2
    assert rig.value("dynbox_kv_load_decisions_total", **who, decision="load") == 5
    assert rig.value("dynbox_kv_load_decisions_total", **who, decision="recompute") == 2
    assert rig.value("dynbox_kv_offload_queued_blocks", **who) == 3
    assert rig.value("dynbox_kv_offload_pinned_blocks", **who) == 2
    assert rig.value("dynbox_kv_offload_min_priority", **who) == 30
    assert rig.value("dynbox_kv_worker_connected", **who) == 1


def test_the_store_and_its_tiers(rig: Rig) -> None:
    rig.tell(w1=W1)
    assert rig.value("dynbox_kv_worker_connected", model="m", worker="w1") == 0
    assert rig.value("dynbox_kv_store_up") == 1
    states = {
        (tier, state): state == its
        for tier, its in (("host", "on"), ("disk", "suspended"))
        for state in ("on", "off", "suspended")
    }
    for (tier, state), expected in states.items():
        assert rig.value("dynbox_kv_tier_state", tier=tier, state=state) == expected
    assert rig.value("dynbox_kv_tier_suspended", tier="host") == 0
    assert rig.value("dynbox_kv_tier_suspended", tier="disk") == 1
    host: dict[str, Any] = {"capacity_bytes": 1000, "used_bytes": 600, "blocks": 6}
    for name, expected in host.items():
        assert rig.value(f"dynbox_kv_tier_{name}", tier="host") == expected
    counters: dict[str, Any] = {"lookups": 200, "hits": 50, "evictions": 8}
    for name, expected in counters.items():
        assert rig.value(f"dynbox_kv_tier_{name}_total", tier="host") == expected
    assert rig.value("dynbox_kv_tier_failed_blocks_total", tier="disk") == 3
    assert rig.value("dynbox_kv_tier_queued_blocks", tier="disk") == 5
    assert rig.value("dynbox_kv_tier_dropped_blocks_total", tier="disk", reason="queue_full") == 12
    assert rig.value("dynbox_kv_store_requests_total") == 900
    assert rig.value("dynbox_kv_store_reclaimed_leases_total") == 2
    assert rig.value("dynbox_kv_store_metadata_bytes") == 12345
    rig.tell(None, w1=W1)
    assert rig.value("dynbox_kv_store_up") == 0
    assert "dynbox_kv_tier_state{" not in rig.text(), "nobody knows"
    assert rig.value("dynbox_kv_tier_hits_total", tier="host") == 50, "what was counted stays so"


def test_the_references_names_are_over_all_workers(rig: Rig) -> None:
    rig.tell(w0=W0, w1=W1)
    aliases = {
        "kvbm_matched_tokens": 1920,
        "kvbm_offload_blocks_d2h": 42,
        "kvbm_offload_blocks_h2d": 70,
        "kvbm_offload_blocks_d2d": 0,
        "kvbm_onboard_blocks_h2d": 50,
        "kvbm_onboard_blocks_d2d": 20,
        "kvbm_host_cache_hit_rate": 0.25,
        "kvbm_disk_cache_hit_rate": 0.25,
        "kvbm_offload_filtered_blocks_total": 9,
    }
    for name, expected in aliases.items():
        assert rig.value(name) == expected, name
    text = rig.text()
    assert "# HELP kvbm_offload_blocks_h2d Blocks from host memory to disk" in text
    assert "# HELP kvbm_onboard_blocks_h2d Blocks from host memory to device" in text


def test_counters_never_fall_when_a_worker_or_the_store_restarts(rig: Rig) -> None:
    who = {"model": "m", "worker": "w0"}
    rig.tell(w0=W0, w1=W1)
    reborn = WorkerTiers(connected="", offloaded=1, host=TierUse(matched=16))
    rig.tell(None, w1=W1)  # it is down
    assert rig.value("dynbox_kv_moved_blocks_total", **who, direction="device_to_host") == 40
    assert 'dynbox_kv_worker_connected{model="m",worker="w0"}' not in rig.text(), "gauges are of who is there"
    rig.tell(replace(STORE, host=TierFigures("on", hits=1), disk=TierFigures("on")), w0=reborn, w1=W1)
    assert rig.value("dynbox_kv_moved_blocks_total", **who, direction="device_to_host") == 41
    assert rig.value("dynbox_kv_matched_tokens_total", **who, tier="host") == 1616
    assert rig.value("dynbox_kv_offload_terminated_total", **who, reason="priority") == 4
    assert rig.value("dynbox_kv_tier_hits_total", tier="host") == 51
    assert rig.value("dynbox_kv_tier_dropped_blocks_total", tier="disk", reason="queue_full") == 12
    assert rig.value("kvbm_offload_blocks_d2h") == 43
    rig.tell(w0=replace(reborn, offloaded=5, dropped={"evicted": 1}), w1=W1)
    assert rig.value("dynbox_kv_moved_blocks_total", **who, direction="device_to_host") == 45, "the same life goes on"
    assert rig.value("dynbox_kv_offload_dropped_blocks_total", **who, reason="evicted") == 1


def test_a_life_that_has_passed_its_predecessor_in_one_counter_is_still_a_new_one(rig: Rig) -> None:
    who = {"model": "m", "worker": "w0"}
    rig.tell(w0=W0)
    rig.tell(w0=WorkerTiers(connected="", offloaded=100))
    assert rig.value("dynbox_kv_moved_blocks_total", **who, direction="device_to_host") == 140
    assert rig.value("dynbox_kv_offload_filtered_blocks_total", **who) == 9
