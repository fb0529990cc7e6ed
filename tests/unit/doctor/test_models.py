"""Models: the sizes of their files always, their checksums with `--deep`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_box.doctor import models
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine
from dynamo_box.profile.pull import pull
from dynamo_box.profile.store import ModelStore, StoredModel


def ignore(*_: object) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def stored(machine: Machine, tiny_model: Path) -> StoredModel:
    return pull(str(tiny_model), ModelStore(machine.home.models), name="tiny", progress=ignore)


def rewrite(path: Path, content: bytes) -> None:
    """A file of its own: the store's are hard links."""
    path.unlink()
    path.write_bytes(content)


def test_an_empty_store(machine: Machine) -> None:
    (found,) = models.check_files(machine)
    assert found.status is Status.SKIP
    assert models.check_checksums(machine, progress=ignore)[0].status is Status.SKIP


def test_a_whole_model(machine: Machine, stored: StoredModel) -> None:
    (found,) = models.check_files(machine)
    assert (found.status, found.name) == (Status.PASS, "models")
    assert found.found.endswith(": tiny")


def test_a_truncated_file_is_found_with_the_pull_that_replaces_it(
    machine: Machine, stored: StoredModel, tiny_model: Path
) -> None:
    weights = stored.path / "model.safetensors"
    rewrite(weights, weights.read_bytes()[:-1])
    (found,) = models.check_files(machine)
    assert (found.name, found.status) == ("model tiny", Status.FAIL)
    assert "model.safetensors has" in found.found
    assert found.command == f"dynbox pull {tiny_model} --name tiny"
    assert models.check_checksums(machine, progress=ignore)[0].status is Status.SKIP, "it is known to be broken"


def test_a_model_that_nobody_knows_the_origin_of_can_be_removed(machine: Machine) -> None:
    (machine.home.models / "half").mkdir(parents=True)
    (found,) = models.check_files(machine)
    assert found.command == "dynbox models rm half"
    (machine.home.models / "half/dynbox.json").write_bytes(b"\xff{")
    assert models.check_files(machine)[0].command == "dynbox models rm half"


def test_a_changed_byte_is_found_only_by_its_checksum(machine: Machine, stored: StoredModel, tiny_model: Path) -> None:
    weights = stored.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    rewrite(weights, bytes(content))
    assert models.check_files(machine)[0].status is Status.PASS
    seen: list[tuple[str, int, int]] = []
    (found,) = models.check_checksums(machine, progress=lambda *step: seen.append(step))
    assert found.status is Status.FAIL
    assert found.found.startswith("model.safetensors has SHA-256 ")
    assert found.command == f"dynbox models rm tiny && dynbox pull {tiny_model} --name tiny"
    assert seen[-1] == ("tiny", stored.bytes, stored.bytes)


def test_sound_checksums(machine: Machine, stored: StoredModel) -> None:
    (found,) = models.check_checksums(machine, progress=ignore)
    assert found.status is Status.PASS
    assert found.found.startswith(f"{len(stored.files)} files, ")


def test_a_file_that_vanishes_meanwhile_is_a_failure(machine: Machine, stored: StoredModel) -> None:
    def vanish(*_: object) -> None:
        (stored.path / stored.files[-1].name).unlink(missing_ok=True)

    (found,) = models.check_checksums(machine, progress=vanish)
    assert found.status is Status.FAIL
    assert "can't be read" in found.found
