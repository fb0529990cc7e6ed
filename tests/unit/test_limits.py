"""How much memory and time the machine, or a cgroup of ours, has in use: from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

from dynamo_box.limits import Cgroups, MemoryUse, memory_use

GIB = 1 << 30
MEMINFO = "MemTotal: 8388608 kB\nMemFree: 12 kB\nMemAvailable: 6291456 kB\nAnonPages: 1048576 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def use(root: Path) -> MemoryUse:
    return memory_use(Cgroups(root), root)


def test_without_a_limit_it_is_the_machine(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/box\n"})
    assert use(root) == MemoryUse(total=8 * GIB, available=6 * GIB, used=2 * GIB, anonymous=1 * GIB)
    assert (Cgroups(root).cpu_quota(), Cgroups(root).cpu_used_s()) == (None, None)


def test_the_page_cache_of_a_cgroup_is_not_in_use(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/slice"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/slice/box\n",
            f"{group}/memory.max": f"{4 * GIB}\n",
            f"{group}/memory.current": f"{3 * GIB}\n",
            f"{group}/memory.stat": f"anon {GIB // 2}\ninactive_file {GIB}\nactive_file {GIB}\n",
            f"{group}/box/memory.max": "max\n",
            f"{group}/box/cpu.max": "200000 100000\n",
            f"{group}/box/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
        },
    )
    assert use(root) == MemoryUse(total=4 * GIB, available=2 * GIB, used=1 * GIB, anonymous=GIB // 2)
    assert (Cgroups(root).cpu_quota(), Cgroups(root).cpu_used_s()) == (2.0, 2.5)


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/\n3:cpu,cpuacct:/\n",
            f"{memory}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{memory}/memory.usage_in_bytes": f"{2 * GIB}\n",
            f"{memory}/memory.stat": f"total_rss {GIB}\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 4}\n",
            f"{cpu}/cpu.cfs_quota_us": "50000\n",
            f"{cpu}/cpu.cfs_period_us": "100000\n",
            f"{cpu}/cpuacct.usage": "1500000000\n",
        },
    )
    assert use(root) == MemoryUse(total=4 * GIB, available=5 * GIB // 2, used=5 * GIB // 4, anonymous=GIB)
    assert (Cgroups(root).cpu_quota(), Cgroups(root).cpu_used_s()) == (0.5, 1.5)


def test_a_limit_above_the_machine_limits_nothing(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/box"
    files = {f"{group}/memory.max": f"{64 * GIB}\n", f"{group}/memory.current": "1000\n"}
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/box\n", **files})
    assert use(root) == MemoryUse(total=8 * GIB, available=6 * GIB, used=2 * GIB, anonymous=1 * GIB)


def test_nothing_readable(tmp_path: Path) -> None:
    assert use(tmp_path) == MemoryUse()
