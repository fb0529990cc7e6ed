"""Whose box a command talks to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.paths import RunDir
from dynamo_box.protocol.framing import listen_unix


def test_a_socket_of_another_user_is_no_box_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dir may lie in /tmp, where anybody could have made it first."""
    run = RunDir(tmp_path)
    with listen_unix(run.control_socket):
        ControlClient.connect(run).close()
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        with pytest.raises(BoxError, match=f"control.sock belongs to uid {uid}, not to you") as caught:
            ControlClient.connect(run)
    assert not isinstance(caught.value, NotRunning)
    assert "DYNBOX_RUN_DIR" in (caught.value.remedy or "")
