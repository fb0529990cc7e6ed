"""What a unit says, held against systemd's own reading of it where systemd is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_box.errors import UsageError
from dynamo_box.service.unit import Scope, ServiceUnit, check_name, is_ours, quoted, unit_text

AWKWARD = "/p q/%h $X \"q\" 'r' \\t é\n.yaml"


def unit(scope: Scope = Scope.USER, **changes: object) -> ServiceUnit:
    fields: dict[str, object] = {
        "name": "dynbox-x", "scope": scope, "profile": "smollm2", "python": sys.executable, "drain_s": 30.0, **changes,
    }  # fmt: skip
    return ServiceUnit(**fields)  # type: ignore[arg-type]


def settings(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Za-z]+=", line))


def verify(text: str, directory: Path, scope: Scope, name: str = "dynbox-x") -> str:
    """What `systemd-analyze verify` has to complain about; nothing where there is no systemd."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return ""
    path = directory / f"{name}.service"
    path.write_text(text)
    runtime = directory / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    done = subprocess.run(
        [analyze, *(["--user"] if scope is Scope.USER else []), "--man=no", "verify", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(directory), "XDG_RUNTIME_DIR": str(runtime)},
    )
    complaints = [line for line in done.stderr.splitlines() if name in line]
    return "\n".join(complaints) if complaints or done.returncode == 0 else done.stderr


@pytest.mark.parametrize("scope", Scope)
def test_systemd_takes_it(scope: Scope, tmp_path: Path) -> None:
    assert verify(unit_text(unit(scope, environment={"DYNBOX_PORT": "8001"})), tmp_path, scope) == ""


@pytest.mark.parametrize("scope", Scope)
def test_systemd_takes_awkward_paths(scope: Scope, tmp_path: Path) -> None:
    python = tmp_path / "a b %n $HOME é" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    text = unit_text(unit(scope, python=str(python), profile=AWKWARD, environment={"DYNBOX_HOME": AWKWARD}))
    assert verify(text, tmp_path, scope) == ""


def test_systemd_would_complain_of_a_wrong_one(tmp_path: Path) -> None:
    """So that the two tests above mean something."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    assert "Nonsense" in verify(unit_text(unit()).replace("KillMode", "Nonsense"), tmp_path, Scope.USER)


def test_the_main_process_notifies_and_drains_its_own_children() -> None:
    found = settings(unit_text(unit(drain_s=120.5)))
    assert (found["Type"], found["NotifyAccess"], found["KillMode"]) == ("notify", "main", "mixed")
    assert int(found["TimeoutStopSec"]) > 121
    assert (found["OOMPolicy"], found["Delegate"], found["LimitMEMLOCK"]) == ("continue", "yes", "infinity")
    assert found["ExecStart"].endswith("-m dynamo_box up --foreground --profile smollm2")


def test_a_mistake_in_the_profile_is_not_tried_again() -> None:
    found = settings(unit_text(unit()))
    assert (found["Restart"], found["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert found["StartLimitBurst"] == "5"


def test_a_unit_of_the_machine_gets_a_run_dir_of_its_own_and_a_home() -> None:
    found = settings(unit_text(unit(Scope.SYSTEM)))
    assert found["RuntimeDirectory"] == "dynbox-x"
    assert found["RuntimeDirectoryMode"] == "0700"
    assert found["Environment"] == "DYNBOX_RUN_DIR=/run/dynbox-x"
    assert found["User"] == "root"
    assert found["WantedBy"] == "multi-user.target"
    explicit = settings(unit_text(unit(Scope.SYSTEM, environment={"DYNBOX_RUN_DIR": "/srv/run"})))
    assert explicit["Environment"] == "DYNBOX_RUN_DIR=/srv/run"
    assert "RuntimeDirectory" not in explicit


def test_a_unit_of_the_user_leaves_the_run_dir_where_dynbox_looks() -> None:
    found = settings(unit_text(unit()))
    assert not {"Environment", "RuntimeDirectory", "User"} & found.keys()
    assert found["WantedBy"] == "default.target"


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("--profile", "--profile"),
        ("/a/b.yaml", "/a/b.yaml"),
        ("a b", '"a b"'),
        ("50%", '"50%%"'),
        ('say "x"', '"say \\"x\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("$HOME", '"$HOME"'),
        ("line\nline", '"line\\x0aline"'),
        ("", '""'),
        ("é", '"é"'),
    ],
)
def test_a_word_stays_one_word(word: str, written: str) -> None:
    assert quoted(word) == written


def test_a_path_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        quoted(b"/p/\xff.yaml".decode(errors="surrogateescape"))


@pytest.mark.parametrize("character", ['"', "'", "\\"])
def test_a_program_that_systemd_would_not_start_is_refused(character: str) -> None:
    with pytest.raises(UsageError, match="quotes or backslashes"):
        unit_text(unit(python=f"/a{character}b/python"))


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "x@y", "..", "a:b", "é", "x" * 300])
def test_names_that_systemd_would_take_for_something_else(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a service"):
        check_name(name)


def test_names_that_are_fine() -> None:
    assert [check_name(name) for name in ("dynbox-smollm2", "a.b_c", "x.service")] == ["dynbox-smollm2", "a.b_c", "x"]


def test_only_what_was_written_here_is_ours() -> None:
    assert is_ours(unit_text(unit()))
    assert not is_ours("[Unit]\nDescription=another\n")
