"""What a worker imports inside an engine's environment needs msgspec and the standard library only."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import venv
from pathlib import Path

import pytest
from worker_process import WorkerProcess, worker_spec

import engines

MODULES = [
    "dynamo_box.protocol.control",
    "dynamo_box.protocol.figures",
    "dynamo_box.protocol.framing",
    "dynamo_box.protocol.request",
    "dynamo_box.protocol.route",
    "dynamo_box.protocol.spec",
    "dynamo_box.protocol.status",
    "dynamo_box.discovery.instances",
    "dynamo_box.gms.client",
    "dynamo_box.kv.client.tiers",
    "dynamo_box.kv.hashing",
    "dynamo_box.kv.offload",
    "dynamo_box.kv.onboard",
    "dynamo_box.paths",
    "engines.contract",
    "engines.host",
    "engines.mock.engine",
]


@pytest.fixture(scope="module")
def lean_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees this checkout and msgspec."""
    root = tmp_path_factory.mktemp("lean")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    spec = importlib.util.find_spec("msgspec")
    assert spec is not None
    assert spec.origin is not None
    assert engines.__file__ is not None
    visible = root / "visible"
    visible.mkdir()
    (visible / "msgspec").symlink_to(Path(spec.origin).parent)
    for package in ("dynamo_box", "engines"):
        (visible / package).symlink_to(Path(engines.__file__).parents[1] / package)
    (site_packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "visible.pth").write_text(f"{visible}\n")
    return root / "venv" / "bin" / "python"


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def test_everything_a_worker_needs_can_be_imported(lean_python: Path, tmp_path: Path) -> None:
    code = "import sys; [__import__(name) for name in sys.argv[1:]]; print('uvloop' in sys.modules)"
    done = subprocess.run(
        [lean_python, "-W", "error", "-c", code, *MODULES],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_a_worker_serves_there(lean_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(key)
    monkeypatch.setattr("sys.executable", str(lean_python))
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    process = WorkerProcess(run_dir, worker_spec(run_dir))
    try:
        with process.ready().peer() as peer:
            assert len(peer.run([1, 2, 3])[0]) == 8
    finally:
        process.end()
