"""The NVIDIA driver, its two halves and the CUDA that they carry, as files and libraries tell of them.

The kernel module and the user libraries come in separate packages; after an upgrade without a reboot they differ, and
then every CUDA program fails. What torch was built with is read from its files: importing it takes seconds.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from dynamo_box.doctor.finding import Finding, failed, passed, warned
from dynamo_box.doctor.interpreter import PIP
from dynamo_box.doctor.machine import NVIDIA_MODULE, Machine

LIBRARIES = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/wsl/lib",
    "usr/local/nvidia/lib64",
)
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"

_INSTALL = {
    "ubuntu": "sudo ubuntu-drivers install",
    "debian": "sudo apt install nvidia-driver",
    "fedora": "sudo dnf install akmod-nvidia",
}
_TORCH = "torch"
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")

Version = tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """`cards` are the NVIDIA display devices on the PCI bus; versions are None where that half is missing, and
    `library` is "?" where its file doesn't say.
    """

    cards: int
    module: str | None
    library: str | None


@dataclass(frozen=True)
class TorchBuild:
    """`cuda` is None for a build without it."""

    version: str
    cuda: Version | None


def check(machine: Machine) -> list[Finding]:
    driver = read_driver(machine)
    findings = [judge_driver(driver, distribution(machine))]
    if driver.module is not None and driver.library is not None:
        findings.append(judge_cuda(driver_api(), runtime_version(), read_torch(), distribution(machine)))
    return findings


def read_driver(machine: Machine) -> Driver:
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", machine.text(NVIDIA_MODULE) or "")
    module = match[1] if match else "?" if machine.has_nvidia_driver else None
    return Driver(_cards(machine), module, _library_version(machine))


def judge_driver(driver: Driver, distribution: str) -> Finding:
    install = _INSTALL.get(distribution, "")
    match driver:
        case Driver(cards=0, module=None, library=None):
            return passed("driver", "no NVIDIA driver: CPU only")
        case Driver(module=None, library=None):
            noun = "card" if driver.cards == 1 else "cards"
            return warned(
                "driver", f"{driver.cards} NVIDIA {noun}, but no driver", "the box runs on the CPU only", install
            )
        case Driver(module=None, cards=0):
            return warned(
                "driver",
                f"libraries {driver.library}, but neither kernel module nor card",
                "the box runs on the CPU only",
            )
        case Driver(module=None):
            return failed(
                "driver",
                f"libraries {driver.library}, but the kernel module is not loaded",
                "no program can reach a GPU",
                "sudo modprobe nvidia",
            )
        case Driver(library=None):
            return failed(
                "driver",
                f"kernel module {driver.module}, but no libnvidia-ml.so.1",
                "no program can reach a GPU; a container needs the NVIDIA runtime",
                install,
            )
    if "?" not in (driver.module, driver.library) and driver.module != driver.library:
        return failed(
            "driver",
            f"kernel module {driver.module}, libraries {driver.library}",
            "they must be the same; it was upgraded under the running system",
            "sudo reboot",
        )
    return passed("driver", f"{driver.module}, kernel module and libraries")


def judge_cuda(api: Version | str, runtime: str | None, torch: TorchBuild | None, distribution: str) -> Finding:
    """`api` is what the driver can do, or why it doesn't say."""
    install = _INSTALL.get(distribution, "")
    if isinstance(api, str):
        return failed("cuda", api, "no program can use a GPU", install)
    known = f"driver {_dotted(api)}" + (f", runtime {runtime}" if runtime else "")
    if torch is None:
        return passed("cuda", f"{known}; torch is not installed")
    if torch.cuda is None:
        return warned(
            "cuda",
            f"{known}; torch {torch.version} is a build without CUDA",
            "the native engine uses no GPU",
            f"{PIP} install --force-reinstall torch",
        )
    known += f", torch {torch.version} for {_dotted(torch.cuda)}"
    if torch.cuda[0] > api[0]:
        return failed("cuda", known, "torch needs a newer driver", install)
    if torch.cuda > api:
        return warned("cuda", known, "kernels that are compiled when they are first used fail", install)
    return passed("cuda", known)


def driver_api() -> Version | str:
    """The newest CUDA that the driver knows. Starts nothing on a GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"libcuda.so.1 can't be loaded: {error}"
    version = ctypes.c_int()
    status = library.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return f"cuDriverGetVersion failed with {status}"
    return version.value // 1000, version.value % 1000 // 10


def read_torch() -> TorchBuild | None:
    spec = importlib.util.find_spec(_TORCH)
    if spec is None or spec.origin is None:
        return None
    try:
        return parse_torch(Path(spec.origin).with_name("version.py").read_text())
    except OSError:
        return None


def parse_torch(text: str) -> TorchBuild | None:
    """From torch's own version.py."""
    version = re.search(r"^__version__\s*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*?=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    if version is None:
        return None
    return TorchBuild(version[1], (int(cuda[1]), int(cuda[2])) if cuda else None)


def runtime_version() -> str | None:
    """Of the CUDA runtime that torch's packages bring along."""
    for name in _RUNTIMES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def distribution(machine: Machine) -> str:
    """`ID` of os-release, or the first of those that it says it is like."""
    settings = dict(line.partition("=")[::2] for line in machine.lines("etc/os-release"))
    names = [*settings.get("ID", "").split(), *settings.get("ID_LIKE", "").strip('"').split()]
    return next((name.strip('"') for name in names if name.strip('"') in _INSTALL), "")


def _cards(machine: Machine) -> int:
    count = 0
    for device in (machine.root / "sys/bus/pci/devices").glob("*"):
        at = f"sys/bus/pci/devices/{device.name}"
        vendor, kind = machine.text(f"{at}/vendor") or "", machine.text(f"{at}/class") or ""
        count += vendor.strip() == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS)
    return count


def _library_version(machine: Machine) -> str | None:
    """The link leads to a file that has the version at its end."""
    for directory in LIBRARIES:
        path = machine.root / directory / "libnvidia-ml.so.1"
        if path.exists():
            match = re.search(r"\.so\.(\d+\.[\d.]+)$", path.resolve().name)
            return match[1] if match else "?"
    return None


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
