"""What runs out, and who dies, in the middle of it: memory, descriptors, the disk; a reader."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fakes.memory_files import small_file_system
from gms_peers import DEADLINE_S, MIB, Service, patterns

from dynamo_box.protocol import gms

CONTENTS = patterns(4, 2)

READER = """
import mmap, os, signal, sys
from pathlib import Path
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import connect_unix
def die_at(here):
    if here == sys.argv[2]: os.kill(os.getpid(), signal.SIGKILL)
c = BlockingFdChannel(connect_unix(Path(sys.argv[1])), gms.server_decoder)
def ask(m):
    c.send(m)
    return c.receive(120)
die_at("connected")
ask(gms.Acquire(PROTOCOL_VERSION, "victim", "m", "ro"))
die_at("granted")
manifest, _ = ask(gms.Describe())
die_at("described")
ids = tuple(a.id for a in manifest.allocations)
if sys.argv[2] == "exporting":
    c.send(gms.Export(ids)); die_at("exporting")
_, fds = ask(gms.Export(ids))
die_at("exported")
first = mmap.mmap(fds[0], 0, prot=mmap.PROT_READ)
die_at("half mapped")
rest = [mmap.mmap(fd, 0, prot=mmap.PROT_READ) for fd in fds[1:]]
die_at("mapped")
"""
READER_STEPS = ("connected", "granted", "described", "exporting", "exported", "half mapped", "mapped")


def write(service: Service) -> None:
    before = service.descriptors()
    writer = service.engine()
    assert writer.acquire("rw", timeout_s=DEADLINE_S).lock == "rw"
    writer.write(*CONTENTS)
    assert writer.ask(gms.Release()) == gms.Done()
    writer.close()
    while service.descriptors() != before + len(CONTENTS):  # the connection is gone there, too
        service.pump(0.01)


def contents(service: Service) -> list[bytes]:
    reader = service.engine("reader")
    granted = reader.acquire("ro")
    assert isinstance(granted, gms.Granted), granted
    found = reader.read()
    assert reader.ask(gms.Release()) == gms.Done()
    reader.close()
    return found


@contextlib.contextmanager
def limited(service: Service, what: int, soft: int) -> Iterator[None]:
    """The service may have no more of it meanwhile."""
    before = resource.prlimit(service.process.pid, what)
    resource.prlimit(service.process.pid, what, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(service.process.pid, what, before)


def room_for(service: Service, more: int) -> int:
    """A limit of descriptors that lets it open so many more: numbers that are free below count."""
    used = {int(name) for name in os.listdir(f"/proc/{service.process.pid}/fd")}
    return [number for number in range(len(used) + more + 1) if number not in used][more]


def test_a_reader_killed_at_each_step_is_in_nobodys_way(service: Service) -> None:
    write(service)
    before = service.descriptors()
    for step in READER_STEPS:
        victim = subprocess.Popen([sys.executable, "-c", READER, str(service.path), step])
        while victim.poll() is None:
            service.pump(0.01)
        assert victim.returncode == -signal.SIGKILL, step
    while service.descriptors() != before:
        service.pump(0.01)
    assert service.move("host").error == ""
    assert service.move("device").error == ""
    assert contents(service) == CONTENTS


def test_memory_that_runs_out_at_any_allocation_leaves_none_of_them(tmp_path: Path) -> None:
    """Of the machine's memory, by the kernel's word; and of descriptors."""
    service = Service(tmp_path, capacity_bytes=1 << 50)
    try:
        writer = service.engine()
        writer.acquire("rw")
        before = service.descriptors()
        for number in range(4):
            sizes = [2 * MIB] * 4
            sizes[number] = 1 << 45
            assert writer.ask(gms.Allocate(tuple(sizes))).code == "out_of_memory", number
            assert service.descriptors() == before, number
        for number in range(4):
            with limited(service, resource.RLIMIT_NOFILE, room_for(service, number)):
                assert writer.ask(gms.Allocate((2 * MIB,) * 5)).code == "out_of_memory", number
            assert service.descriptors() == before, number
        assert service.figures_when(lambda figures: figures.refused == 8).device_bytes == 0
        writer.write(*CONTENTS)
        assert writer.ask(gms.Release()) == gms.Done()
        assert contents(service) == CONTENTS
    finally:
        service.close()


def test_descriptors_that_run_out_on_the_way_leave_a_layout_where_it_is(service: Service) -> None:
    write(service)
    without = service.descriptors() - len(CONTENTS)

    def settle(place: str) -> None:
        while service.descriptors() != without + (len(CONTENTS) if place != "disk" else 0):
            service.pump(0.01)

    for here, there in (("device", "host"), ("host", "device"), ("device", "disk"), ("disk", "device")):
        for number in range(2):
            settle(here)
            with limited(service, resource.RLIMIT_NOFILE, room_for(service, number)):
                refused = service.move(there)  # type: ignore[arg-type]
            assert refused.error and not refused.lost, (here, there, number)
            assert refused.no_room or there == "disk", refused.error
            assert service.kept["m"][0].place == here
        assert service.move(there).error == "", (here, there)  # type: ignore[arg-type]
    settle("device")
    assert contents(service) == CONTENTS


def test_a_disk_that_fills_up_at_each_file_and_within_one(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "64m,mode=700,nr_inodes=1") as disk:
        service = Service(tmp_path, snapshots=str(disk))
        try:
            write(service)
            inodes = 1
            while (refused := service.move("disk")).error:
                assert "No space left" in refused.error and not refused.lost
                assert list(disk.iterdir()) == []
                inodes += 1
                assert inodes < 10
                subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", disk], check=True)
            assert inodes > 3  # it failed at a directory, at a shard and at a manifest at least
            assert service.move("device").error == ""
            subprocess.run(["mount", "-o", "remount,nr_inodes=100", disk], check=True)
            (snapshot,) = disk.iterdir()
            (snapshot / "manifest.json").unlink()  # it has to be written anew
            with limited(service, resource.RLIMIT_FSIZE, 3 * MIB):
                refused = service.move("disk")
            assert "File too large" in refused.error
            assert contents(service) == CONTENTS
            assert service.move("disk").error == ""
            assert service.move("device").error == ""
            assert contents(service) == CONTENTS
        finally:
            service.close()
