"""What the service will find in its environment, which is not what the shell has."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_box.errors import UsageError
from dynamo_box.service.environment import kept, of_service, read_environment_file


def test_only_places_and_the_port_are_kept_and_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = {"DYNBOX_HOME": "here", "DYNBOX_PORT": "8001", "HF_TOKEN": "secret", "DYNBOX_RUN_DIR": "", "PATH": "/bin"}
    assert kept(shell) == {"DYNBOX_HOME": str(tmp_path / "here"), "DYNBOX_PORT": "8001"}
    tiers = {"DYN_KVBM_CPU_CACHE_GB": "4", "DYN_KVBM_DISK_CACHE_DIR": "kv", "DYN_KVBM_LEADER_ZMQ_HOST": "x"}
    assert kept(tiers) == {"DYN_KVBM_CPU_CACHE_GB": "4", "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path / "kv")}


def test_the_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "x.env"
    file.write_text("# a comment\n; another\n\nA=1\nB=\"two words\"\nC='$x'\n D = four \nE=\n")
    assert read_environment_file(file) == {"A": "1", "B": "two words", "C": "$x", "D": "four", "E": ""}
    assert of_service({"A": "of the unit", "F": "6"}, file).items() >= {"A": "1", "F": "6"}.items()


def test_without_a_file_there_is_what_a_login_has(tmp_path: Path) -> None:
    assert of_service({}, tmp_path / "none").keys() == {"HOME", "USER", "LOGNAME"}


@pytest.mark.parametrize("line", ["export A=1", "A", "1A=2", 'A="open'])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.env"
    file.write_text(f"OK=1\n{line}\n")
    with pytest.raises(UsageError, match=r"x\.env:2"):
        read_environment_file(file)


def test_a_directory_in_its_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        read_environment_file(tmp_path)
