"""What a box says of GPUs, through a strict fake of NVML."""

from __future__ import annotations

import os

import pynvml
import pytest
from fakes.nvml import FakeGpu, FakeNvml

from dynamo_box.snapshot import DeviceFigures
from dynamo_box.supervisor.gpus import ERRORS_EVERY, GpuReader, attribute, throttles

GIB = 1 << 30
OWN, PARENT, NOBODY = os.getpid(), os.getppid(), 2**22 + 1


def read(nvml: FakeNvml, *devices: str) -> dict[str, DeviceFigures]:
    reader = GpuReader(nvml, devices or ("GPU-a",))
    figures = reader.read({OWN})
    reader.close()
    assert not nvml.open
    assert all(events.freed for events in nvml.event_sets)
    return figures


def test_everything_that_a_gpu_says() -> None:
    gpu = FakeGpu(
        "GPU-a",
        free=70 * GIB,
        utilisation=87,
        power_mw=612_500,
        power_limit_mw=700_000,
        temperature=71,
        clock_reasons=0x004 | 0x008 | 0x040,
        compute={OWN: 6 * GIB, PARENT: 3 * GIB},
        graphics={PARENT: 3 * GIB},
        uncorrected_ecc=2,
        remapped_rows=(5, 1, 1, 0),
    )
    nvml = FakeNvml([gpu])
    assert read(nvml) == {
        "GPU-a": DeviceFigures(
            used_bytes=10 * GIB,
            box_bytes=6 * GIB,
            other_bytes=3 * GIB,
            utilisation=0.87,
            power_w=612.5,
            power_limit_w=700.0,
            temperature_c=71.0,
            throttled=("power cap", "hardware thermal slowdown"),
            errors=("2 uncorrected ECC", "1 remapped rows", "memory repair waits for a GPU reset"),
        )
    }
    assert (nvml.inits, nvml.shutdowns) == (1, 1)


def test_what_cannot_be_read_is_none() -> None:
    silent = FakeGpu("GPU-a", total=None, compute=None, graphics=None, tells_events=False)
    assert read(FakeNvml([silent])) == {"GPU-a": DeviceFigures()}


def test_an_idle_gpu_of_an_older_kind() -> None:
    cause = pynvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
    gpu = FakeGpu("GPU-a", clock_reasons=0x001, retired_pages={cause: [1, 2]}, retirement_pending=0)
    figures = read(FakeNvml([gpu], has_event_reasons=False))["GPU-a"]
    assert (figures.throttled, figures.errors) == ((), ("2 retired pages",))
    assert (figures.box_bytes, figures.other_bytes) == (0, 0)


def test_a_gpu_without_a_uuid_goes_by_its_index() -> None:
    figures = read(FakeNvml([FakeGpu("GPU-a"), FakeGpu(None, temperature=50)]), "index-1")
    assert figures["index-1"].temperature_c == 50.0


def test_a_gpu_that_is_lost_says_so_and_keeps_its_last_xids() -> None:
    gpu = FakeGpu("GPU-a", temperature=60)
    nvml = FakeNvml([gpu, FakeGpu("GPU-b", temperature=40)])
    reader = GpuReader(nvml, ["GPU-a", "GPU-b"])
    assert reader.read(set())["GPU-a"].errors == ()
    gpu.xids.extend([31, 79, 31])
    assert reader.read(set())["GPU-a"].errors == ("Xid 79", "Xid 31")
    gpu.lost = True
    figures = reader.read(set())
    assert figures["GPU-a"] == DeviceFigures(errors=("lost: it has fallen off the bus", "Xid 79", "Xid 31"))
    assert figures["GPU-b"].temperature_c == 40.0
    gpu.lost = False
    assert reader.read(set())["GPU-a"].temperature_c == 60.0
    assert len(nvml.event_sets) == 2


def test_a_gpu_that_has_to_be_reset_says_so() -> None:
    figures = read(FakeNvml([FakeGpu("GPU-a", temperature=60, reset_required=True)]))
    assert figures == {"GPU-a": DeviceFigures(errors=("unusable until it is reset",))}


def test_a_driver_without_the_lists_of_processes_that_pynvml_asks_for() -> None:
    figures = read(FakeNvml([FakeGpu("GPU-a", temperature=60)], lists_processes=False))["GPU-a"]
    assert (figures.temperature_c, figures.box_bytes, figures.other_bytes) == (60.0, None, None)


def test_a_size_that_only_one_list_has_is_known() -> None:
    for compute, graphics in ((5, None), (None, 5)):
        gpu = FakeGpu("GPU-a", compute={OWN: compute}, graphics={OWN: graphics})
        assert read(FakeNvml([gpu]))["GPU-a"].box_bytes == 5


def test_a_gpu_that_is_not_there() -> None:
    assert read(FakeNvml([]))["GPU-a"].errors == ("NVML: Not Found",)


def test_a_driver_that_does_not_start_is_tried_again() -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", temperature=60)], init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    reader = GpuReader(nvml, ["GPU-a"])
    (error,) = reader.read(set())["GPU-a"].errors
    assert error.startswith("NVML: ")
    nvml.init_error = None
    assert reader.read(set())["GPU-a"].temperature_c == 60.0
    assert nvml.inits == 1


def test_a_driver_that_goes_and_comes_back() -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", temperature=60)])
    reader = GpuReader(nvml, ["GPU-a"])
    reader.read(set())
    nvml.open = False
    assert reader.read(set())["GPU-a"].errors == ("NVML: Uninitialized",)
    assert reader.read(set())["GPU-a"].temperature_c == 60.0


def test_errors_are_counted_now_and_then() -> None:
    gpu = FakeGpu("GPU-a", uncorrected_ecc=0)
    reader = GpuReader(FakeNvml([gpu]), ["GPU-a"])
    reader.read(set())
    gpu.uncorrected_ecc = 1
    readings = [reader.read(set())["GPU-a"].errors for _ in range(ERRORS_EVERY)]
    assert readings == [()] * (ERRORS_EVERY - 1) + [("1 uncorrected ECC",)]


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (0x000, ()),
        (0x001 | 0x002 | 0x100, ()),
        (0x008, ("hardware slowdown",)),
        (0x008 | 0x080, ("power brake",)),
        (0x020 | 0x004, ("power cap", "software thermal slowdown")),
    ],
)
def test_throttle_reasons_in_words(reasons: int, words: tuple[str, ...]) -> None:
    assert throttles(reasons) == words


def test_memory_is_attributed_only_where_it_is_known_whose_it_is() -> None:
    assert attribute(None, {OWN}) == (None, None)
    assert attribute({}, {OWN}) == (0, 0)
    assert attribute({OWN: 5, PARENT: 7}, {OWN}) == (5, 7)
    assert attribute({OWN: None, PARENT: 7}, {OWN}) == (None, 7)
    assert attribute({NOBODY: 5, PARENT: 7}, {OWN}) == (None, 7), "a process of another pid namespace"
    assert attribute({NOBODY: 5}, {OWN}) == (None, None)
