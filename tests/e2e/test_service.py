"""`dynbox service` before a real systemd: a user instance of the test's own, in a mount namespace that is gone with it.

That takes root on a machine that systemd doesn't run, as in a container; a systemd that runs the machine is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from box_under_test import Box, eventually
from mock_box import PROFILE

SYSTEMD = Path("/lib/systemd/systemd")
TREE = Path("/sys/fs/cgroup")
DEADLINE_S = 60

ENTER = """
set -e
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
mkdir /run/systemd/system
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/$CGROUP
echo $$ > /sys/fs/cgroup/$CGROUP/cgroup.procs
exec /lib/systemd/systemd --user --log-level=warning
"""


def can_run() -> bool:
    """Whether a private instance of systemd can run here without touching another."""
    if os.geteuid() != 0 or not SYSTEMD.exists() or Path("/run/systemd/system").exists():
        return False
    probe = "mkdir -p /run/systemd && mount -t tmpfs tmpfs /run/systemd && mount -t cgroup2 none /sys/fs/cgroup"
    probe += " && mkdir /sys/fs/cgroup/dynbox-probe && rmdir /sys/fs/cgroup/dynbox-probe"
    return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, timeout=DEADLINE_S).returncode == 0


class ServedBox(Box):
    """A box whose commands run in the mount namespace of a user's systemd."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "run", root / "home")
        self.runtime = root / "runtime"
        for directory in (self.home, self.runtime, root / "person"):
            directory.mkdir(mode=0o700)
        self.cgroup = f"dynbox-test-{os.getpid()}"
        self.env |= {
            "XDG_RUNTIME_DIR": str(self.runtime), "HOME": str(root / "person"), "CGROUP": self.cgroup,
            "DYNBOX_PORT": str(self.port),
        }  # fmt: skip
        self.env.pop("XDG_CONFIG_HOME", None)
        with (root / "systemd.log").open("wb") as log:
            self.systemd = subprocess.Popen(["unshare", "-m", "sh", "-c", ENTER], env=self.env, stderr=log)
        eventually((self.runtime / "systemd" / "private").exists, "systemd answers", DEADLINE_S)

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", "-m", "-t", str(self.systemd.pid), *super().command(*arguments)]

    def service(self, verb: str, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.dynbox("service", verb, "--user", *arguments, "--json", code=code).stdout)

    def destroy(self) -> None:
        self.systemd.send_signal(signal.SIGTERM)
        self.systemd.wait(DEADLINE_S)
        left = self.pids()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for path in sorted(TREE.glob(f"*/{self.cgroup}/**/"), reverse=True):
            path.rmdir()
        assert not left, f"processes left behind: {left}"


@pytest.fixture
def served() -> Iterator[ServedBox]:
    if not can_run():
        pytest.skip("needs root, and a machine that systemd is installed on and doesn't run")
    root = Path(tempfile.mkdtemp(prefix="dynbox-service-"))
    box = ServedBox(root)
    try:
        yield box
    finally:
        box.destroy()
        shutil.rmtree(root)


@pytest.mark.slow
def test_a_service_from_its_installation_to_its_end(served: ServedBox, tiny_model: Path) -> None:
    profile = served.run_dir.parent / "a box with $HOME and %h.yaml"
    profile.write_text(PROFILE.format(source=tiny_model) + "frontend:\n  port: ${DYNBOX_PORT}\n")
    drop_in = Path(served.env["HOME"], ".config/systemd/user/served.service.d/quick.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nRestartSec=100ms\n")
    installed = served.service("install", str(profile), "--name", "served")
    assert (installed["state"], installed["at_boot"]) == ("active", True)
    assert installed["status"].endswith(f"answers at http://127.0.0.1:{served.port}")
    assert served.ps()["box"]["pid"] == installed["pid"]

    plan = served.run_dir / "plan.json"  # written at every start, and cheap to look at
    first = plan.stat().st_mtime_ns
    os.kill(installed["pid"], signal.SIGKILL)
    eventually(lambda: plan.stat().st_mtime_ns != first, "systemd has restarted it")

    def again() -> Any:
        done = subprocess.run(
            served.command("service", "status", "--user", "--json"),
            env=served.env,
            capture_output=True,
            timeout=DEADLINE_S,
        )
        (state,) = json.loads(done.stdout)
        return state if state["restarts"] == 1 and state["state"] == "active" else None

    second = eventually(again, "it answers again")
    assert second["pid"] != installed["pid"]
    assert served.ps()["models"][0]["state"] == "ready"

    removed = served.service("remove")
    assert removed["removed"].endswith("served.service")
    assert served.service("status", code=3) == []
