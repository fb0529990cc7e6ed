"""The driver's two halves, and the CUDA that torch was built for."""

from __future__ import annotations

import pytest
from fake_machine import put, write

from dynamo_box.doctor import driver
from dynamo_box.doctor.driver import Driver, TorchBuild
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:06:39 2025\nGCC version: gcc\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)  Sun Jul 27\n"


def install_library(machine: Machine, version: str) -> None:
    real = put(machine, f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{version}", "")
    real.with_name("libnvidia-ml.so.1").symlink_to(real.name)


def install_card(machine: Machine, address: str, *, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    at = f"sys/bus/pci/devices/{address}"
    write(machine, {f"{at}/vendor": vendor + "\n", f"{at}/class": kind + "\n"})


def test_a_machine_without_any_of_it_runs_on_the_cpu(machine: Machine) -> None:
    install_card(machine, "0000:00:01.0", vendor="0x8086", kind="0x030000")
    install_card(machine, "0000:00:02.0", kind="0x040300")
    (found,) = driver.check(machine)
    assert (found.status, found.found) == (Status.PASS, "no NVIDIA driver: CPU only")


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ('ID=ubuntu\nVERSION_ID="24.04"\n', "sudo ubuntu-drivers install"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "sudo ubuntu-drivers install"),
        ("ID=debian\n", "sudo apt install nvidia-driver"),
        ("ID=plan9\n", ""),
    ],
)
def test_cards_without_a_driver(machine: Machine, release: str, command: str) -> None:
    install_card(machine, "0000:01:00.0")
    install_card(machine, "0000:02:00.0")
    put(machine, "etc/os-release", release)
    (found,) = driver.check(machine)
    assert found.status is Status.WARN
    assert found.found == "2 NVIDIA cards, but no driver"
    assert found.command == command


@pytest.mark.parametrize("text", [PROPRIETARY, OPEN])
def test_both_halves_are_read(machine: Machine, text: str) -> None:
    put(machine, "proc/driver/nvidia/version", text)
    install_library(machine, "580.65.06")
    assert driver.read_driver(machine) == Driver(0, "580.65.06", "580.65.06")


def test_versions_that_nobody_tells_are_no_mismatch(machine: Machine) -> None:
    put(machine, "proc/driver/nvidia/version", "something else")
    put(machine, "usr/lib/wsl/lib/libnvidia-ml.so.1", "")
    found = driver.read_driver(machine)
    assert found == Driver(0, "?", "?")
    assert driver.judge_driver(found, "").status is Status.PASS


@pytest.mark.parametrize(
    ("found", "status", "words", "command"),
    [
        (Driver(1, "580.1", "580.1"), Status.PASS, "580.1", ""),
        (Driver(1, "575.9", "580.1"), Status.FAIL, "kernel module 575.9, libraries 580.1", "sudo reboot"),
        (Driver(1, None, "580.1"), Status.FAIL, "not loaded", "sudo modprobe nvidia"),
        (Driver(0, None, "580.1"), Status.WARN, "neither kernel module nor card", ""),
        (Driver(1, "580.1", None), Status.FAIL, "no libnvidia-ml.so.1", "sudo apt install nvidia-driver"),
    ],
)
def test_halves_that_do_not_fit(found: Driver, status: Status, words: str, command: str) -> None:
    judged = driver.judge_driver(found, "debian")
    assert judged.status is status
    assert words in judged.found
    assert judged.command == command


def test_what_torch_was_built_for_is_read_from_its_files() -> None:
    assert driver.parse_torch("__version__ = '2.9.0+cu128'\ncuda: Optional[str] = '12.8'\n") == TorchBuild(
        "2.9.0+cu128", (12, 8)
    )
    assert driver.parse_torch("__version__ = '2.9.0+cpu'\ncuda: Optional[str] = None\n") == TorchBuild(
        "2.9.0+cpu", None
    )
    assert driver.parse_torch("nothing of the kind") is None


@pytest.mark.parametrize(
    ("api", "torch", "status"),
    [
        ((13, 0), TorchBuild("2.9.0", (12, 8)), Status.PASS),
        ((12, 8), TorchBuild("2.9.0", (12, 8)), Status.PASS),
        ((12, 4), TorchBuild("2.9.0", (12, 8)), Status.WARN),
        ((12, 8), TorchBuild("2.9.0", (13, 0)), Status.FAIL),
        ((12, 8), TorchBuild("2.9.0+cpu", None), Status.WARN),
        ((12, 8), None, Status.PASS),
        ("libcuda.so.1 can't be loaded", None, Status.FAIL),
    ],
)
def test_torch_against_the_driver(api: driver.Version | str, torch: TorchBuild | None, status: Status) -> None:
    assert driver.judge_cuda(api, "12.8.90", torch, "debian").status is status


def test_a_missing_libcuda_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", refuse)
    assert "libcuda.so.1 can't be loaded" in str(driver.driver_api())
