"""What the shell may offer while a word is being typed: profile, model, process and topic names.

Each of these runs at every press of Tab. They read names where names lie (a directory, a socket) and never fail: a
completion that prints an error destroys the line that is being edited.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from dynamo_box.errors import BoxError
from dynamo_box.paths import home, logs_dir, run_dir


def verb(**options: Any) -> typer.Typer:
    """The application of one verb, without anything that costs start time."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )


def _quietly(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        try:
            return [name for name in names() if name.startswith(incomplete)]
        except (BoxError, OSError):
            return []

    return complete


def _profiles() -> list[str]:
    from dynamo_box.profile.directories import profile_names

    return profile_names()


def _profiles_and_files(incomplete: str) -> list[str]:
    if "/" in incomplete or incomplete.startswith("."):
        directory, _, start = incomplete.rpartition("/")
        return sorted(
            f"{directory}/{entry.name}{'/' if entry.is_dir() else ''}"
            for entry in Path(directory or "/").iterdir()
            if entry.name.startswith(start) and (entry.is_dir() or entry.suffix in (".yaml", ".yml"))
        )
    return [name for name in _profiles() if name.startswith(incomplete)]


def profiles(incomplete: str) -> list[str]:
    """Shipped and own profiles; files, once a path is being typed."""
    try:
        return _profiles_and_files(incomplete)
    except (BoxError, OSError):
        return []


def _stored_models() -> list[str]:
    return sorted(name for name in os.listdir(home().models) if not name.startswith("."))


def _served_models() -> list[str]:
    from dynamo_box.control.client import ControlClient

    with ControlClient.connect(run_dir(), timeout_s=1.0) as client:
        return [model.name for model in client.snapshot(timeout_s=1.0).models]


def _live_processes(kind: str = "") -> list[str]:
    from dynamo_box.control.client import ControlClient

    with ControlClient.connect(run_dir(), timeout_s=1.0) as client:
        processes = client.snapshot(timeout_s=1.0).processes
    return [process.name for process in processes if kind in ("", process.kind)]


def _logged_processes() -> list[str]:
    from dynamo_box.control.logs import processes_with_logs

    return processes_with_logs(logs_dir(run_dir(), home()))


def _topics() -> list[str]:
    from dynamo_box.cli.manual import topics

    return topics()


stored_models = _quietly(_stored_models)
served_models = _quietly(_served_models)
live_processes = _quietly(_live_processes)
live_workers = _quietly(lambda: _live_processes("worker"))
logged_processes = _quietly(_logged_processes)
topics = _quietly(_topics)


def shells(incomplete: str) -> list[str]:
    return [shell for shell in ("bash", "zsh", "fish") if shell.startswith(incomplete)]


def disagg_policies(incomplete: str) -> list[str]:
    return [policy for policy in ("strict", "fallback", "conditional") if policy.startswith(incomplete)]


def simulated(incomplete: str) -> list[str]:
    return [text for text in ("gpu=8x80GiB", "gpu=4x141GiB", "gpu=2x24GiB") if text.startswith(incomplete)]
