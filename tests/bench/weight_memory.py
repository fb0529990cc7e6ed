"""What weight memory costs by itself: mapping a layout, moving it between device, host and disk, and what crosses the
socket for it.

    python tests/bench/weight_memory.py [--rounds 5] [--tensors 400] [--directory DIR] [--json]

The layout has the shapes of SmolLM2-135M in float32 (538 MB). A real service runs under this process, which plays its
supervisor and its engines. Each move is held against the plain thing in the same round: a memcpy of as many bytes into
fresh memory, and reading the same files into a buffer, with the page cache dropped and warm. Medians; best in
brackets. `--directory` is where snapshots go: a disk, not a tmpfs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import TypeVar

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "process" / "gms")]

from gms_peers import MIB, Service  # noqa: E402

from dynamo_box.gms.client import TensorSpec, Weights  # noqa: E402
from dynamo_box.gms.client.weights import Opened  # noqa: E402

LAYOUT = "m"
GIB = 1024 * MIB
READ_BYTES = 4 * MIB
TIMEOUT_S = 120.0

T = TypeVar("T")
Figures = dict[str, list[float]]


def smollm2() -> list[TensorSpec]:
    """Its tensors, as a Hugging Face directory names and shapes them."""
    hidden, inner, kv, vocabulary, layers = 576, 1536, 192, 49152, 30
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    return [float32(name, shape) for name, shape in shapes.items()]


def synthetic(count: int) -> list[TensorSpec]:
    return [float32(f"tensor.{number}", (512, 512)) for number in range(count)]


def float32(name: str, shape: tuple[int, ...]) -> TensorSpec:
    items = 1
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, items)
        items *= size
    return TensorSpec(name, "float32", shape, tuple(strides), items * 4)


def fill(views: Mapping[str, memoryview]) -> None:
    """Bytes of no pattern that a page could share."""
    noise = os.urandom(MIB)
    for view in views.values():
        for start in range(0, len(view), MIB):
            part = view[start : start + MIB]
            part[:] = noise[: len(part)]


def while_serving(service: Service, work: Callable[[], T]) -> T:
    """Run `work` in a thread while this one answers for the supervisor."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work)
        while not running.done():
            service.pump(0.001)
        return running.result()


def opened(service: Service, weights: Weights, specs: Sequence[TensorSpec]) -> Opened:
    return while_serving(service, lambda: weights.open(lambda: specs, fill, timeout_s=TIMEOUT_S))


def moved(service: Service, place: str, figures: Figures, name: str) -> None:
    """Seconds of a move, from the command to the answer, and of its phases."""
    began = time.perf_counter()
    answer = service.move(place, LAYOUT)  # type: ignore[arg-type]
    figures.setdefault(name, []).append(time.perf_counter() - began)
    if answer.error:
        raise SystemExit(f"{name}: {answer.error}")
    for phase, seconds in answer.phases.items():
        figures.setdefault(f"{name}: {phase}", []).append(seconds)


def remapped(weights: Weights, figures: Figures, name: str) -> None:
    for phase, seconds in weights.remap(timeout_s=TIMEOUT_S).items():
        figures.setdefault(f"{name}: {phase}", []).append(seconds)


