"""A machine made of files: /proc, /sys, /dev and the libraries lie below a directory of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dynamo_box.doctor.machine import Machine
from dynamo_box.paths import Home, RunDir

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    home = tmp_path / "home"
    return Machine(
        RunDir(tmp_path / "run"),
        Home(models=home / "models", logs=home / "logs", state=home / "state", cache=home / "cache"),
        tmp_path / "root",
    )
