"""Who holds which bytes: every byte of a place in exactly one region, whatever devices, workers and the plan say."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import snapshots
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dynamo_box.protocol.figures import (
    GmsFigures,
    KvStoreFigures,
    LayoutFigures,
    TierFigures,
    WorkerFigures,
    WorkerTiers,
)
from dynamo_box.snapshot import BoxSnapshot, DeviceFigures, DeviceInfo, DiskInfo, ProcessInfo
from dynamo_box.tui.accounting import Place, held_by_purpose, holdings, layouts_at, places
from dynamo_box.tui.regions import Region

GIB = 1 << 30


def worker(device: str | None = "GPU-0", name: str = "w.0", model: str = "m", **figures: Any) -> ProcessInfo:
    return ProcessInfo(
        name, "worker", model, "aggregated", "ready", "", 7, 0, device, GIB, figures=WorkerFigures(**figures)
    )


def snapshot(*processes: ProcessInfo, **given: Any) -> BoxSnapshot:
    return replace(snapshots.empty(), processes=processes, **given)


def gpu(total: int | None = 80, planned: dict[str, int] | None = None, **figures: Any) -> DeviceInfo:
    read = DeviceFigures(**figures) if figures else None
    return DeviceInfo("GPU-0", "H100", "cuda", total, planned or {}, read)


def gms(*found: LayoutFigures, device: str = "GPU-0", says: bool = True) -> ProcessInfo:
    figures = GmsFigures(device, 100, layouts=found) if says else None
    return ProcessInfo(f"gms@{device}", "gms", None, None, "ready", "", 9, 0, device, 1, figures=figures)


def layout(name: str = "m", state: str = "committed", place: str = "device", **more: Any) -> LayoutFigures:
    return LayoutFigures(name, state, place, 1, "", 16, **more)


def pair(device: str = "GPU-0", model: str = "m", **figures: Any) -> list[ProcessInfo]:
    return [worker(device, f"{model}.{number}", model, **figures) for number in (0, 1)]


def only(found: BoxSnapshot) -> Place:
    (place,) = places(found)
    return place


def check(place: Place) -> None:
    assert all(size >= 0 for size in place.regions.values())
    if place.total is not None and place.regions:
        assert sum(place.regions.values()) == place.total


def test_every_byte_of_a_device_is_in_one_region() -> None:
    held = worker(weights_bytes=16, kv_bytes=40, kv_blocks_total=10, kv_blocks_used=3, kv_blocks_cached=2)
    place = only(snapshot(held, devices=(gpu(80, used_bytes=70, box_bytes=60, other_bytes=8),)))
    assert place.measured
    assert place.regions == {
        Region.WEIGHTS: 16,
        Region.USED: 12,
        Region.CACHED: 8,
        Region.POOL: 20,
        Region.BOX: 4,
        Region.OTHERS: 8,
        Region.UNATTRIBUTED: 2,
        Region.FREE: 10,
    }
    check(place)


def test_claims_beyond_what_the_driver_counts_are_cut_from_the_free_pool_first() -> None:
    held = worker(weights_bytes=16, kv_bytes=40, kv_blocks_total=10, kv_blocks_used=3, kv_blocks_cached=2)
    place = only(snapshot(held, devices=(gpu(80, used_bytes=30, box_bytes=30, other_bytes=5),)))
    assert place.regions[Region.WEIGHTS] == 16
    assert place.regions[Region.USED] == 12
    assert place.regions[Region.CACHED] == 2
    assert place.regions[Region.POOL] == place.regions[Region.BOX] == place.regions[Region.OTHERS] == 0
    check(place)


def test_what_nobody_can_tell_is_absent() -> None:
    place = only(snapshot(devices=(gpu(80, used_bytes=30),)))
    assert place.regions == {Region.UNATTRIBUTED: 30, Region.FREE: 50}
    place = only(snapshot(devices=(gpu(80, box_bytes=30),)))
    assert place.regions == {Region.BOX: 30, Region.UNREAD: 50}
    place = only(snapshot(devices=(gpu(None, box_bytes=30),)))
    assert place.regions == {Region.BOX: 30}
    place = only(snapshot(devices=(DeviceInfo("GPU-0", "", "cuda", None, {}, DeviceFigures()),)))
    assert place.regions == {}


def test_without_the_boxs_share_workers_words_still_count() -> None:
    held = worker(weights_bytes=16, kv_bytes=40, kv_blocks_total=10)
    place = only(snapshot(held, devices=(gpu(80, used_bytes=70, other_bytes=8),)))
    assert Region.BOX not in place.regions
    assert place.regions[Region.WEIGHTS] == 16
    assert place.regions[Region.UNATTRIBUTED] == 6
    check(place)


def test_a_pool_of_unknown_use_is_among_the_boxs_other_bytes() -> None:
    held = worker(weights_bytes=16, kv_bytes=40)
    place = only(snapshot(held, devices=(gpu(80, used_bytes=70, box_bytes=60, other_bytes=8),)))
    assert Region.USED not in place.regions
    assert place.regions[Region.BOX] == 44


def test_a_device_that_nothing_measures_shows_the_plan_divided_as_blocks_are() -> None:
    mock = worker("SIM-00", kv_blocks_total=100, kv_blocks_used=25, kv_blocks_cached=50)
    device = DeviceInfo("SIM-00", "H100", "simulated", 80, {"KV": 40, "overhead": 3})
    place = only(snapshot(mock, devices=(device,)))
    assert not place.measured
    assert place.regions == {Region.USED: 10, Region.CACHED: 20, Region.POOL: 10, Region.BOX: 3, Region.FREE: 37}
    assert held_by_purpose(place) == {}
    idle = only(snapshot(devices=(device,)))
    assert idle.regions == {Region.POOL: 40, Region.BOX: 3, Region.FREE: 37}


def test_a_worker_on_several_devices_holds_a_part_of_each() -> None:
    wide = worker("GPU-0,GPU-1", weights_bytes=11, kv_bytes=20, kv_blocks_total=10, kv_blocks_used=10)
    figures = DeviceFigures(used_bytes=30, box_bytes=30)
    devices = tuple(DeviceInfo(f"GPU-{number}", "", "cuda", 40, {}, figures) for number in (0, 1))
    first, second = places(snapshot(wide, devices=devices))
    assert (first.regions[Region.WEIGHTS], second.regions[Region.WEIGHTS]) == (6, 5)
    assert first.regions[Region.USED] == second.regions[Region.USED] == 10


def test_the_cpu_device_and_the_host_are_one_place() -> None:
    held = worker("cpu", weights_bytes=500, kv_bytes=200, kv_blocks_total=2, kv_blocks_used=1)
    devices = (
        DeviceInfo("host", "interpreters and libraries", "host", 4000, {"overhead": 300}),
        DeviceInfo("cpu", "An Ordinary CPU", "cpu", 4000, {"weights": 500, "KV": 200, "overhead": 50}),
    )
    host = DeviceFigures(used_bytes=2000, box_bytes=1100, other_bytes=700)
    place = only(snapshot(held, devices=devices, host=host, host_memory_bytes=4096))
    assert (place.key, place.name, place.total) == ("host", "An Ordinary CPU", 4096)
    assert place.planned == {"overhead": 350, "weights": 500, "KV": 200}
    assert held_by_purpose(place) == {"weights": 500, "KV": 200, "overhead": 400}
    check(place)


@pytest.mark.parametrize(("planned", "counted"), [(500, 500), (1000, 1000), (0, 500)])
def test_workers_of_one_model_share_its_weights_on_the_host_unless_the_plan_has_copies(
    planned: int, counted: int
) -> None:
    pair = [worker("cpu", name=f"w.{number}", weights_bytes=500) for number in (0, 1)]
    cpu = DeviceInfo("cpu", "", "cpu", 4000, {"weights": planned})
    host = DeviceFigures(used_bytes=2000, box_bytes=1500)
    place = only(snapshot(*pair, devices=(cpu,), host=host))
    assert place.regions[Region.WEIGHTS] == counted


class TestLayouts:
    """Weights in layouts are memory once, whoever maps them."""

    READ = (gpu(80, used_bytes=60, box_bytes=60),)

    def weights(self, *processes: ProcessInfo) -> int | None:
        place = only(snapshot(*processes, devices=self.READ))
        check(place)
        return place.regions.get(Region.WEIGHTS)

    def test_what_workers_map_of_a_layout_is_not_added_to_it(self) -> None:
        assert self.weights(*pair(weights_bytes=16)) == 32, "without a service each has a copy"
        assert self.weights(gms(layout(device_bytes=16)), *pair(weights_bytes=16)) == 16

    def test_the_layouts_word_counts_even_if_a_worker_says_more(self) -> None:
        assert self.weights(gms(layout(device_bytes=16)), *pair(weights_bytes=30)) == 16

    def test_an_epoch_under_construction_counts_though_nobody_maps_it(self) -> None:
        assert self.weights(gms(layout(state="writing", device_bytes=7)), *pair(weights_bytes=None)) == 7
        writing_beside = layout(state="writing", device_bytes=16 + 7)
        assert self.weights(gms(writing_beside), *pair(weights_bytes=16)) == 23

    def test_a_layout_that_sleeps_elsewhere_holds_nothing_of_the_device(self) -> None:
        asleep = gms(layout(place="host", host_bytes=16))
        assert self.weights(asleep, *pair(weights_bytes=16)) == 0, "what its workers said last is no longer so"

    def test_models_without_a_layout_are_counted_once_beside_those_that_have_one(self) -> None:
        service = gms(layout("m", device_bytes=16), layout("n", state="empty", place=""))
        assert self.weights(service, *pair(weights_bytes=16), *pair(model="n", weights_bytes=5)) == 21

    def test_while_the_service_is_down_the_workers_of_a_model_hold_one_copy(self) -> None:
        workers = [*pair(weights_bytes=16), *pair(model="n", weights_bytes=5)]
        assert self.weights(gms(says=False), *workers) == 21
        assert self.weights(gms(says=False)) is None
        assert self.weights(gms()) is None

    def test_sleeping_weights_of_a_device_lie_in_the_memory_of_the_machine(self) -> None:
        host = DeviceFigures(used_bytes=90, box_bytes=50)
        on_device, on_host = places(
            snapshot(
                gms(layout("a", place="host", host_bytes=16), layout("b", device_bytes=9)),
                devices=self.READ,
                host=host,
                host_memory_bytes=100,
            )
        )
        assert on_device.regions[Region.WEIGHTS] == 9
        assert on_host.regions[Region.WEIGHTS] == 16
        check(on_host)

    def test_the_cpu_device_and_its_host_place_are_one_memory(self) -> None:
        cpu = DeviceInfo("cpu", "", "cpu", 4000, {"weights": 5000})
        service = gms(layout("m", device_bytes=500), layout("n", place="host", host_bytes=300), device="cpu")
        found = snapshot(
            service,
            *pair("cpu", weights_bytes=500),
            devices=(cpu,),
            host=DeviceFigures(used_bytes=2000, box_bytes=1500),
        )
        assert only(found).regions[Region.WEIGHTS] == 800

    def test_snapshots_are_weights_on_the_disk_that_holds_them(self) -> None:
        service = gms(layout(place="disk", disk_bytes=15))
        disks = (DiskInfo("/scratch", "KV tier", 100, 30, 20), DiskInfo("/data", "models, logs", 100, 30, 20))
        scratch, data = places(snapshot(service, disks=disks))
        assert Region.WEIGHTS not in scratch.regions
        assert data.regions == {Region.WEIGHTS: 15, Region.BOX: 5, Region.OTHERS: 50, Region.FREE: 30}
        (unread,) = places(snapshot(service, disks=(DiskInfo("/", "all", 100, 30),)))
        assert unread.regions == {Region.WEIGHTS: 15, Region.UNATTRIBUTED: 55, Region.FREE: 30}

    def test_a_layout_is_at_every_place_where_it_has_bytes(self) -> None:
        moving = layout("m", moving="host", device_bytes=16, host_bytes=16)
        found = snapshot(gms(moving, layout("n")), devices=self.READ, host=DeviceFigures(used_bytes=1))
        assert [(each.layout.name, size) for each, size in layouts_at(found, "GPU-0")] == [("m", 16)]
        assert [(each.layout.name, size) for each, size in layouts_at(found, "host")] == [("m", 16)]
        assert layouts_at(found, "nowhere") == []


class TestTiers:
    """The host tier is memory once, whoever maps it; the disk tier is among the box's files."""

    HOST = DeviceFigures(used_bytes=90, box_bytes=50)

    def test_the_host_tier_counts_once_however_many_workers_map_it(self) -> None:
        workers = [worker("cpu", f"w.{number}", kv_bytes=10, tiers=WorkerTiers(connected="")) for number in range(8)]
        place = only(snapshot(store(20), *workers, host=self.HOST, host_memory_bytes=100))
        assert place.regions[Region.TIER] == 20
        assert place.regions[Region.BOX] == 30
        check(place)
        assert held_by_purpose(place)["KV tier"] == 20

    def test_it_is_believed_before_what_pools_have_left(self) -> None:
        held = worker("cpu", weights_bytes=16, kv_bytes=40, kv_blocks_total=10, kv_blocks_used=3, kv_blocks_cached=2)
        cpu = DeviceInfo("cpu", "", "cpu", 100, {"weights": 16})
        place = only(snapshot(store(10), held, devices=(cpu,), host=self.HOST, host_memory_bytes=100))
        assert place.regions[Region.TIER] == 10
        assert place.regions[Region.POOL] == 50 - 16 - 12 - 8 - 10
        check(place)

    def test_a_host_that_nothing_measures_shows_what_the_plan_set_aside_for_it(self) -> None:
        host = DeviceInfo("host", "", "host", 100, {"overhead": 5, "KV tier": 30})
        place = only(snapshot(store(10), devices=(host,)))
        assert place.regions == {Region.TIER: 30, Region.BOX: 5, Region.FREE: 65}

    def test_files_are_on_the_disk_that_holds_their_directory(self) -> None:
        disks = (DiskInfo("/", "logs", 100, 30, 20), DiskInfo("/scratch", "KV tier", 100, 30, 20))
        root, scratch = places(snapshot(store(0, 15, "/scratch/kv"), disks=disks))
        assert Region.TIER not in root.regions
        assert scratch.regions == {Region.TIER: 15, Region.BOX: 5, Region.OTHERS: 50, Region.FREE: 30}
        both = places(snapshot(store(0, 15, "/scratch/kv"), gms(layout(disk_bytes=9)), disks=disks[1:]))
        assert both[0].regions == {
            Region.WEIGHTS: 9, Region.TIER: 11, Region.BOX: 0, Region.OTHERS: 50, Region.FREE: 30,
        }  # fmt: skip

    def test_in_a_rehearsal_neither_memory_nor_disk_is_taken(self) -> None:
        disks = (DiskInfo("/", "logs", 100, 30, 20),)
        held = store(20, 15, "", simulated=True)
        host, disk = places(snapshot(held, disks=disks, host=self.HOST, host_memory_bytes=100))
        assert Region.TIER not in host.regions and Region.TIER not in disk.regions

    def test_the_store_is_named_on_the_host_and_no_worker_is(self) -> None:
        found = holdings(snapshot(store(20), worker("GPU-0"), devices=(gpu(),)), "host")
        assert [(each.process.name, each.kv_tier) for each in found] == [("kvstore", 20), ("w.0", None)]


