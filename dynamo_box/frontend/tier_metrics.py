"""The KV tiers in metrics: what the supervisor last said of store and workers, under our names and the reference's.

Counters are those of workers and store, which begin at 0 with every life of theirs. Here they are added up over all
lives that this frontend has seen, so that sums over workers don't fall when one of them restarts; with a restart of
the frontend they begin anew. A worker that is gone keeps its counters; gauges are of those that are there.

Directions are spelled out (`device_to_host`), since in the reference's names h2d is host to disk for what is offloaded
and host to device for what is onboarded, and d2d is never device to device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.registry import Collector

from dynamo_box.protocol.figures import KvStoreFigures, TierFigures, WorkerTiers
from dynamo_box.protocol.status import Tiers

STATES = ("on", "off", "suspended")
STORE = ("", "")
"""Model and worker of what the store does."""


class _Counter(NamedTuple):
    """A family of `dynbox_kv_<name>_total`; `label` is the one that its counts differ by, "" for none."""

    name: str
    label: str
    text: str


_BY_WORKER = (
    _Counter("matched_tokens", "tier", "Prompt tokens found in a tier"),
    _Counter("loaded_tokens", "tier", "Prompt tokens loaded from a tier into a worker's pool"),
    _Counter("failed_tokens", "tier", "Prompt tokens found in a tier that were gone, late or damaged, and computed"),
    _Counter("wasted_tokens", "tier", "Prompt tokens found in a tier and not loaded: computing was faster, or the end"),
    _Counter("offload_known_blocks", "", "Blocks offered that the tiers had already"),
    _Counter("offload_filtered_blocks", "", "Blocks kept out of the tiers by their priority"),
    _Counter("offload_unset_blocks", "", "Blocks allowed into the tiers for want of a priority"),
    _Counter("offload_dropped_blocks", "reason", "Blocks that never went to the tiers"),
    _Counter("offload_terminated", "reason", "Requests whose offload stopped before their end"),
    _Counter("load_decisions", "decision", "Whether to load what was found, or to compute it"),
)
_MOVED = (
    _Counter("moved_blocks", "direction", "Blocks copied"),
    _Counter("moved_bytes", "direction", "Bytes copied"),
    _Counter("moved_seconds", "direction", "Time that copies took"),
)
_DIRECTIONS = (
    " between engine pool (device), host tier and disk tier; disk_to_device goes through host memory and takes in"
    " disk_to_host, which is counted by the store as well"
)
_BY_TIER = (
    _Counter("tier_lookups", "tier", "Blocks asked for"),
    _Counter("tier_hits", "tier", "Blocks asked for that were found in this tier"),
    _Counter("tier_evictions", "tier", "Blocks evicted"),
    _Counter("tier_failed_blocks", "tier", "Blocks that did not pass their check"),
)
_OF_STORE = (
    _Counter("store_requests", "", "Requests of workers to the store"),
    _Counter("store_refused", "", "Connections and requests that the store refused"),
    _Counter("store_reclaimed_leases", "", "Leases given back by the death of their holder"),
)

Counts = dict[tuple[str, str], float]
"""By counter and by what it is labelled with."""


@dataclass(slots=True)
class _Lives:
    """One process's counters over all its lives."""

    ended: Counts = field(default_factory=dict)
    now: Counts = field(default_factory=dict)

    def update(self, now: Counts) -> None:
        """A counter that has fallen is that of a new life."""
        if any(now.get(key, 0.0) < value for key, value in self.now.items()):
            self.ended = self.total()
        self.now = now

    def total(self) -> Counts:
        return {key: self.ended.get(key, 0.0) + self.now.get(key, 0.0) for key in {**self.ended, **self.now}}


