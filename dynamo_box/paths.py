"""Where the box keeps things: the run dir (sockets, lock, instances) and the home (models, logs).

Run dir: `$DYNBOX_RUN_DIR`, else `$XDG_RUNTIME_DIR/dynbox`, else `<temp dir>/dynbox-<uid>`; always 0700 and ours.
Home: `$DYNBOX_HOME` with everything below it, else the XDG data, state and cache directories.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from dynamo_box.errors import BoxError


@dataclass(frozen=True)
class RunDir:
    """Names inside a run dir. Nothing here touches the disk except `create`."""

    root: Path

    @property
    def key(self) -> str:
        """12 hex digits that tell this run dir from others: in run ids and in the names of log directories."""
        return blake2b(os.fsencode(self.root), digest_size=6).hexdigest()

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def control_socket(self) -> Path:
        return self.root / "control.sock"

    @property
    def router_socket(self) -> Path:
        return self.root / "router.sock"

    @property
    def instances(self) -> Path:
        return self.root / "instances"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def worker_socket(self, name: str) -> Path:
        return self.root / f"{name}.sock"

    def create(self) -> None:
        """Make the directory (0700), refusing one that somebody else owns or may enter.

        Raises:
            BoxError: it is a link, is not ours, or is open to others.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.root.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise BoxError(
                f"run dir {self.root} is not a directory of this user",
                remedy="remove it, or set DYNBOX_RUN_DIR to a directory of your own",
            )
        if info.st_mode & 0o077:
            self.root.chmod(0o700)
        self.instances.mkdir(mode=0o700, exist_ok=True)


@dataclass(frozen=True)
class Home:
    models: Path
    logs: Path
    state: Path
    cache: Path

    @property
    def snapshots(self) -> Path:
        """Sleeping weights, a directory a run dir."""
        return self.cache / "snapshots"

    @property
    def kv(self) -> Path:
        """The disk tier of KV, where a profile names no directory. All boxes with this home share it: one of them at a
        time writes there.
        """
        return self.cache / "kv"


def snapshots_dir(run: RunDir, where: Home) -> Path:
    """Where weights that sleep on disk lie while the box in `run` lives. Boxes with one home don't mix."""
    return where.snapshots / run.key


def run_dir() -> RunDir:
    explicit = os.environ.get("DYNBOX_RUN_DIR")
    if explicit:
        return RunDir(Path(explicit).absolute())
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return RunDir(Path(runtime).absolute() / "dynbox")
    return RunDir(Path(tempfile.gettempdir()) / f"dynbox-{os.getuid()}")


def home() -> Home:
    explicit = os.environ.get("DYNBOX_HOME")
    if explicit:
        root = Path(explicit).absolute()
        return Home(models=root / "models", logs=root / "logs", state=root / "state", cache=root / "cache")
    import platformdirs

    data = platformdirs.user_data_path("dynbox", appauthor=False)
    state = platformdirs.user_state_path("dynbox", appauthor=False)
    cache = platformdirs.user_cache_path("dynbox", appauthor=False)
    return Home(models=data / "models", logs=state / "logs", state=state, cache=cache)


def logs_dir(run: RunDir, where: Home) -> Path:
    """Where the processes of the box in `run` log; it outlives the box. Boxes with one home don't mix."""
    return where.logs / run.key
