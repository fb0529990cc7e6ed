"""Put right what is ours, and nothing else: `dynbox doctor --fix`.

Each step takes the lock of what it mends, so that a live box and a pull that runs are left alone, and removes only what
belongs to this user. Settings of the system are never touched; the report has the commands for them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dynamo_box import wording
from dynamo_box.control.launch import is_held, sweep
from dynamo_box.doctor import leftovers
from dynamo_box.doctor.finding import Finding
from dynamo_box.doctor.machine import Machine, is_ours
from dynamo_box.errors import BoxError
from dynamo_box.profile.store import ModelStore

MENDED_AREAS = ("box", "leftovers")
"""Areas of findings that mending may change: a leftover process may have held the port."""


@dataclass
class Mended:
    """What was done and what was left alone, in words; `left` says why."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def mend(machine: Machine, findings: Iterable[Finding]) -> Mended:
    """Mend those findings that are fixable. Works on the run dir that the environment names."""
    mended = Mended()
    steps = dict.fromkeys(_STEPS[finding.name] for finding in findings if finding.fixable)
    for step in steps:
        try:
            step(machine, mended)
        except BoxError as error:
            mended.left.append(error.what)
    return mended


def _sweep(machine: Machine, mended: Mended) -> None:
    """Processes, sockets and instance files of dead boxes of this run dir."""
    run = machine.run
    if is_held(run):
        mended.left.append(f"{run.root}: a box holds it")
        return
    before = set(leftovers.stale_files(run))
    holder = leftovers.lock_holder(run)
    swept = sweep()
    if swept.killed:
        mended.done.append(f"ended {swept.killed} processes of a dead box (pids {', '.join(map(str, swept.pids))})")
    if swept.survivors:
        mended.left.append(f"these processes can't be killed: {', '.join(map(str, swept.survivors))}")
    if removed := before - set(leftovers.stale_files(run)):
        mended.done.append(f"removed {len(removed)} sockets and instance files in {run.root}")
    if holder is not None and leftovers.lock_holder(run) is None:
        mended.done.append(f"cleared the lock of supervisor {holder.pid}, which is dead")


def _remove_partials(machine: Machine, mended: Mended) -> None:
    store = ModelStore(machine.home.models)
    for partial in leftovers.read_partials(store):
        name = leftovers.partial_name(partial.path)
        if name is None:
            mended.left.append(f"{partial.path}: no pull makes such a name")
            continue
        try:
            with store.lock(name, wait=False) as dead:
                if dead:
                    _remove(partial.path, mended)
                else:
                    mended.left.append(f"{partial.path}: that pull is running")
        except BoxError as error:
            mended.left.append(f"{partial.path}: {error.what}")


def _remove_snapshots(machine: Machine, mended: Mended) -> None:
    """Asks again who lives: a box may have started since the report."""
    for dead in leftovers.read_dead_snapshots(machine):
        _remove(dead.path, mended)


def _remove(path: Path, mended: Mended) -> None:
    if not is_ours(path):
        mended.left.append(f"{path}: it belongs to another user")
        return
    size = leftovers.bytes_below(path)
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        mended.left.append(f"{path}: {error.strerror}")
    else:
        mended.done.append(f"removed {path} ({wording.size(size)})")


_STEPS: dict[str, Callable[[Machine, Mended], None]] = {
    leftovers.RUN_DIR: _sweep,
    leftovers.PROCESSES: _sweep,
    leftovers.PULLS: _remove_partials,
    leftovers.SNAPSHOTS: _remove_snapshots,
}