def store(host: int, disk: int = 0, directory: str = "/kv", *, simulated: bool = False) -> ProcessInfo:
    tiers = (TierFigures("on", capacity_bytes=64, used_bytes=used) for used in (host, disk))
    figures = KvStoreFigures(*tiers, directory=directory, simulated=simulated)
    return ProcessInfo("kvstore", "kvstore", None, None, "ready", "", 8, 0, None, 30, figures=figures)


def test_disks_are_the_boxs_files_others_and_free() -> None:
    place = only(snapshot(disks=(DiskInfo("/data", "models", 100, 30, 20),)))
    assert place.regions == {Region.BOX: 20, Region.OTHERS: 50, Region.FREE: 30}
    place = only(snapshot(disks=(DiskInfo("/data", "models", 100, 30),)))
    assert place.regions == {Region.UNATTRIBUTED: 70, Region.FREE: 30}


def test_who_holds_what_names_every_process_once_at_each_place() -> None:
    box = snapshots.busy()
    on_device = holdings(box, box.devices[0].id)
    assert [each.process.name for each in on_device] == ["llama.aggregated.0"]
    assert on_device[0].weights == 16 * GIB
    on_host = [each.process.name for each in holdings(box, "host")]
    assert on_host == [process.name for process in box.processes]
    assert holdings(box, "nowhere") == []


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_regions_sum_to_the_total_of_every_known_box(kind: str) -> None:
    for place in places(snapshots.all_kinds()[kind]):
        check(place)


