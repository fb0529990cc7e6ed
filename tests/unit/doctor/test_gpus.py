"""GPUs, as NVML shows them."""

from __future__ import annotations

from dataclasses import fields

import pynvml
import pytest
from doctor_nvml import DoctorGpu, DoctorNvml
from fake_machine import add_process, put

from dynamo_box.doctor import gpus
from dynamo_box.doctor.finding import Finding, Status
from dynamo_box.doctor.machine import Machine

GIB = 1 << 30


def look(machine: Machine, nvml: DoctorNvml) -> dict[str, Finding]:
    found = {finding.name: finding for finding in gpus.check_with(nvml, machine)}
    assert not nvml.open, "NVML is closed again"
    return found


def two(**changes: object) -> list[DoctorGpu]:
    """Linked by NVLink; `changes` are of the second."""
    first = DoctorGpu("GPU-a", bus="0000:01:00.0", links=("0000:02:00.0",), free=80 * GIB)
    second = DoctorGpu("GPU-b", bus="0000:02:00.0", links=("0000:01:00.0",), free=80 * GIB)
    for name, value in changes.items():
        assert name in {each.name for each in fields(DoctorGpu)}
        setattr(second, name, value)
    return [first, second]


def test_every_function_that_is_asked_is_one_of_pynvml() -> None:
    asked = {name for name in dir(DoctorNvml) if name.startswith("nvml")}
    assert asked <= set(dir(pynvml))
    assert pynvml.NVML_P2P_STATUS_OK == 0


def test_without_a_driver_nothing_is_said(machine: Machine) -> None:
    assert gpus.check(machine) == []


def test_two_sound_gpus(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two()))
    assert {finding.status for finding in found.values()} == {Status.PASS}
    assert found["nvml"].found == "2 × NVIDIA Fake 80GB"
    assert found["links"].found == "NVLink joins 1 of 1 pairs"
    assert found["gpu users"].found == "nobody but the box"


def test_a_gpu_has_no_links_to_speak_of(machine: Machine) -> None:
    found = look(machine, DoctorNvml([DoctorGpu("GPU-a", free=80 * GIB)]))
    assert set(found) == {"nvml", "modes", "gpu users"}


def test_a_driver_that_says_next_to_nothing_is_no_crash(machine: Machine) -> None:
    silent = two(mig=None, compute_mode=None, lanes=None, lanes_possible=None, users=None, links=None, bus=None)
    found = look(machine, DoctorNvml(silent, ancestor=None))
    assert {finding.status for finding in found.values()} == {Status.PASS}
    assert look(machine, DoctorNvml([DoctorGpu(None, users=None)]))["gpu users"].status is Status.SKIP


def test_a_driver_that_is_older_than_pynvml_is_no_crash(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two(), lists_processes=False))
    assert (found["links"].status, found["gpu users"].status) == (Status.PASS, Status.SKIP)


def test_a_driver_that_was_upgraded_under_the_system(machine: Machine) -> None:
    (found,) = gpus.check_with(DoctorNvml([], init_error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), machine)
    assert found.status is Status.FAIL
    assert "version mismatch" in found.found.lower()
    assert found.command == "sudo reboot"


def test_a_gpu_that_fell_off_the_bus(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two(lost=True)))["nvml"]
    assert found.status is Status.FAIL
    assert "can't open GPU 1" in found.found
    assert "it shows NVIDIA Fake 80GB" in found.found


def test_modes_that_keep_processes_from_sharing(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two(mig=(1, 1), compute_mode=pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)))
    assert found["mig"].found == "GPU 1 is split into MIG instances"
    assert found["mig"].command == "sudo nvidia-smi -i 1 -mig 0"
    assert found["compute mode"].status is Status.FAIL
    assert found["compute mode"].command == "sudo nvidia-smi -i 1 -c DEFAULT"


def test_a_card_with_half_its_lanes(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two(lanes=8)))["pcie"]
    assert (found.status, found.found) == (Status.WARN, "GPU 1 ×8 of ×16")


def test_gpus_that_can_not_read_one_another(machine: Machine) -> None:
    gpus = two(links=None)
    gpus[0].links = None
    gpus[0].blocked_peers = ("GPU-b",)
    found = look(machine, DoctorNvml(gpus, ancestor=30))["links"]
    assert found.status is Status.WARN
    assert found.found == "no NVLink; pairs meet at one host bridge (1); no peer access between 0-1"


def test_who_else_holds_memory_is_named(machine: Machine) -> None:
    add_process(machine, 50, "train.py")
    add_process(machine, 1, "init", start=5)
    add_process(machine, 60, "python", environment={"DYNBOX_RUN_ID": "0123456789ab.1.5"})
    gpus = two(users={50: 10 * GIB, 60: 20 * GIB, 77: 1 * GIB}, free=48 * GIB)
    gpus[0].graphics = {50: 2 * GIB}
    gpus[0].free = 78 * GIB
    found = look(machine, DoctorNvml(gpus))["gpu users"]
    assert found.status is Status.WARN
    assert "train.py (pid 50) on GPU 0,1, 12.0 GiB" in found.found
    assert "? (pid 77) on GPU 1, 1.0 GiB" in found.found
    assert "pid 60" not in found.found, "a box's own"
    assert found.command == "kill 50", "77 is the pid of something else here, or will be"


def test_memory_that_nobody_is_seen_to_hold(machine: Machine) -> None:
    found = look(machine, DoctorNvml(two(free=60 * GIB)))["gpu users"]
    assert found.found == "20.0 GiB on GPU 1 of processes not seen from here"
    assert found.command == ""


def test_sizes_that_the_driver_does_not_tell(machine: Machine) -> None:
    add_process(machine, 50, "train.py")
    found = look(machine, DoctorNvml(two(users={50: None}, free=10 * GIB)))["gpu users"]
    assert found.found == "train.py (pid 50) on GPU 1, -"
    assert found.command == "kill 50"


def test_many_users_are_counted(machine: Machine) -> None:
    gpus = two(users=dict.fromkeys(range(1000, 1010), GIB), free=70 * GIB)
    assert "6 more" in look(machine, DoctorNvml(gpus))["gpu users"].found


@pytest.mark.parametrize("path", ["proc/driver/nvidia/version"])
def test_with_a_driver_the_real_package_is_asked(machine: Machine, path: str) -> None:
    put(machine, path, "")
    found = gpus.check(machine)
    assert found[0].name == "nvml"
