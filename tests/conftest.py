"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# A suite that was started in the background ignores SIGINT, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run beside each other: a thread of torch that spins while it waits takes the core that another one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# Four thousand tests and all that they import are no garbage: looking for some in them takes a sixth of the time of
# tests that compute, and what a test leaves is found the later for it.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


STORE_VARIABLE = "DYNBOX_TEST_STORE"
PULL_DEADLINE_S = 600


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


@pytest.fixture(scope="session")
def smollm2_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `DYNBOX_HOME` whose store holds the embedded model, pulled with the real command, once for all test processes.

    `DYNBOX_TEST_STORE` names a home to use instead, so that a developer's second run need not pull again.
    """
    kept = os.environ.get(STORE_VARIABLE)
    home = Path(kept) if kept else shared_directory(tmp_path_factory) / "smollm2-home"
    pulled = home / "models" / "smollm2" / "dynbox.json"
    if pulled.exists():
        return home
    home.mkdir(parents=True, exist_ok=True)
    with (home / "test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not pulled.exists():
            subprocess.run(
                [sys.executable, "-m", "dynamo_box", "pull", "smollm2"],
                env={**os.environ, "DYNBOX_HOME": str(home)},
                check=True,
                timeout=PULL_DEADLINE_S,
            )
    return home


def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of this run that all its test processes see: each has its own below it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def smollm2_path(smollm2_home: Path) -> Path:
    """SmolLM2-135M-Instruct in float32, as a Hugging Face directory."""
    return smollm2_home / "models" / "smollm2"
