"""Layouts on their way between device, host and disk; lives of the service that end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gms_peers import DEADLINE_S, MIB, Engine, Service, patterns

from dynamo_box.protocol import gms, status

CONTENTS = patterns(4, 2)


@pytest.fixture
def written(service: Service) -> Service:
    """A layout of 6 MiB that nobody holds."""
    write(service)
    return service


def write(service: Service, contents: list[bytes] = CONTENTS, **changes: str) -> gms.Granted:
    writer = service.engine()
    assert writer.acquire("rw", timeout_s=DEADLINE_S, **changes).lock == "rw"
    granted = writer.write(*contents)
    assert writer.ask(gms.Release()) == gms.Done()
    writer.close()
    return granted


def contents(service: Service, layout: str = "m") -> list[bytes]:
    reader = service.engine("reader")
    granted = reader.acquire("ro", layout=layout)
    assert isinstance(granted, gms.Granted), granted
    found = reader.read()
    assert reader.ask(gms.Release()) == gms.Done()
    reader.close()
    return found


@pytest.mark.parametrize("place", ["host", "disk"])
def test_there_and_back_with_equal_bytes(written: Service, place: gms.Place) -> None:
    layout_hash = written.kept["m"][0].layout_hash
    moved = written.move(place)
    assert (moved.error, moved.bytes) == ("", 6 * MIB)
    assert list(moved.phases) == (["copy", "keep"] if place == "host" else ["write", "verify", "keep"])
    record, descriptors = written.kept["m"]
    assert (record.place, len(descriptors)) == (place, 2 if place == "host" else 0)
    figures = written.layout(lambda layout: layout.place == place)
    assert (figures.device_bytes, figures.host_bytes + figures.disk_bytes) == (0, 6 * MIB)
    reader = written.engine("reader")
    assert reader.acquire("ro").code == "asleep"
    back = written.move("device")
    assert back.error == ""
    assert list(back.phases) == (["copy", "keep"] if place == "host" else ["read", "keep"])
    assert contents(written) == CONTENTS
    assert written.kept["m"][0].layout_hash == layout_hash
    assert reader.acquire("ro", expect_hash=layout_hash).lock == "ro"


def test_from_host_to_disk_and_to_host_again(written: Service) -> None:
    for place in ("host", "disk", "host", "device"):
        assert written.move(place).error == ""
    assert contents(written) == CONTENTS


def test_to_where_it_is(written: Service) -> None:
    moved = written.move("device")
    assert (moved.error, moved.phases) == ("", {})


def test_a_snapshot_that_is_there_is_verified_and_not_written_again(written: Service) -> None:
    written.move("disk")
    written.move("device")
    (directory,) = written.snapshots.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert list(written.move("disk").phases) == ["verify", "keep"]
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_layout_in_use_stays_and_says_who_uses_it(written: Service) -> None:
    reader = written.engine("worker-7")
    reader.acquire("ro")
    refused = written.move("host")
    assert "in use" in refused.error
    assert len(refused.holders) == 1 and "worker-7" in refused.holders[0] and str(os.getpid()) in refused.holders[0]
    assert reader.read() == CONTENTS


def test_what_is_not_there(service: Service) -> None:
    assert "nothing is committed" in service.move("host").error
    assert "nothing is committed" in service.move("host", "nobody").error


def test_a_cold_start_replaces_what_sleeps(written: Service) -> None:
    written.move("host")
    writer = written.engine("cold")
    assert writer.acquire("rw_or_ro").lock == "rw"
    writer.write(*CONTENTS)
    figures = written.figures_when(lambda figures: figures.host_bytes == 0 and figures.device_bytes == 6 * MIB)
    assert figures.layouts[0].place == "device"


def test_a_full_host_refuses_and_the_layout_stays(tmp_path: Path) -> None:
    service = Service(tmp_path, host_capacity_bytes=5 * MIB)
    try:
        write(service)
        assert "host" in service.move("host").error
        assert contents(service) == CONTENTS
        assert service.figures_when(lambda figures: figures.host_bytes == 0)
    finally:
        service.close()


def test_no_room_on_the_device_to_come_back_to(written: Service) -> None:
    written.move("host")
    write(written, patterns(60), layout="other")
    refused = written.move("device")
    assert "device" in refused.error and not refused.lost
    assert written.layout(lambda layout: layout.place == "host").host_bytes == 6 * MIB
    assert written.move("disk", "other").error == ""
    assert written.move("device").error == ""
    assert contents(written) == CONTENTS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", path], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_refuses_and_the_layout_stays(tmp_path: Path, small_disk: Path) -> None:
    service = Service(tmp_path, snapshots=str(small_disk))
    try:
        write(service)
        refused = service.move("disk")
        assert "free" in refused.error
        assert list(small_disk.iterdir()) == []
        assert contents(service) == CONTENTS
    finally:
        service.close()


def flip_a_bit(directory: Path) -> None:
    with (directory / "shard-00000.bin").open("r+b") as file:
        file.seek(5 * MIB)
        byte = file.read(1)[0]
        file.seek(5 * MIB)
        file.write(bytes([byte ^ 1]))


def truncate(directory: Path) -> None:
    os.truncate(directory / "shard-00000.bin", 3 * MIB)


def lose_the_shard(directory: Path) -> None:
    (directory / "shard-00000.bin").unlink()


def lose_all(directory: Path) -> None:
    shutil.rmtree(directory)


def spoil_the_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch":1', b'"epoch":2'))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_the_shard, lose_all, spoil_the_manifest])
def test_a_damaged_snapshot_is_lost_and_the_model_can_be_written_anew(
    written: Service, damage: Callable[[Path], None]
) -> None:
    written.move("disk")
    (directory,) = written.snapshots.iterdir()
    damage(directory)
    moved = written.move("device")
    assert moved.lost and str(directory) in moved.error
    assert "m" not in written.kept
    figures = written.layout(lambda layout: layout.state == "empty")
    assert (figures.bytes, figures.device_bytes, figures.disk_bytes) == (0, 0, 0)
    write(written)
    assert written.move("disk").error == ""
    assert written.move("device").error == ""
    assert contents(written) == CONTENTS


def test_a_snapshot_of_another_layout_is_refused(written: Service) -> None:
    write(written, patterns(4, 2, seed=9), layout="other", content="other")
    written.move("disk")
    (mine,) = written.snapshots.iterdir()
    written.move("disk", "other")
    (others,) = (path for path in written.snapshots.iterdir() if path != mine)
    shutil.rmtree(mine)
    shutil.copytree(others, mine)
    moved = written.move("device")
    assert moved.lost and "another layout" in moved.error


def test_fifty_moves_leave_no_descriptor(written: Service) -> None:
    for place in ("host", "disk", "device"):
        written.move(place)
    before = written.descriptors()
    for _ in range(10):
        for place in ("host", "device", "disk", "host", "device"):
            assert written.move(place).error == ""
    written.pump_until(lambda: written.descriptors() <= before)
    assert contents(written) == CONTENTS
    figures = written.figures_when(lambda figures: (figures.device_bytes, figures.host_bytes) == (6 * MIB, 0))
    assert len(figures.layouts[0].history) == 32


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_successor_has_what_was_committed(written: Service, place: gms.Place) -> None:
    assert written.move(place).error == ""
    written.kill()
    written.start()
    figures = written.layout(lambda layout: layout.state == "committed")
    assert (figures.place, figures.bytes, figures.epoch) == (place, 6 * MIB, 1)
    assert any("adopted" in event.text for event in figures.history)
    assert written.move("device").error == ""
    assert contents(written) == CONTENTS


def test_readers_of_a_killed_service_go_on_and_its_successor_serves_the_same(written: Service) -> None:
    reader = written.engine()
    before = reader.acquire("ro")
    descriptors = reader.export()
    written.kill()
    assert [os.pread(one, 16, 0) for one in descriptors] == [content[:16] for content in CONTENTS]
    written.start()
    again = written.engine("again")
    assert again.acquire("rw_or_ro", expect_hash=before.layout_hash) == before
    for one, other in zip(descriptors, again.export(), strict=True):
        assert os.fstat(one).st_ino == os.fstat(other).st_ino  # mapped again, not loaded again
        os.close(one)
        os.close(other)


def test_a_service_killed_while_a_writer_writes(written: Service) -> None:
    writer = written.engine("w2")
    assert writer.acquire("rw", content="c2").epoch == 2
    _, descriptors = writer.allocate(2 * MIB)
    for descriptor in descriptors:
        os.close(descriptor)
    written.kill()
    written.start()
    assert contents(written) == CONTENTS
    second = written.engine("w3")
    assert second.acquire("rw_or_ro", content="c2").epoch == 2
    second.write(*patterns(2))
    assert written.figures_when(lambda figures: figures.device_bytes == 2 * MIB)


def test_a_service_killed_before_the_supervisor_says_that_it_keeps_the_epoch(written: Service) -> None:
    written.keeps_answers = False
    writer = written.engine("w2")
    writer.acquire("rw", content="c2")
    _, (descriptor,) = writer.allocate(2 * MIB)
    os.close(descriptor)
    writer.send(gms.Commit())
    written.pump_until(lambda: written.kept["m"][0].content == "c2")
    written.kill()
    written.keeps_answers = True
    written.start()
    again = written.engine("w2")
    granted: gms.Granted = again.acquire("rw_or_ro", content="c2")
    assert (granted.lock, granted.epoch) == ("ro", 2)


def test_what_the_predecessor_left_of_a_snapshot_is_removed(service: Service) -> None:
    other = service.snapshots
    write(service, layout="other")
    service.move("disk", "other")
    (directory,) = other.iterdir()
    leftover = directory.with_name(f"{directory.name}.saving-0123456789abcdef")
    shutil.copytree(directory, leftover)
    stranger = other / "somebody's"
    stranger.mkdir()
    service.kill()
    service.start()
    assert sorted(other.iterdir()) == sorted([directory, stranger])


def test_the_status_socket_is_answered(service: Service) -> None:
    service.status.send(status.Set(5, "colour", "blue"))
    assert "colour" in service.expect(status.Answer).error
    service.status.send(status.Drain(10.0))
    assert service.expect(status.Draining).in_flight == 0
    assert service.process.wait(DEADLINE_S) == 0


def test_it_stops_when_told_and_when_the_supervisor_is_gone(service: Service) -> None:
    service.status.send(status.Stop())
    assert service.process.wait(DEADLINE_S) == 0
    service.kill()
    service.start()
    service.status.close()
    assert service.process.wait(DEADLINE_S) == 0


def test_figures_come_at_a_measured_pace(service: Service) -> None:
    import time

    service.expect(status.Report)
    began, reports = time.monotonic(), 0
    engine: Engine = service.engine()
    while time.monotonic() - began < 3 or not reports:
        engine.acquire("rw")
        engine.ask(gms.Release())
        service.pump(0.001)
        reports += sum(isinstance(message, status.Report) for message in service.messages)
        service.messages.clear()
    assert 1 <= reports <= 4 * (time.monotonic() - began) + 2
