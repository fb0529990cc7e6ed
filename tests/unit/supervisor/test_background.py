"""Readings off the loop: one at a time, and none that can hold anything up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.nvml import FakeGpu, FakeNvml

from dynamo_box.plan.types import DevicePlan
from dynamo_box.supervisor import background
from dynamo_box.supervisor.background import Background
from dynamo_box.supervisor.devices import SILENT_DRIVER, DeviceSampler

DEADLINE_S = 60.0
GPU = DevicePlan("GPU-a", "NVIDIA Fake 80GB", "cuda", 80 << 30, 80 << 30)
CPU = DevicePlan("cpu", "the cpu", "cpu", 1 << 30, 1 << 30)
SIMULATED = DevicePlan("SIM-00", "NVIDIA Fake 80GB", "simulated", 80 << 30, 80 << 30)


class Changes:
    """Wait on the loop until something holds after a reading."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.errors: list[str] = []

    def note(self) -> None:
        self._event.set()

    def fail(self, name: str, error: Exception) -> None:
        self.errors.append(f"{name}: {error}")
        self._event.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._event.clear()
                await self._event.wait()


def test_a_reading_is_there_once_it_was_asked_for() -> None:
    async def run() -> None:
        changes = Changes()
        threads = []

        def read() -> int:
            threads.append(threading.current_thread())
            return len(threads)

        readings = Background("numbers", read, changed=changes.note, failed=changes.fail)
        assert readings.latest is None
        readings.ask()
        await changes.until(lambda: readings.latest == 1)
        readings.ask()
        await changes.until(lambda: readings.latest == 2)
        await readings.close()
        assert len(set(threads)) == 1
        assert threading.current_thread() not in threads

    asyncio.run(run())


def test_one_that_hangs_is_not_asked_again_and_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "STALLED_S", -1.0)
    monkeypatch.setattr(background, "CLOSE_S", 0.01)
    released, calls = threading.Event(), []

    def read() -> int:
        calls.append(1)
        released.wait()
        return len(calls)

    async def run() -> None:
        changes = Changes()
        readings = Background("driver", read, changed=changes.note, failed=changes.fail)
        readings.ask()
        assert readings.is_stalled
        for _ in range(5):
            readings.ask()
        released.set()
        await changes.until(lambda: readings.latest is not None)
        assert (readings.latest, readings.is_stalled) == (1, False)
        released.clear()
        readings.ask()
        await readings.close()

    try:
        asyncio.run(run())
    finally:
        released.set()


def test_a_reading_that_raises_is_told_and_the_next_may_do_better() -> None:
    async def run() -> None:
        changes, answers = Changes(), [3, 0, 1]
        readings = Background("odd", lambda: 1 // answers.pop(), changed=changes.note, failed=changes.fail)
        readings.ask()
        await changes.until(lambda: readings.latest == 1)
        readings.ask()
        await changes.until(lambda: changes.errors)
        assert readings.latest is None
        assert changes.errors[0].startswith("odd: ")
        readings.ask()
        await changes.until(lambda: readings.latest == 0)
        await readings.close()

    asyncio.run(run())


def sampler(changes: Changes, devices: list[DevicePlan], tmp_path: Path, load_nvml: Callable[[], Any]) -> DeviceSampler:
    return DeviceSampler(
        devices,
        {"models": tmp_path},
        changed=changes.note,
        emit=lambda level, text: changes.errors.append(f"{level} {text}"),
        load_nvml=load_nvml,
    )


def test_devices_have_the_figures_that_they_can_have(tmp_path: Path) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", temperature=61)])

    async def run() -> None:
        changes = Changes()
        sampled = sampler(changes, [CPU, GPU, SIMULATED], tmp_path, lambda: nvml)
        assert (sampled.figures("GPU-a"), sampled.figures("cpu"), sampled.host, sampled.disks) == (None, None, None, ())
        sampled.tick()
        await changes.until(lambda: sampled.figures("GPU-a") and sampled.host and sampled.disks)
        gpu, cpu = sampled.figures("GPU-a"), sampled.figures("cpu")
        assert gpu is not None and gpu.temperature_c == 61.0
        assert cpu is not None and cpu.box_bytes
        assert sampled.figures("SIM-00") is None
        await sampled.close()

    asyncio.run(run())
    assert (nvml.inits, nvml.shutdowns) == (1, 1)


def test_without_a_gpu_nobody_looks_for_a_driver(tmp_path: Path) -> None:
    def load() -> Any:
        raise AssertionError("NVML was loaded")

    async def run() -> None:
        changes = Changes()
        sampled = sampler(changes, [CPU, SIMULATED], tmp_path, load)
        sampled.tick()
        await changes.until(lambda: sampled.host and sampled.disks)
        await sampled.close()
        assert changes.errors == []

    asyncio.run(run())


def test_a_driver_that_hangs_leaves_everything_else_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_S", 0.01)
    nvml = FakeNvml([FakeGpu("GPU-a", temperature=61)])
    nvml.answers.clear()

    async def run() -> None:
        changes = Changes()
        sampled = sampler(changes, [CPU, GPU], tmp_path, lambda: nvml)
        sampled.tick()
        await changes.until(lambda: sampled.host and sampled.disks)
        monkeypatch.setattr(background, "STALLED_S", -1.0)
        assert sampled.figures("GPU-a") == SILENT_DRIVER
        monkeypatch.setattr(background, "STALLED_S", 60.0)
        await sampled.close()

    try:
        asyncio.run(run())
    finally:
        nvml.answers.set()


def test_a_driver_package_that_is_broken_is_said_once(tmp_path: Path) -> None:
    tries = []

    def load() -> Any:
        tries.append(1)
        raise ImportError("no NVML here")

    async def run() -> None:
        changes = Changes()
        sampled = sampler(changes, [GPU], tmp_path, load)
        async with asyncio.timeout(DEADLINE_S):
            while len(tries) < 3:
                sampled.tick()
                await asyncio.sleep(0.001)
        await sampled.close()
        assert changes.errors == ["warning the figures of GPUs can't be read: ImportError: no NVML here"]
        assert sampled.figures("GPU-a") is None

    asyncio.run(run())