class TierMetrics(Collector):
    """`block_sizes` are the models', in tokens."""

    def __init__(self, block_sizes: Mapping[str, int]) -> None:
        self._block_sizes = block_sizes
        self._latest: Tiers | None = None
        self._lives: dict[tuple[str, str], _Lives] = {}
        """By model and worker; names come from the plan, so they are few."""
        self._dropped = _Lives()
        """What tiers dropped, by tier and reason."""

    def update(self, tiers: Tiers) -> None:
        """News from the supervisor."""
        self._latest = tiers
        for worker, its in tiers.workers.items():
            model = tiers.models.get(worker, "")
            self._lives_of((model, worker)).update(_of_worker(its, self._block_sizes.get(model, 0)))
        if tiers.store is not None:
            self._lives_of(STORE).update(_of_store(tiers.store))
            self._dropped.update(
                {(tier, reason): n for tier, its in _tiers(tiers.store) for reason, n in its.dropped.items()}
            )

    def collect(self) -> Iterable[Metric]:
        if self._latest is None or (self._latest.store is None and not self._lives):
            return
        totals = {process: lives.total() for process, lives in sorted(self._lives.items())}
        of_workers = {process: counts for process, counts in totals.items() if process != STORE}
        of_store = totals.get(STORE, {})
        for counter in _BY_WORKER:
            yield _by_process(counter, of_workers)
        for counter in _MOVED:
            yield _by_process(counter._replace(text=counter.text + _DIRECTIONS), totals)
        yield from _worker_gauges(self._latest)
        for counter in (*_BY_TIER, *_OF_STORE):
            yield _of_one(counter, of_store)
        yield _by_reason("tier_dropped_blocks", "Blocks that never came into the tier", self._dropped.total())
        yield from _store_gauges(self._latest.store)
        yield from _aliases(_added_up(of_workers), of_store)

    def _lives_of(self, process: tuple[str, str]) -> _Lives:
        return self._lives.setdefault(process, _Lives())


# what the messages count, by our names


def _of_worker(its: WorkerTiers, block_size: int) -> Counts:
    counts: Counts = {
        ("offload_known_blocks", ""): its.known,
        ("offload_filtered_blocks", ""): its.filtered,
        ("offload_unset_blocks", ""): its.unset,
        ("load_decisions", "load"): its.loads,
        ("load_decisions", "recompute"): its.recomputes,
        ("moved_blocks", "device_to_host"): its.offloaded,
        ("moved_bytes", "device_to_host"): its.offloaded_bytes,
        ("moved_seconds", "device_to_host"): its.offload_seconds,
    }
    for tier, use in (("host", its.host), ("disk", its.disk)):
        direction = f"{tier}_to_device"
        counts["matched_tokens", tier] = use.matched
        counts["loaded_tokens", tier] = use.loaded
        counts["failed_tokens", tier] = use.failed
        counts["wasted_tokens", tier] = use.wasted
        counts["moved_blocks", direction] = use.loaded // block_size if block_size else 0
        counts["moved_bytes", direction] = use.bytes
        counts["moved_seconds", direction] = use.seconds
    for reason, blocks in its.dropped.items():
        counts["offload_dropped_blocks", reason] = blocks
    for reason, requests in its.terminated.items():
        counts["offload_terminated", reason] = requests
    return counts


def _of_store(store: KvStoreFigures) -> Counts:
    disk = store.disk
    counts: Counts = {
        ("moved_blocks", "host_to_disk"): disk.in_blocks,
        ("moved_bytes", "host_to_disk"): disk.in_bytes,
        ("moved_seconds", "host_to_disk"): disk.in_seconds,
        ("moved_blocks", "disk_to_host"): disk.out_blocks,
        ("moved_bytes", "disk_to_host"): disk.out_bytes,
        ("moved_seconds", "disk_to_host"): disk.out_seconds,
        ("store_requests", ""): store.requests,
        ("store_refused", ""): store.refused,
        ("store_reclaimed_leases", ""): store.reclaimed,
    }
    for tier, its in _tiers(store):
        counts["tier_lookups", tier] = its.lookups
        counts["tier_hits", tier] = its.hits
        counts["tier_evictions", tier] = its.evicted
        counts["tier_failed_blocks", tier] = its.failed
    return counts


def _tiers(store: KvStoreFigures) -> tuple[tuple[str, TierFigures], ...]:
    return ("host", store.host), ("disk", store.disk)


def _added_up(processes: Mapping[tuple[str, str], Counts]) -> Counts:
    total: Counts = {}
    for counts in processes.values():
        for key, value in counts.items():
            total[key] = total.get(key, 0.0) + value
    return total


# families


def _counter(name: str, text: str, labels: tuple[str, ...]) -> CounterMetricFamily:
    return CounterMetricFamily(f"dynbox_kv_{name}", text, labels=labels)


def _by_process(counter: _Counter, processes: Mapping[tuple[str, str], Counts]) -> Metric:
    family = _counter(counter.name, counter.text, ("model", "worker", *filter(None, [counter.label])))
    for process, counts in processes.items():
        for (name, label), value in counts.items():
            if name == counter.name:
                family.add_metric((*process, *filter(None, [label])), value)
    return family


def _of_one(counter: _Counter, counts: Counts) -> Metric:
    family = _counter(counter.name, counter.text, tuple(filter(None, [counter.label])))
    for (name, label), value in counts.items():
        if name == counter.name:
            family.add_metric(tuple(filter(None, [label])), value)
    return family


