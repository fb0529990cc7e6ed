"""What dead boxes and interrupted pulls left: in the run dir, among the processes, in the store, in the logs."""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynamo_box import wording
from dynamo_box.control.launch import is_held
from dynamo_box.doctor import processes
from dynamo_box.doctor.finding import Finding, failed, fixable, passed, skipped, warned
from dynamo_box.doctor.machine import Machine, user_name
from dynamo_box.doctor.processes import BoxProcess
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.profile.store import NAME, PARTIAL_PREFIX, ModelStore

RUN_DIR, PROCESSES, PULLS, SNAPSHOTS, LOGS = "run dir", "processes", "pulls", "snapshots", "old logs"

OLD_S = 30 * 86400.0
OLD_LOGS_BYTES = 256 << 20
"""Logs of other run dirs may lie around; only so many that nobody has written to for so long are worth a word."""

_KEY = re.compile(r"[0-9a-f]{12}")
_LISTED = 5


class LockHolder(msgspec.Struct, frozen=True):
    """What a supervisor writes into the lock of its run dir, and empties when it ends as it should."""

    pid: int
    profile: str


@dataclass(frozen=True)
class Partial:
    """What is left of a pull, or is still being made by one that runs; None where that can't be told."""

    path: Path
    bytes: int
    is_running: bool | None


@dataclass(frozen=True)
class Snapshots:
    """Weights that slept on disk in the box of one run dir, which is dead."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class LogDirectory:
    path: Path
    bytes: int
    written: float


def check_run_dir(machine: Machine) -> list[Finding]:
    run = machine.run
    try:
        info = run.root.lstat()
    except FileNotFoundError:
        return [passed(RUN_DIR, f"{run.root} is made when a box starts")]
    except OSError as error:
        return [_no_run_dir(f"{run.root}: {error.strerror}")]
    if not stat.S_ISDIR(info.st_mode):
        return [_no_run_dir(f"{run.root} is no directory, but a {'link' if stat.S_ISLNK(info.st_mode) else 'file'}")]
    if info.st_uid != os.getuid():
        return [_no_run_dir(f"{run.root} belongs to {user_name(info.st_uid)}")]
    return [judge_run_dir(run.root, lock_holder(run), stale_files(run), is_held=is_held(run))]


def _no_run_dir(found: str) -> Finding:
    why = "`dynbox up` takes only a directory that nobody else controls"
    return failed(RUN_DIR, found, why, "export DYNBOX_RUN_DIR=$HOME/.dynbox-run")


def judge_run_dir(root: Path, holder: LockHolder | None, files: Sequence[Path], *, is_held: bool) -> Finding:
    """`files` are sockets and instance files, which a live box needs and a dead one leaves."""
    if is_held:
        who = f"profile {holder.profile}, supervisor pid {holder.pid}" if holder else "a box that is just starting"
        return passed(RUN_DIR, f"{root}, held by {who}")
    if not files and holder is None:
        return passed(RUN_DIR, f"{root}, clean")
    who = f"a dead box (profile {holder.profile}, supervisor pid {holder.pid})" if holder else "a dead box"
    noun = "file" if len(files) == 1 else "files"
    found = f"{who} left {len(files)} {noun} in {root}"
    return fixable(RUN_DIR, found, "programs that find these sockets wait for nobody; the next `up` clears them too")


def check_processes(machine: Machine) -> list[Finding]:
    return [judge_processes(processes.box_processes(machine), machine.run.key)]


def judge_processes(found: Iterable[BoxProcess], key: str) -> Finding:
    """Those of dead boxes; `key` is that of this run dir, and what has another key is not this box's to end."""
    orphans = [process for process in found if not process.box_alive]
    why = "they hold memory and devices"
    if ours := [orphan for orphan in orphans if orphan.key == key]:
        return fixable(PROCESSES, f"a dead box left {_listed(ours)}", why)
    if not orphans:
        return passed(PROCESSES, "none of a dead box")
    directory = next((orphan.run_dir for orphan in orphans if orphan.run_dir), None)
    command = f"DYNBOX_RUN_DIR={shlex.quote(directory)} dynbox down" if directory else ""
    return warned(PROCESSES, f"a dead box of another run dir left {_listed(orphans)}", why, command)


def check_pulls(machine: Machine) -> list[Finding]:
    return [judge_pulls(read_partials(ModelStore(machine.home.models)))]


def judge_pulls(partials: Sequence[Partial]) -> Finding:
    dead = [partial for partial in partials if partial.is_running is False]
    unknown = [partial for partial in partials if partial.is_running is None]
    if dead:
        size = wording.size(sum(partial.bytes for partial in dead))
        names = ", ".join(partial.path.name for partial in dead[:_LISTED])
        return fixable(PULLS, f"{size} of pulls that were cut short ({names})", "they take room on the store's disk")
    if unknown:
        names = ", ".join(partial.path.name for partial in unknown[:_LISTED])
        command = f"rm -r {' '.join(shlex.quote(str(partial.path)) for partial in unknown)}"
        return warned(PULLS, f"nobody can be asked about {names}", "they take room on the store's disk", command)
    if partials:
        return passed(PULLS, f"{len(partials)} on the way")
    return passed(PULLS, "none was cut short")


