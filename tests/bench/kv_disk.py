"""What the disk tier costs over the disk itself: bandwidth of blocks written and read by it over files of the same
sizes written and read plainly with O_DIRECT, in turns; how long 100,000 blocks take to be indexed; what one costs in
memory.

    .venv/bin/python tests/bench/kv_disk.py [directory]       # below /tmp without one; 4 GB of space

The plain writer and reader are the same number of threads, each with one `pwrite` or `pread` a file, without checksums.
Nothing is deleted before the end: what a file system does about that later would be counted against what comes next.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dynamo_box.kv.store.disk import DiskTier, ReadResult
from dynamo_box.kv.store.disk_files import file_bytes, file_path
from dynamo_box.kv.store.disk_index import DiskIndex
from dynamo_box.protocol.kv import Block, KvLayout

BLOCK_BYTES = 737_280
"""SmolLM2, 16 tokens, in float32."""
BLOCKS = 512
LOAD = 128
"""A prompt of 2,000 tokens."""
ROUNDS = 5
MANY = 100_000
THREADS = 4

LAYOUT = KvLayout("bench", "f32", 16, BLOCK_BYTES, "")
TINY = KvLayout("bench", "f32", 16, 1, "")


def main() -> None:
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    root = Path(tempfile.mkdtemp(prefix="kv-disk-", dir=given))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: figures count only where that is small")
    try:
        bandwidth(root)
        asyncio.run(indexing(root))
        memory()
    finally:
        shutil.rmtree(root)


def bandwidth(root: Path) -> None:
    slots = memoryview(mmap.mmap(-1, BLOCKS * BLOCK_BYTES))
    for start in range(0, len(slots), 4096):
        slots[start : start + 16] = os.urandom(16)
    views = [slots[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in range(BLOCKS)]
    ratios: dict[str, list[float]] = {"write": [], "replace": [], "read": []}
    for turn in range(ROUNDS):
        if turn % 2:
            tier = asyncio.run(tier_rates(root / f"tier-{turn}", views))
        plain = plain_rates(root / f"plain-{turn}", views)
        if not turn % 2:
            tier = asyncio.run(tier_rates(root / f"tier-{turn}", views))
        for what, ratio in ratios.items():
            ratio.append(tier[what] / plain[what])
            print(f"{what:8} plain {plain[what]:6.0f} MB/s   tier {tier[what]:6.0f} MB/s   {ratio[-1]:.2f}")
    for what, ratio in ratios.items():
        print(f"{what:8} tier over plain, median of {ROUNDS}: {statistics.median(ratio):.2f}")


def plain_rates(root: Path, views: Sequence[memoryview]) -> dict[str, float]:
    root.mkdir()

    def write(number: int) -> None:
        file = os.open(root / str(number), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        os.pwrite(file, views[number], 0)
        os.close(file)

    def read(number: int) -> None:
        file = os.open(root / str(number), os.O_RDONLY | os.O_DIRECT)
        assert os.preadv(file, [views[number]], 0) == BLOCK_BYTES
        os.close(file)

    rates: dict[str, float] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for what, work, count in (("write", write, BLOCKS), ("replace", write, BLOCKS), ("read", read, LOAD)):
            began = time.perf_counter()
            list(pool.map(work, range(count)))
            rates[what] = count * BLOCK_BYTES / (time.perf_counter() - began) / 1e6
    return rates


async def tier_rates(root: Path, views: Sequence[memoryview]) -> dict[str, float]:
    tier = await started(root, BLOCKS * file_bytes(BLOCK_BYTES), LAYOUT)
    rates: dict[str, float] = {}
    for what in ("write", "replace"):
        digests = [os.urandom(16) for _ in views]
        began = time.perf_counter()
        written = []
        for digest, view in zip(digests, views, strict=True):
            done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            assert not tier.write(LAYOUT.name, Block(digest), view, done.set_result)
            written.append(done)
        assert all(await asyncio.gather(*written))
        rates[what] = BLOCKS * BLOCK_BYTES / (time.perf_counter() - began) / 1e6
    result: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
    began = time.perf_counter()
    assert tier.read(LAYOUT.name, list(zip(digests, views, strict=True))[:LOAD], result.set_result)
    assert all((await result).good)
    rates["read"] = LOAD * BLOCK_BYTES / (time.perf_counter() - began) / 1e6
    await tier.close(1.0)
    return rates


async def indexing(root: Path) -> None:
    path = root / "many"
    tier = await started(path, 1 << 40, TINY)
    await tier.close(1.0)
    for shelf in range(256):
        (path / TINY.name / f"{shelf:02x}").mkdir()
    for number in range(MANY):
        digest = number.to_bytes(4, "little").ljust(16, b"\1")
        file = os.open(path / file_path(TINY.name, digest, None), os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(file, file_bytes(1))
        os.close(file)
    for kind in ("cold", "warm"):
        if kind == "cold":
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("2\n")
        gaps, began, cpu = [0.0], time.perf_counter(), time.process_time()
        tier = make(path, 1 << 40)
        tier.attach(TINY)
        tier.start()
        turn = time.perf_counter()
        while tier.indexed_in_s is None:
            await asyncio.sleep(0.001)
            turn, before = time.perf_counter(), turn
            gaps.append(turn - before - 0.001)
        print(
            f"index of {tier.blocks(TINY.name):,} blocks, {kind}: {tier.indexed_in_s:.2f} s,"
            f" {time.process_time() - cpu:.2f} s of CPU; the loop was held up {max(gaps) * 1e3:.1f} ms at most"
        )
        await tier.close(1.0)
    began, cpu = time.perf_counter(), time.process_time()
    for shelf in range(256):
        with os.scandir(path / TINY.name / f"{shelf:02x}") as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"listing names, sizes and times alone, warm: {wall:.2f} s, {cpu:.2f} s of CPU")


def memory() -> None:
    digests = [os.urandom(16) for _ in range(MANY)]
    tracemalloc.start()
    index = DiskIndex()
    for number, digest in enumerate(digests):
        index.add_old(TINY.name, bytes(bytearray(digest)), None, 8192, time.time_ns() + number)
    print(f"memory a block of metadata: {tracemalloc.get_traced_memory()[0] / MANY:.0f} bytes, found on disk")
    tracemalloc.stop()


def make(path: Path, capacity: int) -> DiskTier:
    return DiskTier(
        path,
        capacity,
        threads=THREADS,
        changed=lambda _: None,
        note=print,
        owner="bench",
        write_queue_blocks=BLOCKS,
    )


async def started(path: Path, capacity: int, layout: KvLayout) -> DiskTier:
    tier = make(path, capacity)
    tier.attach(layout)
    tier.start()
    while tier.figures().state != "on" or tier.indexing:
        await asyncio.sleep(0.001)
    return tier


if __name__ == "__main__":
    main()
