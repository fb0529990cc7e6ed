"""What a supervisor must not pay for at its start."""

from __future__ import annotations

import subprocess
import sys


def test_the_supervisor_imports_nothing_heavy() -> None:
    code = "import sys, dynamo_box.supervisor.launch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "pydantic",
        "typer",
        "structlog",
        "psutil",
        "rich",
        "http",
        "torch",
        "starlette",
        "platformdirs",
    }


def test_the_guard_needs_the_standard_library_only() -> None:
    code = "import sys; sys.argv = ['guard']; import runpy; runpy.run_path(sys.orig_argv[-1], run_name='guard')"
    from dynamo_box.supervisor import guard

    subprocess.run([sys.executable, "-I", "-S", "-c", code, guard.__file__], timeout=60, check=True)
