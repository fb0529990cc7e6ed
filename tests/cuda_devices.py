"""The driver and the UUID of its first GPU: made up or, for `-m gpu`, of this machine."""

from __future__ import annotations

import os
import uuid
from typing import Any

import pytest
from fakes.cuda_driver import UUID, FakeCudaDriver

DRIVERS = ["simulated", pytest.param("real", marks=pytest.mark.gpu)]


def driver_of(kind: str) -> tuple[Any, str]:
    if kind == "simulated":
        return FakeCudaDriver(), f"GPU-{uuid.UUID(bytes=UUID)}"
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    if not os.path.exists("/dev/nvidiactl"):
        pytest.skip("no NVIDIA GPU")
    done(driver.cuInit(0))
    identity = done(driver.cuDeviceGetUuid(done(driver.cuDeviceGet(0))))
    return driver, f"GPU-{uuid.UUID(bytes=bytes(identity.bytes))}"


def done(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    assert status.name == "CUDA_SUCCESS", status
    return values[0] if values else None
