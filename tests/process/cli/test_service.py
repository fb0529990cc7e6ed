"""`dynbox service` before a systemctl that keeps account of units and refuses what the real one refuses."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Dynbox = Callable[..., subprocess.CompletedProcess[str]]

SYSTEMCTL = '''#!{python}
"""systemctl --user, as far as a unit's file, its being enabled, and its being active."""
import json, os, pathlib, sys

home = pathlib.Path(os.environ["FAKE_SYSTEMD"])
directory = pathlib.Path(os.environ["HOME"]) / ".config/systemd/user"
foreign = home / "usr-lib"
with (home / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")

def refuse(text, status=1):
    sys.stderr.write(text + "\\n")
    sys.exit(status)

if (home / "absent").exists():
    refuse("Failed to connect to bus: No medium found")
options = [word for word in sys.argv[1:] if word.startswith("-") and word != "--"]
words = [word for word in sys.argv[1:] if not word.startswith("-")]
properties = [word.removeprefix("--property=").split(",") for word in options if word.startswith("--property=")]
for option in options:
    if option not in ("--user", "--no-pager") and not option.startswith("--property="):
        refuse(f"systemctl: unrecognized option '{{option}}'")
if "--user" not in options:
    refuse("System has not been booted with systemd as init system (PID 1). Can't operate.")
verb, names = words[0], words[1:]
if verb in ("daemon-reload",) and names:
    refuse("Too many arguments.")
known_file = home / "known.json"
known = json.loads(known_file.read_text()) if known_file.exists() else {{}}

def save():
    known_file.write_text(json.dumps(known))

def find(name):
    for place in (directory, foreign):
        if (place / name).exists():
            return place / name

if verb == "daemon-reload":
    for name in list(known):
        if not find(name):
            if known[name]["active"] == "active":
                refuse(f"{{name}} vanished while it ran")
            del known[name]
    for place in (foreign, directory):
        for path in place.glob("*.service"):
            known.setdefault(path.name, {{"active": "inactive", "enabled": False}})
    save()
elif verb == "show" and not names:
    print("Version=252")
elif verb == "show":
    unit = known.get(names[0])
    values = {{
        "LoadState": "loaded" if unit else "not-found",
        "ActiveState": unit["active"] if unit else "inactive",
        "SubState": "running" if unit and unit["active"] == "active" else "dead",
        "Result": unit.get("result", "success") if unit else "success",
        "UnitFileState": "enabled" if unit and unit["enabled"] else "disabled" if unit else "",
        "FragmentPath": str(find(names[0]) or ""),
        "MainPID": "77" if unit and unit["active"] == "active" else "0",
        "NRestarts": "0",
        "StatusText": "it answers" if unit and unit["active"] == "active" else "",
    }}
    print("\\n".join(f"{{key}}={{values[key]}}" for group in properties for key in group))
elif verb in ("enable", "disable", "start", "stop", "restart", "reset-failed"):
    for name in names:
        if not name.endswith(".service"):
            refuse(f"not a unit: {{name}}")
        if name not in known:
            refuse(f"Unit {{name}} not found.", 5)
        if verb in ("enable", "disable"):
            known[name]["enabled"] = verb == "enable"
        elif verb in ("start", "restart"):
            if (home / "fails").exists():
                known[name] |= {{"active": "failed", "result": "exit-code"}}
                save()
                refuse(f"Job for {{name}} failed because the control process exited with error code.")
            known[name] |= {{"active": "active", "result": "success"}}
        elif verb == "stop":
            known[name]["active"] = "inactive"
    save()
else:
    refuse(f"Unknown command verb '{{verb}}'.")
'''


@dataclass
class Systemd:
    """The account that the stand-in keeps."""

    root: Path
    units: Path

    def calls(self) -> list[str]:
        """Verbs that change something, with their units, in order; and forget them."""
        file = self.root / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        words = [[word for word in json.loads(line) if not word.startswith("-")] for line in lines]
        return [" ".join(each) for each in words if each[0] != "show"]

    def unit(self, name: str) -> str:
        return (self.units / f"{name}.service").read_text()


@pytest.fixture
def systemd(tmp_path: Path, box_env: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    root = tmp_path / "systemd"
    (root / "bin").mkdir(parents=True)
    (root / "usr-lib").mkdir()
    program = root / "bin" / "systemctl"
    program.write_text(SYSTEMCTL.format(python=sys.executable))
    program.chmod(0o755)
    home = tmp_path / "person"
    home.mkdir()
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SYSTEMD", str(root))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    yield Systemd(root, home / ".config" / "systemd" / "user")


def service(dynbox: Dynbox, verb: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return dynbox("service", verb, "--user", *arguments, code=code)


def test_installing_writes_enables_and_starts(systemd: Systemd, dynbox: Dynbox, box_env: Any) -> None:
    done = service(dynbox, "install", "mock-8gpu")
    assert systemd.calls() == [
        "daemon-reload", "enable dynbox-mock-8gpu.service", "start dynbox-mock-8gpu.service",
    ]  # fmt: skip
    assert f"Environment=DYNBOX_RUN_DIR={box_env.run}" in systemd.unit("dynbox-mock-8gpu")
    assert done.stdout == "dynbox-mock-8gpu is active: it answers\n"
    assert [path.name for path in systemd.units.iterdir()] == ["dynbox-mock-8gpu.service"]


def test_installing_again_restarts_only_what_changed(systemd: Systemd, dynbox: Dynbox) -> None:
    service(dynbox, "install", "mock-8gpu")
    systemd.calls()
    assert "nothing new" in service(dynbox, "install", "mock-8gpu").stderr
    assert systemd.calls() == ["daemon-reload", "enable dynbox-mock-8gpu.service"]
    dynbox("service", "install", "--user", "mock-8gpu", DYNBOX_PORT="8123")
    assert systemd.calls()[-1] == "restart dynbox-mock-8gpu.service"
    assert "Environment=DYNBOX_PORT=8123" in systemd.unit("dynbox-mock-8gpu")


def test_no_start_waits_for_the_next_boot(systemd: Systemd, dynbox: Dynbox) -> None:
    data = json.loads(service(dynbox, "install", "mock-8gpu", "--name", "later", "--no-start", "--json").stdout)
    assert (data["service"], data["state"], data["at_boot"], data["changed"]) == ("later", "inactive", True, True)
    assert systemd.calls() == ["daemon-reload", "enable later.service"]


def test_a_dry_run_touches_nothing(systemd: Systemd, dynbox: Dynbox) -> None:
    (systemd.root / "absent").touch()
    assert "--profile mock-8gpu" in service(dynbox, "install", "mock-8gpu", "--dry-run").stdout
    data = json.loads(service(dynbox, "install", "mock-8gpu", "--dry-run", "--json").stdout)
    assert data["path"] == str(systemd.units / "dynbox-mock-8gpu.service")
    assert data["text"].startswith("# Written by `dynbox service install`")
    assert not systemd.units.exists()
    assert systemd.calls() == []


def test_a_unit_of_the_machine_is_printed_for_anybody(systemd: Systemd, dynbox: Dynbox) -> None:
    done = dynbox("service", "install", "--system", "--dry-run", "mock-8gpu")
    assert "/etc/systemd/system/dynbox-mock-8gpu.service" in done.stderr
    assert "WantedBy=multi-user.target" in done.stdout


def test_a_profile_in_a_file_is_named_by_its_absolute_path(
    systemd: Systemd, dynbox: Dynbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("extends: mock-8gpu\ndrain: 100s\n")
    service(dynbox, "install", "own.yaml")
    assert f"--profile {tmp_path}/own.yaml" in systemd.unit("dynbox-own")
    assert "TimeoutStopSec=160" in systemd.unit("dynbox-own")
    assert "removed" in service(dynbox, "remove", "own.yaml").stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extends: mock-8gpu\nmodle: x\n", "p.yaml:2:1"),
        ("extends: mock-8gpu\nsimulate: {devices: [{count: 8, memory: 1GiB}]}\n", "can't carry"),
        ("extends: mock-8gpu\nfrontend:\n  port: ${ONLY_HERE}\n", "ONLY_HERE"),
    ],
)
def test_a_profile_that_would_not_start_is_refused_before_anything_is_written(
    systemd: Systemd, dynbox: Dynbox, tmp_path: Path, text: str, complaint: str
) -> None:
    """A variable of this shell's doesn't count: the service won't have it."""
    (tmp_path / "p.yaml").write_text(text)
    done = dynbox("service", "install", "--user", str(tmp_path / "p.yaml"), code=2, ONLY_HERE="8000")
    assert complaint in done.stderr
    assert not systemd.units.exists()
    assert systemd.calls() == []


def test_variables_for_the_profile_come_from_the_environment_file(
    systemd: Systemd, dynbox: Dynbox, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text("extends: mock-8gpu\nfrontend:\n  port: ${SECRET}\n")
    refused = dynbox("service", "install", "--user", str(tmp_path / "p.yaml"), code=2, SECRET="8077")
    file = systemd.units.parents[1] / "dynbox" / "dynbox-p.env"
    assert str(file) in refused.stderr
    file.parent.mkdir(parents=True)
    file.write_text("SECRET=8077\n")
    service(dynbox, "install", str(tmp_path / "p.yaml"))
    assert "8077" not in systemd.unit("dynbox-p")


def test_another_programs_unit_is_left_alone(systemd: Systemd, dynbox: Dynbox) -> None:
    systemd.units.mkdir(parents=True)
    theirs = systemd.units / "mine.service"
    theirs.write_text("[Service]\nExecStart=/bin/true\n")
    refused = service(dynbox, "install", "mock-8gpu", "--name", "mine", code=2)
    assert "another program's unit" in refused.stderr
    assert "--name" in refused.stderr
    assert "was not written by" in service(dynbox, "remove", "--name", "mine", code=2).stderr
    assert theirs.read_text().startswith("[Service]")
    assert systemd.calls() == []


def test_a_masked_name_and_one_that_a_package_has_are_taken_too(systemd: Systemd, dynbox: Dynbox) -> None:
    systemd.units.mkdir(parents=True)
    (systemd.units / "masked.service").symlink_to("/dev/null")
    (systemd.root / "usr-lib" / "packaged.service").write_text("[Service]\n")
    for name in ("masked", "packaged"):
        assert "another program's unit" in service(dynbox, "install", "mock-8gpu", "--name", name, code=2).stderr
    assert (systemd.units / "masked.service").is_symlink()


def test_a_box_in_the_way_is_named_before_anything_is_written(systemd: Systemd, dynbox: Dynbox, box_env: Any) -> None:
    box_env.run.mkdir()
    with (box_env.run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = service(dynbox, "install", "mock-8gpu", code=1)
        assert "a box is running" in refused.stderr
        assert "dynbox down" in refused.stderr
        assert not systemd.units.exists()
        service(dynbox, "install", "mock-8gpu", "--no-start")


def test_a_start_that_fails_is_an_error_that_says_where_to_look(systemd: Systemd, dynbox: Dynbox) -> None:
    (systemd.root / "fails").touch()
    failed = service(dynbox, "install", "mock-8gpu", code=1)
    assert "control process exited" in failed.stderr
    assert "journalctl --user -u dynbox-mock-8gpu" in failed.stderr
    assert "failed (exit-code)" in service(dynbox, "status", code=3).stdout


def test_removing_stops_disables_and_deletes_once(systemd: Systemd, dynbox: Dynbox) -> None:
    service(dynbox, "install", "mock-8gpu")
    systemd.calls()
    assert "would stop dynbox-mock-8gpu" in service(dynbox, "remove", "--dry-run").stdout
    assert systemd.calls() == []
    assert "stopped dynbox-mock-8gpu" in service(dynbox, "remove").stdout
    assert systemd.calls()[:3] == [
        "stop dynbox-mock-8gpu.service", "disable dynbox-mock-8gpu.service", "daemon-reload",
    ]  # fmt: skip
    assert list(systemd.units.iterdir()) == []
    assert service(dynbox, "remove").stdout == "no service is installed (--user)\n"
    assert service(dynbox, "remove", "mock-8gpu").stdout == "dynbox-mock-8gpu is not installed\n"
    assert json.loads(service(dynbox, "remove", "mock-8gpu", "--json").stdout)["removed"] is None
    assert systemd.calls() == []


def test_with_several_a_name_is_asked_for(systemd: Systemd, dynbox: Dynbox) -> None:
    service(dynbox, "install", "mock-8gpu", "--name", "one", "--no-start")
    service(dynbox, "install", "mock-8gpu", "--name", "two", "--no-start")
    assert "one, two" in service(dynbox, "remove", code=2).stderr
    lines = service(dynbox, "status", code=3).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["one", "inactive", "yes"], ["two", "inactive", "yes"]]


def test_status_is_for_people_and_programs(systemd: Systemd, dynbox: Dynbox) -> None:
    assert "no service is installed" in service(dynbox, "status", code=3).stderr
    service(dynbox, "install", "mock-8gpu")
    assert service(dynbox, "status").stdout.splitlines()[1].split() == [
        "dynbox-mock-8gpu", "active", "yes", "77", "0", "it", "answers",
    ]  # fmt: skip
    (only,) = json.loads(service(dynbox, "status", "mock-8gpu", "--json").stdout)
    assert (only["service"], only["state"], only["pid"]) == ("dynbox-mock-8gpu", "active", 77)


def test_without_systemd_it_says_so_and_writes_nothing(systemd: Systemd, dynbox: Dynbox) -> None:
    (systemd.root / "absent").touch()
    refused = service(dynbox, "install", "mock-8gpu", code=3)
    assert "No medium found" in refused.stderr
    assert "hint:" in refused.stderr
    assert not systemd.units.exists()


def test_a_name_that_is_none(systemd: Systemd, dynbox: Dynbox) -> None:
    assert "no name for a service" in service(dynbox, "install", "--name", "a b", code=2).stderr
