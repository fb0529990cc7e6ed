"""Lingering, for who has a box as a service."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import put

from dynamo_box.doctor import service
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine, user_name
from dynamo_box.paths import RunDir
from dynamo_box.service.unit import MARKER


def test_a_unit_of_a_box_needs_lingering(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert service.check(machine) == []
    units = tmp_path / "systemd/user"
    units.mkdir(parents=True)
    (units / "other.service").write_text("[Unit]\n")
    (units / "broken.service").symlink_to("nowhere")
    assert service.check(machine) == []
    (units / "box.service").write_text(f"{MARKER}\n[Unit]\n")
    (found,) = service.check(machine)
    assert found.status is Status.WARN
    assert found.command == f"loginctl enable-linger {user_name(os.getuid())}"
    put(machine, f"var/lib/systemd/linger/{user_name(os.getuid())}", "")
    assert service.check(machine)[0].status is Status.PASS


def test_a_run_dir_that_goes_with_the_session_is_warned_of(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    short_lived = replace(machine, run=RunDir(Path(f"/run/user/{os.getuid()}/dynbox")))
    (found,) = service.check(short_lived)
    assert (found.name, found.status) == ("session", Status.WARN)
    assert found.command == f"loginctl enable-linger {user_name(os.getuid())}"
    put(machine, f"var/lib/systemd/linger/{user_name(os.getuid())}", "")
    assert service.check(short_lived) == []
