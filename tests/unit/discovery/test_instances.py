"""An instance file is believed only while the process that it names lives."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from dynamo_box.discovery.instances import (
    Instance,
    announce,
    process_start_time,
    read_instances,
    withdraw,
)
from dynamo_box.discovery.watch import watch_instances

DEADLINE_S = 60


def instance(name: str, pid: int | None = None, start_time: int | None = None) -> Instance:
    pid = pid or os.getpid()
    return Instance(
        name=name,
        model="m",
        role="aggregated",
        engine="mock",
        socket=f"/{name}.sock",
        pid=pid,
        start_time=start_time if start_time is not None else process_start_time(pid) or 0,
        fingerprint="f",
        block_size=16,
        kv_blocks_total=8,
        kv_dtype="float32",
        context_length=128,
    )


def test_an_announced_instance_is_read_back_and_withdrawn(tmp_path: Path) -> None:
    announce(tmp_path, instance("a"))
    assert read_instances(tmp_path) == {"a": instance("a")}
    withdraw(tmp_path, "a")
    withdraw(tmp_path, "a")
    assert read_instances(tmp_path) == {}


def test_half_written_foreign_and_unreadable_files_are_left_out(tmp_path: Path) -> None:
    announce(tmp_path, instance("a"))
    (tmp_path / ".tmp_b.1").write_bytes(msgspec.json.encode(instance("b")))
    (tmp_path / "c.json").write_bytes(b'{"name": "c"')
    (tmp_path / "d.json").write_bytes(b"[]")
    (tmp_path / "e.json").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert list(read_instances(tmp_path)) == ["a"]


def test_a_dead_process_and_a_reused_pid_are_no_instances(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = instance("child", child.pid)
    announce(tmp_path, alive)
    announce(tmp_path, instance("reused", os.getpid(), start_time=1))
    assert read_instances(tmp_path) == {"child": alive}
    child.kill()
    child.communicate()
    assert read_instances(tmp_path) == {}


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_time(child.pid) is None
    child.communicate()


def test_a_missing_directory_holds_nobody(tmp_path: Path) -> None:
    assert read_instances(tmp_path / "absent") == {}


def test_watching_yields_now_and_at_each_change(tmp_path: Path) -> None:
    async def scenario() -> list[list[str]]:
        seen: list[list[str]] = []
        stop = asyncio.Event()
        async for found in watch_instances(tmp_path, stop):
            seen.append(sorted(found))
            if len(seen) == 1:
                announce(tmp_path, instance("a"))
            elif len(seen) == 2:
                announce(tmp_path, instance("b"))
            elif len(seen) == 3:
                withdraw(tmp_path, "a")
            else:
                stop.set()
        return seen

    assert asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S)) == [[], ["a"], ["a", "b"], ["b"]]
