"""Writing the files that a machine is made of."""

from __future__ import annotations

from pathlib import Path

from dynamo_box.doctor.machine import Machine


def write(machine: Machine, files: dict[str, str]) -> None:
    """Texts by paths below the root."""
    for path, text in files.items():
        put(machine, path, text)


def put(machine: Machine, path: str, text: str) -> Path:
    target = machine.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def add_process(
    machine: Machine,
    pid: int,
    name: str,
    *,
    start: int = 100,
    state: str = "S",
    environment: dict[str, str] | None = None,
) -> None:
    """As much of /proc/PID as is read."""
    fields = [state, *["0"] * 18, str(start), *["0"] * 10]
    variables = [f"{key}={value}" for key, value in (environment or {}).items()]
    put(machine, f"proc/{pid}/stat", f"{pid} ({name}) {' '.join(fields)}")
    put(machine, f"proc/{pid}/comm", name + "\n")
    put(machine, f"proc/{pid}/environ", "".join(f"{variable}\0" for variable in variables))
