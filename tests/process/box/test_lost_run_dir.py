"""A run dir that is removed under a living box, as that of a user's session is when the session ends: nobody can reach
the box any more, so it stops, and leaves alone whatever is there by then.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from box_under_test import eventually
from mock_box import MockBox


def test_it_stops_says_why_and_is_in_nobodys_way(mock_box: MockBox) -> None:
    logs = Path(mock_box.ps()["box"]["logs_dir"])
    shutil.rmtree(mock_box.run_dir)
    mock_box.run_dir.mkdir(mode=0o700)
    successors = mock_box.run_dir / "control.sock"
    successors.touch()
    eventually(lambda: mock_box.pids() == set(), "it has stopped")
    assert successors.exists()
    assert f"run dir {mock_box.run_dir} was removed" in (logs / "supervisor.log").read_text()
    mock_box.start_again()


def test_what_cleans_temporary_directories_passes_over_it(mock_box: MockBox) -> None:
    directory = os.open(mock_box.run_dir, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(directory)