class Source:
    """Bytes to copy plainly, there and in the page table already."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(-1, size)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        noise = os.urandom(MIB)
        for start in range(0, size, MIB):
            self._memory[start : start + MIB] = noise[: min(MIB, size - start)]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def copy(self, figures: Figures, name: str) -> None:
        began = time.perf_counter()
        with mmap.mmap(-1, self.size) as fresh:
            place = ctypes.c_char.from_buffer(fresh)
            ctypes.memmove(ctypes.addressof(place), self._address, self.size)
            del place
            figures.setdefault(name, []).append(time.perf_counter() - began)


def read(files: Sequence[Path], figures: Figures, name: str) -> None:
    """All of them, into one buffer, again and again: what reading alone takes."""
    buffer = bytearray(READ_BYTES)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while file.readinto(buffer):
                continue
    figures.setdefault(name, []).append(time.perf_counter() - began)


def drop(files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(directory: Path, rounds: int) -> tuple[int, Figures]:
    """The moves and maps of one layout; its bytes."""
    specs = smollm2()
    figures: Figures = {}
    unused: Figures = {}
    service = Service(directory, capacity_bytes=2 * GIB, host_capacity_bytes=2 * GIB)
    writer = Weights(service.path, LAYOUT, owner="first", content="bench")
    reader = Weights(service.path, LAYOUT, owner="second", content="bench")
    try:
        for weights, name in ((writer, "first opens"), (reader, "second opens")):
            for phase, seconds in opened(service, weights, specs).phases.items():
                figures[f"{name}: {phase}"] = [seconds]
        size = writer.bytes
        writer.unmap()
        for _ in range(rounds):
            reader.unmap()
            remapped(reader, figures, "from device")
        source = Source(size)
        for _ in range(rounds):
            reader.unmap()
            source.copy(figures, "plain copy")
            moved(service, "host", figures, "device to host")
            moved(service, "device", figures, "host to device")
            remapped(reader, figures, "from host")
        reader.unmap()
        moved(service, "disk", figures, "device to disk")
        shards = sorted(service.snapshots.glob("*/shard-*"))
        for _ in range(rounds):
            drop(shards)
            read(shards, figures, "plain read, cold")
            drop(shards)
            moved(service, "device", figures, "disk to device, cold")
            remapped(reader, figures, "from disk")
            reader.unmap()
            moved(service, "disk", figures, "device to disk, again")
            read(shards, unused, "into the page cache")
            read(shards, figures, "plain read, warm")
            moved(service, "device", figures, "disk to device, warm")
            moved(service, "disk", unused, "device to disk")
    finally:
        writer.close()
        reader.close()
        service.close()
    return size, figures


def traffic(directory: Path, tensors: int) -> dict[str, Opened]:
    """What a layout of many tensors takes on the socket."""
    specs = synthetic(tensors)
    service = Service(directory, capacity_bytes=2 * GIB, host_capacity_bytes=2 * GIB)
    found: dict[str, Opened] = {}
    try:
        for name in ("first", "second"):
            weights = Weights(service.path, LAYOUT, owner=name, content="bench")
            found[name] = opened(service, weights, specs)
            weights.close()
    finally:
        service.close()
    return found


def ratio(figures: Figures, one: str, other: str) -> float:
    """Median of the ratios within a round: a busy machine is busy for both."""
    return median(a / b for a, b in zip(figures[one], figures[other], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        (root / "moves").mkdir()
        (root / "traffic").mkdir()
        size, figures = measure(root / "moves", options.rounds)
        counted = traffic(root / "traffic", options.tensors)
    ratios = {
        "device to host / plain copy": ratio(figures, "device to host", "plain copy"),
        "host to device / plain copy": ratio(figures, "host to device", "plain copy"),
        "disk to device / plain read, cold": ratio(figures, "disk to device, cold", "plain read, cold"),
        "disk to device / plain read, warm": ratio(figures, "disk to device, warm", "plain read, warm"),
    }
    if options.json:
        counts = {
            who: {"round_trips": one.round_trips, "sent": one.bytes_sent, "received": one.bytes_received}
            for who, one in counted.items()
        }
        print(json.dumps({"bytes": size, "seconds": figures, "ratios": ratios, "traffic": counts}, indent=2))
        return
    print(f"layout of {size} bytes, {options.rounds} rounds; ms: median (best), and GiB/s of what moves all of it")
    for name, seconds in figures.items():
        whole = ":" not in name
        speed = f"{size / median(seconds) / GIB:8.2f} GiB/s" if whole else ""
        print(f"  {name:32} {median(seconds) * 1000:9.2f} ({min(seconds) * 1000:.2f}){speed:>16}")
    for name, value in ratios.items():
        print(f"  {name:36} {value:5.2f}")
    for who, one in counted.items():
        print(
            f"  {options.tensors} tensors, {who} process: {one.round_trips} round trips, {one.bytes_sent} bytes sent, "
            f"{one.bytes_received} received"
        )


if __name__ == "__main__":
    main()