SIZES = st.integers(-5, 200)
MAYBE = st.none() | SIZES


@given(
    total=st.none() | st.integers(-1, 120),
    counts=st.none() | st.tuples(MAYBE, MAYBE, MAYBE),
    planned=st.dictionaries(st.sampled_from(["weights", "KV", "overhead", "else"]), SIZES),
    workers=st.lists(st.tuples(MAYBE, MAYBE, SIZES, SIZES, SIZES), max_size=3),
    disk=st.tuples(SIZES, SIZES, MAYBE),
    tier=st.none() | st.tuples(SIZES, SIZES),
    stored=st.none() | st.lists(st.tuples(SIZES, SIZES, SIZES), max_size=3),
    device=st.sampled_from(["GPU-0", "cpu", "GPU-0,cpu", "elsewhere"]),
)
def test_regions_sum_to_the_total_and_are_never_negative(
    total: int | None,
    counts: tuple[int | None, int | None, int | None] | None,
    planned: dict[str, int],
    workers: list[tuple[int | None, int | None, int, int, int]],
    disk: tuple[int, int, int | None],
    tier: tuple[int, int] | None,
    stored: list[tuple[int, int, int]] | None,
    device: str,
) -> None:
    figures = None if counts is None else DeviceFigures(*counts)
    processes = [
        worker(device, f"w.{number}", weights_bytes=weights, kv_bytes=kv, kv_blocks_total=blocks, kv_blocks_used=used,
               kv_blocks_cached=cached)
        for number, (weights, kv, blocks, used, cached) in enumerate(workers)
    ]  # fmt: skip
    if tier is not None:
        processes.append(store(*tier))
    if stored is not None:
        held = [
            LayoutFigures("m" if number else "n", "committed", "device", 1, "", 1, *sizes)
            for number, sizes in enumerate(stored)
        ]
        processes.append(gms(*held, device=device))
    found = places(
        snapshot(
            *processes,
            devices=(
                DeviceInfo("GPU-0", "", "cuda", total, planned, figures),
                DeviceInfo("cpu", "", "cpu", total, planned),
            ),
            host=figures,
            disks=(DiskInfo("/", "", *disk),),
        )
    )
    assert [place.kind for place in found] == ["cuda", "host", "disk"]
    for place in found:
        assert all(size >= 0 for size in place.regions.values())
        if place.total is not None:
            assert sum(place.regions.values()) == place.total
