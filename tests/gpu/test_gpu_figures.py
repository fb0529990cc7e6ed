"""What the box says of a real GPU, held against what this test does on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from box_under_test import Box, eventually

from dynamo_box.doctor import gpus as doctor_gpus
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine
from dynamo_box.gms.vmm import CudaVmm
from dynamo_box.hardware import detect
from dynamo_box.paths import Home, RunDir
from dynamo_box.supervisor.gpus import GpuReader

pytestmark = pytest.mark.gpu

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def reader(nvml: Any, device: str) -> Iterator[GpuReader]:
    one = GpuReader(nvml, [device])
    yield one
    one.close()


def test_what_is_detected(nvml: Any, device: str) -> None:
    found = detect()
    assert found.gpu_problem == ""
    gpu = next(each for each in found.gpus if each.uuid == device)
    handle = nvml.nvmlDeviceGetHandleByUUID(device)
    assert gpu.name == nvml.nvmlDeviceGetName(handle)
    assert gpu.memory_total == nvml.nvmlDeviceGetMemoryInfo(handle).total
    assert found.driver == nvml.nvmlSystemGetDriverVersion()


def test_every_figure_is_there(reader: GpuReader, device: str) -> None:
    figures = reader.read(frozenset())[device]
    unknown = {name for name in figures.__struct_fields__ if getattr(figures, name) is None}
    assert unknown == set()
    assert 0 < (figures.power_w or 0) <= (figures.power_limit_w or 0) * 1.2
    assert 0 < (figures.temperature_c or 0) < 110


def test_memory_is_the_boxs_or_somebody_elses(
    reader: GpuReader, device: str, vmm: CudaVmm, start: Callable[..., Any]
) -> None:
    fd = vmm.create(GIB, "weights")
    process = start(fd, GIB)
    ours = reader.read({process.pid})[device]
    others = reader.read(frozenset())[device]
    assert (ours.box_bytes or 0) > 100 * MIB, "its context"
    assert (others.other_bytes or 0) - (ours.other_bytes or 0) == ours.box_bytes
    assert (ours.used_bytes or 0) >= (ours.box_bytes or 0) + GIB, "shared memory is in use and in nobody's list"
    process.kill()
    os.close(fd)


def test_a_fault_on_the_gpu_is_told(reader: GpuReader, device: str, vmm: CudaVmm, start: Callable[..., Any]) -> None:
    reader.read(frozenset())  # from now on it hears of errors
    fd = vmm.create(GIB, "weights")
    assert start(fd, GIB).tell("poke nowhere") == "CUDA_ERROR_ILLEGAL_ADDRESS"
    os.close(fd)
    eventually(lambda: "Xid 31" in reader.read(frozenset())[device].errors, "the Xid is told")


def test_doctor_finds_nothing_wrong_with_it(nvml: Any, vmm: CudaVmm, start: Callable[..., Any], tmp_path: Path) -> None:
    machine = Machine(RunDir(tmp_path), Home(*[tmp_path] * 4))
    found = {finding.name: finding for finding in doctor_gpus.check_with(nvml, machine)}
    assert {name for name, finding in found.items() if finding.status is Status.FAIL} == set()
    fd = vmm.create(GIB, "weights")
    process = start(fd, GIB)
    users = next(each for each in doctor_gpus.check_with(nvml, machine) if each.name == "gpu users")
    assert (users.status, str(process.pid) in users.found) == (Status.WARN, True), users
    os.close(fd)


PROFILE = """
model:
  name: tiny
  source: {source}
  engine: mock
  block_size: 16
  workers: {{aggregated: {{replicas: 1, devices: 1}}}}
  options: {{decode_ms: 2, prefill_tokens_per_s: 100000, kv_blocks: 1024}}
"""


def test_a_box_on_it(tmp_path: Path, tiny_model: Path, device: str) -> None:
    profile = tmp_path / "tiny.yaml"
    profile.write_text(PROFILE.format(source=tiny_model))
    (tmp_path / "home").mkdir()
    box = Box(tmp_path / "run", tmp_path / "home")
    try:
        box.up(str(profile))
        shown = eventually(
            lambda: next((each for each in box.ps()["devices"] if each["id"] == device and each["figures"]), None),
            "its figures are in the snapshot",
        )
        assert (shown["kind"], shown["figures"]["errors"]) == ("cuda", [])
        worker = box.process("tiny.aggregated.0")
        assert worker["device"] == device
        environment = Path(f"/proc/{worker['pid']}/environ").read_bytes().split(b"\0")
        assert f"CUDA_VISIBLE_DEVICES={device}".encode() in environment
        assert shown["name"] in box.dynbox("top", "--once", "--size", "160x40").stdout
    finally:
        box.destroy()


def test_the_command_line_of_the_driver_agrees(device: str) -> None:
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    totals = dict(line.split(", ") for line in listed.splitlines())
    done = subprocess.run(
        [sys.executable, "-m", "dynamo_box", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    findings = {each["name"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["driver"]["status"] == findings["cuda"]["status"] == findings["nvml"]["status"] == "pass"
    gpu = next(each for each in detect().gpus if each.uuid == device)
    assert int(totals[device]) == (gpu.memory_total or 0) // MIB
