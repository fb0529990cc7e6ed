"""Tests on a real GPU: `pytest -m gpu`. Each takes at most 5 GiB of its memory, and leaves its settings alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_devices import driver_of

from dynamo_box.gms.vmm import CudaVmm

PROCESS = Path(__file__).with_name("gpu_process.py")


@pytest.fixture(scope="session")
def device() -> str:
    return driver_of("real")[1]


@pytest.fixture
def vmm(device: str) -> Iterator[CudaVmm]:
    """It makes memory and passes it on, without a context."""
    made = CudaVmm(driver_of("real")[0], device)
    yield made
    made.close()


class GpuProcess:
    """See gpu_process.py."""

    def __init__(self, device: str, fd: int, size: int, *, writable: bool = False) -> None:
        arguments = [device, str(fd), str(size), "writable" if writable else "readonly"]
        self._process = subprocess.Popen(
            [sys.executable, str(PROCESS), *arguments],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "mapped"

    @property
    def pid(self) -> int:
        return self._process.pid

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start(device: str) -> Iterator[Callable[..., GpuProcess]]:
    started: list[GpuProcess] = []

    def one(fd: int, size: int, *, writable: bool = False) -> GpuProcess:
        started.append(GpuProcess(device, fd, size, writable=writable))
        return started[-1]

    yield one
    for process in started:
        process.kill()


@pytest.fixture
def nvml(device: str) -> Iterator[Any]:
    import pynvml

    pynvml.nvmlInit()
    yield pynvml
    pynvml.nvmlShutdown()


@pytest.fixture
def used_bytes(nvml: Any, device: str) -> Callable[[], int]:
    """Of the whole GPU, as the driver counts."""
    handle = nvml.nvmlDeviceGetHandleByUUID(device)

    def read() -> int:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    assert os.path.exists("/dev/nvidiactl")
    return read