def _by_reason(name: str, text: str, dropped: Counts) -> Metric:
    family = _counter(name, text, ("tier", "reason"))
    for labels, value in dropped.items():
        family.add_metric(labels, value)
    return family


def _worker_gauges(tiers: Tiers) -> Iterator[Metric]:
    def gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(f"dynbox_kv_{name}", text, labels=("model", "worker"))
        for worker, value in values.items():
            family.add_metric((tiers.models.get(worker, ""), worker), value)
        return family

    its = tiers.workers
    yield gauge("worker_connected", "1 if the worker uses the tiers", {w: not t.connected for w, t in its.items()})
    yield gauge("offload_queued_blocks", "Blocks that wait to be offloaded", {w: t.queued for w, t in its.items()})
    yield gauge("offload_pinned_blocks", "Blocks held in pools for copies", {w: t.pinned for w, t in its.items()})
    yield gauge("offload_min_priority", "Blocks below stay out", {w: t.min_priority for w, t in its.items()})


def _store_gauges(store: KvStoreFigures | None) -> Iterator[Metric]:
    yield GaugeMetricFamily("dynbox_kv_store_up", "1 if the process that owns the tiers serves", store is not None)
    if store is None:
        return

    def gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(f"dynbox_kv_tier_{name}", text, labels=("tier",))
        for tier, value in values.items():
            family.add_metric((tier,), value)
        return family

    its = dict(_tiers(store))
    state = GaugeMetricFamily("dynbox_kv_tier_state", "1 for the state that the tier is in", labels=("tier", "state"))
    for tier, figures in its.items():
        for each in STATES:
            state.add_metric((tier, each), figures.state == each)
    yield state
    suspended = {tier: figures.state == "suspended" for tier, figures in its.items()}
    yield gauge("suspended", "1 if the tier has turned itself off for a while", suspended)
    yield gauge("capacity_bytes", "Bound of the tier", {tier: figures.capacity_bytes for tier, figures in its.items()})
    yield gauge("used_bytes", "Bytes in the tier", {tier: figures.used_bytes for tier, figures in its.items()})
    yield gauge("blocks", "Blocks in the tier", {tier: figures.blocks for tier, figures in its.items()})
    yield gauge("queued_blocks", "Blocks on their way in", {tier: figures.queued for tier, figures in its.items()})
    yield GaugeMetricFamily("dynbox_kv_store_leases", "Leases held now", store.leases)
    yield GaugeMetricFamily("dynbox_kv_store_connections", "Workers attached", store.connections)
    yield GaugeMetricFamily("dynbox_kv_store_indexing_layouts", "Layouts still read from disk", store.indexing)
    yield GaugeMetricFamily("dynbox_kv_store_metadata_bytes", "What its tables take, estimated", store.metadata_bytes)


def _aliases(workers: Counts, store: Counts) -> Iterator[Metric]:
    """What the reference calls them. It adds no _total to its counters, so these go without a type."""

    def alias(name: str, text: str, value: float) -> Metric:
        return UnknownMetricFamily(f"kvbm_{name}", f"{text} (the reference's name)", value)

    def moved(counts: Counts, direction: str) -> float:
        return counts.get(("moved_blocks", direction), 0.0)

    matched = sum(workers.get(("matched_tokens", tier), 0.0) for tier in ("host", "disk"))
    yield alias("matched_tokens", "Prompt tokens found in the tiers", matched)
    yield alias("offload_blocks_d2h", "Blocks from device to host memory", moved(workers, "device_to_host"))
    yield alias("offload_blocks_h2d", "Blocks from host memory to disk", moved(store, "host_to_disk"))
    yield alias("offload_blocks_d2d", "Blocks from device straight to disk, which never happens here", 0.0)
    yield alias("onboard_blocks_h2d", "Blocks from host memory to device", moved(workers, "host_to_device"))
    yield alias("onboard_blocks_d2d", "Blocks from disk to device", moved(workers, "disk_to_device"))
    for tier in ("host", "disk"):
        lookups = store.get(("tier_lookups", tier), 0.0)
        rate = store.get(("tier_hits", tier), 0.0) / lookups if lookups else 0.0
        text = f"Of the blocks asked for, the part that was in the {tier} tier"
        yield alias(f"{tier}_cache_hit_rate", text, rate)
    filtered = workers.get(("offload_filtered_blocks", ""), 0.0)
    text = "Blocks kept out of the tiers by their priority (under the reference's prefix)"
    yield CounterMetricFamily("kvbm_offload_filtered_blocks", text, filtered)
