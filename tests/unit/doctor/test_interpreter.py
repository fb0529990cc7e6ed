"""Python and its packages."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dynamo_box.doctor import interpreter
from dynamo_box.doctor.finding import Status
from dynamo_box.doctor.machine import Machine

NEEDED = [Requirement("msgspec>=0.19"), Requirement("typer>=0.15"), Requirement("uvloop>=0.21")]


def test_the_python_that_runs_these_tests(machine: Machine) -> None:
    python, packages, native = interpreter.check(machine)
    assert (python.name, python.status) == ("python", Status.PASS)
    assert sys.prefix in python.found
    assert (packages.name, native.name) == ("packages", "native engine")
    assert packages.status in (Status.PASS, Status.SKIP), packages
    assert native.status is Status.PASS


def test_a_python_that_is_too_old_or_whose_base_is_gone(tmp_path: Path) -> None:
    assert interpreter.judge_python("3.10.2", ">=3.11", "/venv", None).status is Status.FAIL
    assert interpreter.judge_python("3.14.0rc1", ">=3.11", "/venv", None).status is Status.PASS
    gone = interpreter.judge_python("3.11.7", ">=3.11", "/my venv", tmp_path / "gone")
    assert gone.status is Status.FAIL
    assert gone.command == "python3 -m venv --upgrade '/my venv'"
    assert interpreter.judge_python("3.11.7", ">=3.11", "/venv", tmp_path).status is Status.PASS


def test_the_base_of_an_environment(tmp_path: Path) -> None:
    configuration = tmp_path / "pyvenv.cfg"
    assert interpreter.base_interpreter(configuration) is None
    configuration.write_text("nonsense\nhome = /usr/bin\nversion = 3.11\n")
    assert interpreter.base_interpreter(configuration) == Path("/usr/bin")
    configuration.write_text("nonsense")
    assert interpreter.base_interpreter(configuration) is None


def test_missing_and_old_packages_are_named() -> None:
    problems = interpreter.judge_versions(NEEDED, {"msgspec": "0.18.1", "typer": None, "uvloop": "0.22.0rc1"})
    assert problems == ["msgspec is 0.18.1, not >=0.19", "typer is missing"]


def test_imports_that_fail_or_end_python_are_named() -> None:
    assert interpreter.judge_imports(["a", "b"], "a ok\nb ok\n", 0) == []
    assert interpreter.judge_imports(["a", "b"], "a ImportError: no libssl\nb ok\n", 0) == ["a: ImportError: no libssl"]
    assert interpreter.judge_imports(["a", "b", "c"], "a ok\nb ", -11) == [
        "b: importing it ended Python with status -11"
    ]


def test_an_installation_that_is_not_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", unknown)
    (found,) = interpreter.check(machine)
    assert found.status is Status.FAIL
    assert "pip install -e" in found.command


def test_a_package_that_is_missing_is_not_imported(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("uvloop", "torch"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, packages, native = interpreter.check(machine)
    assert (packages.status, packages.found) == (Status.FAIL, "uvloop is missing")
    assert "'uvloop>=" in packages.command
    assert (native.status, native.found) == (Status.WARN, "torch is missing")
