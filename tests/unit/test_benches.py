"""Benches are run by hand, so that nobody would notice if one could no longer start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))
LOADS_ALL = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"


@pytest.mark.slow
def test_each_finds_what_it_imports(tmp_path: Path) -> None:
    assert BENCHES
    command = [sys.executable, "-W", "error", "-c", LOADS_ALL, *map(str, BENCHES)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
