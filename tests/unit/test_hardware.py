"""What the box believes of a machine: GPUs through a strict fake of NVML, cores and memory from files as
Linux writes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pynvml
import pytest
from fakes.nvml import FakeGpu, FakeNvml

from dynamo_box.hardware import CpuDevice, SimulatedGpus, detect, detect_cpu, read_gpus, simulate

GIB = 1 << 30
BUS = ("00000000:07:00.0", "00000000:0A:00.0")


def test_two_linked_gpus() -> None:
    nvml = FakeNvml(
        [
            FakeGpu("GPU-a", bus=BUS[0], links=(BUS[1], BUS[1], None)),
            FakeGpu("GPU-b", name=b"NVIDIA B\0junk", free=5 * GIB, bus=BUS[1], links=(BUS[0].lower(),)),
        ]
    )
    (a, b), driver, problem = read_gpus(nvml)
    assert (a.uuid, a.index, a.name, a.memory_total, a.memory_free) == (
        "GPU-a",
        0,
        "NVIDIA Fake 80GB",
        80 * GIB,
        79 * GIB,
    )
    assert (b.name, b.memory_free, b.links, a.links) == ("NVIDIA B", 5 * GIB, ("GPU-a",), ("GPU-b",))
    assert (driver, problem) == ("580.65.06", "")
    assert nvml.shutdowns == 1


SWITCHES = ("00000000:C0:00.0", "00000000:C1:00.0")


def test_links_to_a_switch_name_no_gpu() -> None:
    (gpu,), _, _ = read_gpus(FakeNvml([FakeGpu("GPU-a", bus=BUS[0], links=SWITCHES[:1], switches=SWITCHES)]))
    assert gpu.links == ()


def test_gpus_on_switches_reach_one_another() -> None:
    gpus = [FakeGpu(f"GPU-{name}", links=(*SWITCHES, None), switches=SWITCHES) for name in "abc"]
    found, _, _ = read_gpus(FakeNvml([*gpus, FakeGpu("GPU-d", links=(None,)), FakeGpu("GPU-e")]))
    assert [gpu.links for gpu in found] == [
        ("GPU-b", "GPU-c"), ("GPU-a", "GPU-c"), ("GPU-a", "GPU-b"), (), None,
    ]  # fmt: skip


def test_whatever_cannot_be_read_is_none() -> None:
    (gpu,), driver, problem = read_gpus(FakeNvml([FakeGpu(None, name=None, total=None)], driver=None))
    assert (gpu.uuid, gpu.name, gpu.memory_total, gpu.memory_free) == ("index-0", None, None, None)
    assert (gpu.links, gpu.numa, driver, problem) == (None, None, None, "")


def test_a_lost_gpu_leaves_the_others() -> None:
    gpus, _, problem = read_gpus(FakeNvml([FakeGpu("GPU-a", lost=True), FakeGpu("GPU-b")]))
    assert [(gpu.uuid, gpu.index) for gpu in gpus] == [("GPU-b", 1)]
    assert problem == "NVML can't open GPU 0"


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_nvml_that_does_not_start_is_a_reason(error: int) -> None:
    gpus, driver, problem = read_gpus(FakeNvml([FakeGpu("GPU-a")], init_error=error))
    assert (gpus, driver) == ((), None)
    assert problem.startswith("NVML: ")


def test_nvml_that_cannot_count_is_shut_down_again() -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")], count_error=pynvml.NVML_ERROR_NO_PERMISSION)
    assert read_gpus(nvml) == ((), "580.65.06", "NVML can't count the GPUs")
    assert nvml.shutdowns == 1


def test_an_old_driver_package_without_links() -> None:
    class Old:
        NVMLError = pynvml.NVMLError

        def __getattr__(self, name: str) -> object:
            if "NvLink" in name or "NVLINK" in name:
                raise AttributeError(name)
            return getattr(FAKE, name)

    FAKE = FakeNvml([FakeGpu("GPU-a")])
    (gpu,), _, problem = read_gpus(Old())
    assert (gpu.links, problem) == (None, "")


def test_detection_never_fails_and_knows_this_process() -> None:
    hardware = detect()
    assert hardware.cpu.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert hardware.cpu.memory_total is not None and hardware.cpu.memory_available is not None
    assert 0 < hardware.cpu.memory_available <= hardware.cpu.memory_total


def machine(root: Path, files: dict[str, str]) -> CpuDevice:
    for name, text in {"proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return detect_cpu(root)


def test_without_limits_the_machine_counts(tmp_path: Path) -> None:
    cpu = machine(tmp_path, {"proc/cpuinfo": "processor: 0\nmodel name : Some CPU\nflags : sse\n"})
    assert (cpu.name, cpu.memory_total, cpu.memory_available, cpu.quota) == (
        "Some CPU",
        8 * GIB,
        6 * GIB,
        None,
    )


def test_cgroup_v2_limits_and_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    cpu = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/box\n",
            "sys/fs/cgroup/slice/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/slice/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/slice/memory.stat": f"anon 1\ninactive_file {1 * GIB}\n",
            "sys/fs/cgroup/slice/box/memory.max": "max\n",
            "sys/fs/cgroup/slice/box/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/slice/cpu.max": "max 100000\n",
        },
    )
    assert (cpu.memory_total, cpu.memory_available, cpu.quota) == (4 * GIB, 2 * GIB, 1.5)


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    cpu = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (cpu.memory_total, cpu.memory_available, cpu.quota, cpu.parallel) == (
        2 * GIB,
        3 * GIB // 2,
        0.5,
        1,
    )


def test_cgroup_v1_without_limits(tmp_path: Path) -> None:
    cpu = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (cpu.memory_total, cpu.quota) == (8 * GIB, None)


def test_unreadable_files_leave_gaps(tmp_path: Path) -> None:
    cpu = machine(tmp_path, {"proc/meminfo": "garbage\n", "proc/self/cgroup": "nonsense\n0::/../../etc\n"})
    assert (cpu.name, cpu.memory_total, cpu.memory_available, cpu.quota) == (None, None, None, None)


def test_simulated_hardware_is_the_same_every_time() -> None:
    groups = (SimulatedGpus("A", 2, GIB), SimulatedGpus("B", 1, 2 * GIB))
    first, second = simulate(groups, CpuDevice()), simulate(groups, CpuDevice())
    assert first == second
    assert [(gpu.uuid, gpu.name, gpu.memory_total) for gpu in first.gpus] == [
        ("SIM-00", "A", GIB),
        ("SIM-01", "A", GIB),
        ("SIM-02", "B", 2 * GIB),
    ]
