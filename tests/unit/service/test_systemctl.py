"""systemctl's words."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from dynamo_box.errors import NotRunning
from dynamo_box.service.systemctl import Systemctl, ends_with_session, journal, parse_state
from dynamo_box.service.unit import Scope


def test_a_running_unit() -> None:
    state = parse_state(
        "LoadState=loaded\nActiveState=active\nSubState=running\nResult=success\nUnitFileState=enabled\n"
        "FragmentPath=/u/x.service\nMainPID=12\nNRestarts=3\nStatusText=answers at http://h:1/?a=b\n"
    )
    assert (state.loaded, state.active, state.enabled, state.pid, state.restarts) == (True, "active", True, 12, 3)
    assert state.text == "answers at http://h:1/?a=b"
    assert state.is_up


def test_a_unit_that_systemd_does_not_know() -> None:
    state = parse_state("LoadState=not-found\nActiveState=inactive\nMainPID=0\nNRestarts=0\nFragmentPath=\n")
    assert (state.loaded, state.enabled, state.pid, state.fragment) == (False, False, None, "")
    assert not state.is_up


def test_without_the_program_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotRunning) as caught:
        Systemctl(Scope.SYSTEM).require()
    assert caught.value.details == ("there is no `systemctl` on PATH",)


@pytest.mark.parametrize(("text", "mode"), [("", 0o644), ("#!/bin/sh\nprintf 'caf\\351' >&2; exit 1\n", 0o755)])
def test_a_broken_program_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "systemctl"
    program.write_text(text)
    program.chmod(mode)
    with pytest.raises(NotRunning) as caught:
        Systemctl(Scope.USER).require()
    assert caught.value.details[0].startswith("`systemctl` can't be run" if not text else "caf")


def test_counts_that_an_old_systemd_does_not_keep() -> None:
    state = parse_state("LoadState=loaded\nMainPID=[not set]\nNRestarts=\n")
    assert (state.pid, state.restarts) == (None, 0)


def test_the_journal_of_either_scope() -> None:
    assert journal(Scope.USER, "x") == "journalctl --user -u x"
    assert journal(Scope.SYSTEM, "x") == "journalctl -u x"


def test_only_the_run_dir_of_a_session_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_session = Path("/run/user/1000/dynbox")
    assert ends_with_session(of_a_session, tmp_path)
    assert not ends_with_session(Path("/tmp/dynbox-1000"), tmp_path)
    (tmp_path / pwd.getpwuid(os.geteuid()).pw_name).touch()
    assert not ends_with_session(of_a_session, tmp_path)

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in many a container
    assert ends_with_session(of_a_session, tmp_path)
