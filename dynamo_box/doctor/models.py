"""The models in the store: every file of the size that its manifest says, and with `--deep` of its checksum."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from dynamo_box import wording
from dynamo_box.doctor.finding import Finding, failed, passed, skipped
from dynamo_box.doctor.machine import Machine
from dynamo_box.profile.store import MANIFEST, BrokenModel, ModelStore, StoredModel

FILES, CHECKSUMS = "models", "checksums"
READ_BYTES = 4 << 20

Progress = Callable[[str, int, int], None]
"""The model's name, bytes read, bytes in all."""


class WrongFile(NamedTuple):
    model: StoredModel
    file: str
    problem: str


class _Origin(msgspec.Struct, frozen=True):
    """What can be read of a manifest when the rest of it can't."""

    source: str


def check_files(machine: Machine) -> list[Finding]:
    return judge_files(ModelStore(machine.home.models).list(), machine.home.models)


def judge_files(entries: Sequence[StoredModel | BrokenModel], root: Path) -> list[Finding]:
    """One finding for those that are whole, and one for each that isn't."""
    whole = [entry for entry in entries if isinstance(entry, StoredModel)]
    broken = [entry for entry in entries if isinstance(entry, BrokenModel)]
    findings = []
    if whole:
        total = wording.size(sum(model.bytes for model in whole))
        findings.append(passed(FILES, f"{len(whole)} whole, {total}: {', '.join(model.name for model in whole)}"))
    elif not broken:
        findings.append(skipped(FILES, f"none in {root}"))
    for model in broken:
        why = "it is not served; a pull was cut short, or the disk lost something"
        findings.append(failed(f"model {model.name}", model.reason, why, _again(model.name, _source(model.path))))
    return findings


def check_checksums(machine: Machine, *, progress: Progress) -> list[Finding]:
    """Reads every byte of every whole model; `progress` is called after each piece."""
    models = [entry for entry in ModelStore(machine.home.models).list() if isinstance(entry, StoredModel)]
    if not models:
        return [skipped(CHECKSUMS, "no whole model in the store")]
    return judge_checksums(models, [wrong for model in models for wrong in _wrong_files(model, progress)])


def judge_checksums(models: Sequence[StoredModel], wrong: Sequence[WrongFile]) -> list[Finding]:
    if not wrong:
        total = wording.size(sum(model.bytes for model in models))
        return [
            passed(CHECKSUMS, f"{sum(len(model.files) for model in models)} files, {total}, all as they were pulled")
        ]
    return [
        failed(
            f"model {model.name}",
            f"{file} {problem}",
            "answers of a damaged model are wrong without a sign of it",
            f"dynbox models rm {model.name} && {_again(model.name, model.source)}",
        )
        for model, file, problem in wrong
    ]


def _wrong_files(model: StoredModel, progress: Progress) -> list[WrongFile]:
    wrong = []
    done = 0
    for file in model.files:
        digest = hashlib.sha256()
        try:
            with (model.path / file.name).open("rb") as stream:
                while piece := stream.read(READ_BYTES):
                    digest.update(piece)
                    done += len(piece)
                    progress(model.name, done, model.bytes)
        except OSError as error:
            wrong.append(WrongFile(model, file.name, f"can't be read: {error.strerror}"))
            continue
        if digest.hexdigest() != file.sha256:
            wrong.append(WrongFile(model, file.name, f"has SHA-256 {digest.hexdigest()}, not {file.sha256}"))
    return wrong


def _source(path: Path) -> str | None:
    try:
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Origin).source
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _again(name: str, source: str | None) -> str:
    """A pull puts a whole model in the place of a broken one."""
    if source is None:
        return f"dynbox models rm {name}"
    return f"dynbox pull {shlex.quote(source.removeprefix('path:'))} --name {name}"
