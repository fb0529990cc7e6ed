"""What is held of the box's memory files, by whom, as the kernel tells."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

from dynamo_box.gms.names import memfd_name
from dynamo_box.supervisor import meter

KEY = f"{os.getpid():012x}"
SIZE = 4 << 20


def memory_file(place: str, layout: str = "m", written: int = SIZE) -> int:
    fd = os.memfd_create(memfd_name(KEY, place, "cpu", layout), os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x" * written, 0)
    return fd


def test_a_file_counts_once_whoever_holds_it_and_only_by_its_blocks() -> None:
    fd = memory_file("device", written=SIZE // 2)
    again = os.dup(fd)
    try:
        reading = meter.read(KEY, ())
        assert reading.on_device("cpu") == SIZE // 2
        (one,) = reading.files.values()
        assert (one.place, one.device, one.layout, one.holders) == ("device", "cpu", "m", {os.getpid()})
    finally:
        os.close(fd)
        os.close(again)
    assert meter.read(KEY, ()).on_device("cpu") == 0


def test_what_is_only_mapped_counts_too() -> None:
    fd = memory_file("device")
    mapped = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    try:
        assert meter.read(KEY, ()).on_device("cpu") == SIZE
    finally:
        mapped.close()
    assert meter.read(KEY, ()).files == {}


def test_host_memory_is_no_devices_and_another_box_is_not_ours() -> None:
    fds = [memory_file("host"), os.memfd_create(memfd_name("another", "device", "cpu", "m"), os.MFD_CLOEXEC)]
    try:
        reading = meter.read(KEY, ())
        assert reading.on_device("cpu") == 0 and len(reading.files) == 1
        assert reading.of_layout("m") == {}
    finally:
        for fd in fds:
            os.close(fd)


def test_another_process_that_holds_it_is_named() -> None:
    fd = memory_file("device")
    program = (
        f"import sys; kept = open('/proc/{os.getpid()}/fd/{fd}', 'rb'); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"DYNBOX_PROCESS": "stray.0"},
    ) as stray:
        assert stray.stdin is not None and stray.stdout is not None
        assert stray.stdout.readline() == "open\n"
        os.close(fd)
        (one,) = meter.read(KEY, ()).files.values()
        assert one.holders == {stray.pid} and meter.who(stray.pid) == f"stray.0 (pid {stray.pid})"
        stray.stdin.close()
    assert meter.read(KEY, ()).files == {}


def test_workers_anonymous_memory_counts_on_their_device() -> None:
    before = meter.read(KEY, [(os.getpid(), "cpu")]).on_device("cpu")
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"x" * len(held))
        after = meter.read(KEY, [(os.getpid(), "cpu")]).on_device("cpu")
    assert 24 << 20 <= after - before <= 48 << 20


def test_a_process_that_is_gone_holds_nothing() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert meter.anonymous_bytes(gone.pid) == 0
    assert meter.who(gone.pid) == f"a process that has just ended (pid {gone.pid})"
