"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class BoxDirectories:
    run: Path
    home: Path


@pytest.fixture
def box_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoxDirectories]:
    """A run dir and a home of this test's own, in the environment that its processes inherit."""
    directories = BoxDirectories(run=tmp_path / "run", home=tmp_path / "home")
    monkeypatch.setenv("DYNBOX_RUN_DIR", str(directories.run))
    monkeypatch.setenv("DYNBOX_HOME", str(directories.home))
    yield directories


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in float64, as a Hugging Face directory with tokenizer and chat template."""
    from fakes.tiny_model import make_tiny_llama

    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(path, seed=0, dtype="float64")
    return path
