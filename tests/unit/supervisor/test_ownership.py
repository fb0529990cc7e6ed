"""Who owns a run dir, a process, a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_box.discovery.instances import process_start_time
from dynamo_box.errors import BoxError
from dynamo_box.paths import RunDir
from dynamo_box.ports import holder
from dynamo_box.supervisor import listener
from dynamo_box.supervisor.identity import RunId
from dynamo_box.supervisor.lock import Holder, RunDirHeld, RunDirLock, read_holder


def test_a_run_id_survives_being_written(tmp_path: Path) -> None:
    own = RunId.of_this_process(RunDir(tmp_path))
    assert RunId.parse(str(own)) == own
    assert own.is_alive


@pytest.mark.parametrize("text", ["", "abc", "abc.1", "abc.1.x", ".1.2", "abc.-1.2", "a.1.2.3"])
def test_what_is_no_run_id_is_nobodys(text: str) -> None:
    assert RunId.parse(text) is None


def test_a_reused_pid_is_another_box() -> None:
    start_time = process_start_time(os.getpid()) or 0
    assert RunId("d", os.getpid(), start_time).is_alive
    assert not RunId("d", os.getpid(), start_time - 1).is_alive


def test_the_lock_says_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = RunDirLock.acquire(path, Holder(42, "smollm2"))
    with pytest.raises(RunDirHeld, match="profile smollm2, supervisor pid 42"):
        RunDirLock.acquire(path, Holder(43, "other"))
    lock.release()
    assert read_holder(path) is None
    RunDirLock.acquire(path, Holder(43, "other")).release()


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, os, signal; from pathlib import Path; from dynamo_box.supervisor.lock import *\n"
        "RunDirLock.acquire(Path(sys.argv[1]), Holder(os.getpid(), 'dead')); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], timeout=120)
    assert read_holder(path) is not None
    RunDirLock.acquire(path, Holder(1, "alive")).release()


def test_the_holder_of_a_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = holder(port)
        assert found is not None and found.pid == os.getpid()
        with pytest.raises(BoxError, match=rf"taken by .* \(pid {os.getpid()}\)"):
            listener.bind("127.0.0.1", port)
    assert holder(port) is None
    listener.bind("127.0.0.1", port).close()


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(BoxError, match=r"can't listen on 192\.0\.2\.1"):
        listener.bind("192.0.2.1", 0)