def read_partials(store: ModelStore) -> list[Partial]:
    return [
        Partial(path, bytes_below(path), _is_being_pulled(store, path))
        for path in sorted(store.root.glob(f"{PARTIAL_PREFIX}*"))
    ]


def partial_name(path: Path) -> str | None:
    """The model that a `.partial-NAME@PURPOSE` directory belongs to; None if it is none of ours."""
    name, at, _ = path.name.removeprefix(PARTIAL_PREFIX).partition("@")
    return name if at and NAME.fullmatch(name) else None


def check_snapshots(machine: Machine) -> list[Finding]:
    return [judge_snapshots(read_dead_snapshots(machine))]


def judge_snapshots(dead: Sequence[Snapshots]) -> Finding:
    if not dead:
        return passed(SNAPSHOTS, "none of a dead box")
    size = wording.size(sum(each.bytes for each in dead))
    noun = "a dead box" if len(dead) == 1 else f"{len(dead)} dead boxes"
    names = ", ".join(str(each.path) for each in dead[:_LISTED])
    return fixable(SNAPSHOTS, f"{size} of weights that slept in {noun} ({names})", "they take room on the disk")


def read_dead_snapshots(machine: Machine) -> list[Snapshots]:
    """Of run dirs that no box holds; what is empty, or bears another kind of name, is left out."""
    root = machine.home.snapshots
    if not root.is_dir():
        return []
    live = {process.key for process in processes.box_processes(machine) if process.box_alive}
    if is_held(machine.run):
        live.add(machine.run.key)
    dead = [path for path in sorted(root.iterdir()) if _KEY.fullmatch(path.name) and path.name not in live]
    found = (Snapshots(path, bytes_below(path)) for path in dead if path.is_dir() and not path.is_symlink())
    return [each for each in found if each.bytes]


def check_logs(machine: Machine) -> list[Finding]:
    if not machine.home.logs.is_dir():
        return [skipped(LOGS, "no logs yet")]
    live = {process.key for process in processes.box_processes(machine) if process.box_alive} | {machine.run.key}
    return [judge_logs(read_log_directories(machine.home.logs, live), time.time())]


def judge_logs(directories: Sequence[LogDirectory], now: float) -> Finding:
    """Of run dirs in which no box lives."""
    old = [each for each in directories if now - each.written > OLD_S]
    size = sum(each.bytes for each in old)
    if size <= OLD_LOGS_BYTES:
        total = wording.size(sum(each.bytes for each in directories))
        return passed(LOGS, f"{total} of other run dirs" if directories else "none of other run dirs")
    found = f"{wording.size(size)} of {len(old)} run dirs that had no box for a month"
    command = f"rm -r {' '.join(shlex.quote(str(each.path)) for each in old)}"
    return warned(LOGS, found, "they take room on the disk", command)


def read_log_directories(root: Path, live: set[str]) -> list[LogDirectory]:
    """All but those of live boxes."""
    found = []
    for path in sorted(root.iterdir()):
        if _KEY.fullmatch(path.name) and path.name not in live and path.is_dir():
            files = [info for _, info in _files_below(path)]
            written = max((info.st_mtime for info in files), default=path.stat().st_mtime)
            found.append(LogDirectory(path, sum(info.st_size for info in files), written))
    return found


def lock_holder(run: RunDir) -> LockHolder | None:
    """Who last wrote into the lock and didn't end as it should, or holds it now."""
    try:
        return msgspec.json.decode(run.lock.read_bytes(), type=LockHolder)
    except (OSError, msgspec.DecodeError):
        return None


def stale_files(run: RunDir) -> list[Path]:
    """Sockets and instance files, temporary ones among them."""
    return sorted((*run.root.glob("*.sock"), *run.instances.glob("*")))


def bytes_below(path: Path) -> int:
    return sum(info.st_size for _, info in _files_below(path))


def _files_below(path: Path) -> Iterable[tuple[str, os.stat_result]]:
    """Regular files; those that vanish meanwhile are left out."""
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                info = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(info.st_mode):
                yield name, info


def _is_being_pulled(store: ModelStore, path: Path) -> bool | None:
    name = partial_name(path)
    if name is None:
        return None
    try:
        with store.lock(name, wait=False) as dead:
            return not dead
    except BoxError:
        return None


def _listed(found: Sequence[BoxProcess]) -> str:
    shown = ", ".join(f"{process.name} (pid {process.pid})" for process in found[:_LISTED])
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"{len(found)} {'process' if len(found) == 1 else 'processes'}: {shown}{more}"
