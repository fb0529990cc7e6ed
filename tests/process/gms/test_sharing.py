"""One writes, all read: locks, epochs and refusals."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
from gms_peers import DEADLINE_S, MIB, Engine, Service, patterns

from dynamo_box.protocol import gms

READER = """
import hashlib, mmap, sys
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import connect_unix
from pathlib import Path
c = BlockingFdChannel(connect_unix(Path(sys.argv[1])), gms.server_decoder)
def ask(m):
    c.send(m)
    while isinstance((answer := c.receive(120))[0], gms.Queued): pass
    return answer
granted, _ = ask(gms.Acquire(PROTOCOL_VERSION, "reader", "m", "rw_or_ro", "c", timeout_s=90))
assert granted.lock == "ro", granted
manifest, _ = ask(gms.Describe())
_, fds = ask(gms.Export(tuple(a.id for a in manifest.allocations)))
for fd in fds:
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as m: print(hashlib.blake2b(m).hexdigest(), flush=True)
"""

WRITER = """
import mmap, os, signal, sys
from dynamo_box.protocol import PROTOCOL_VERSION, gms
from dynamo_box.protocol.descriptors import BlockingFdChannel
from dynamo_box.protocol.framing import connect_unix
from pathlib import Path
step = sys.argv[2]
def die_at(here):
    if here == step: os.kill(os.getpid(), signal.SIGKILL)
c = BlockingFdChannel(connect_unix(Path(sys.argv[1])), gms.server_decoder)
def ask(m):
    c.send(m)
    while isinstance((answer := c.receive(120))[0], gms.Queued): pass
    return answer
die_at("connected")
granted, _ = ask(gms.Acquire(PROTOCOL_VERSION, "victim", "m", "rw", "c"))
assert granted.lock == "rw"
die_at("granted")
if step == "allocating":
    c.send(gms.Allocate((16 << 20, 8 << 20))); die_at("allocating")
allocated, fds = ask(gms.Allocate((16 << 20, 8 << 20)))
die_at("allocated")
maps = [mmap.mmap(fd, 0) for fd in fds]
for m in maps: m[:100] = b"x" * 100
die_at("mapped")
ask(gms.Put((gms.Entry("t", 0, 0, "u8", (8,), (1,), 8),)))
die_at("described")
c.send(gms.Commit())
die_at("commit sent with maps alive")
"""


def run_python(source: str, *arguments: str, stdout: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdout=stdout,
        text=True,
    )


def test_what_one_process_writes_others_read(service: Service) -> None:
    from hashlib import blake2b

    contents = patterns(4, 2)
    writer = service.engine()
    granted = writer.acquire("rw_or_ro")
    assert (granted.lock, granted.epoch, granted.granularity) == ("rw", 1, 2 * MIB)
    committed = writer.write(*contents)
    assert (committed.lock, committed.bytes) == ("ro", 6 * MIB)
    readers = [run_python(READER, str(service.path), stdout=subprocess.PIPE) for _ in range(2)]
    for reader in readers:
        out, _ = reader.communicate(timeout=DEADLINE_S)
        assert out.split() == [blake2b(content).hexdigest() for content in contents]
    assert service.kept["m"][0].layout_hash == committed.layout_hash


def test_a_stray_write_is_refused_by_the_kernel(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    writer.write(*patterns(2))
    (descriptor,) = writer.export()
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, 0)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    os.close(again)
    os.close(descriptor)


@pytest.mark.parametrize(
    "step",
    [
        "connected",
        "granted",
        "allocating",
        "allocated",
        "mapped",
        "described",
        "commit sent with maps alive",
    ],
)
def test_a_writer_killed_leaves_nothing_behind(service: Service, step: str) -> None:
    victim = run_python(WRITER, str(service.path), step)
    assert victim.wait(DEADLINE_S) == -signal.SIGKILL
    writer = service.engine()
    # A commit that was sent may have happened: its epoch is whole then, and gives way like any other.
    assert writer.acquire("rw", timeout_s=DEADLINE_S, make_room=True).lock == "rw"
    writer.write(*patterns(64 // 2, 64 // 2))  # all there is: nothing of the victim's is left
    figures = service.layout(lambda layout: layout.state == "committed" and layout.bytes == 64 * MIB)
    assert figures.device_bytes == 64 * MIB
    assert service.engine().acquire("ro").lock == "ro"


def test_the_next_epoch_is_built_beside_and_readers_of_the_one_before_go_on(service: Service) -> None:
    old, new = patterns(2), patterns(2, seed=7)
    first = service.engine("w1")
    first.acquire("rw")
    first.write(*old)
    second = service.engine("w2")
    assert second.acquire("rw_or_ro", content="c2").epoch == 2
    assert first.read() == old
    second.write(*new)
    assert first.read() == old
    assert second.read() == new
    both = service.layout(lambda layout: layout.epoch == 2 and layout.state == "committed")
    assert {reader.owner for reader in both.readers} == {"w1", "w2"}
    assert service.figures_when(lambda figures: figures.device_bytes == 4 * MIB)
    first.close()
    service.figures_when(lambda figures: figures.device_bytes == 2 * MIB)


def test_a_waiter_that_died_is_never_granted(service: Service) -> None:
    writer = service.engine("w1")
    writer.acquire("rw")
    program = WRITER.replace('"rw", "c")', '"rw", "c", timeout_s=120)')
    waiting = run_python(program, str(service.path), "never")
    service.layout(lambda layout: any(waiter.owner == "victim" for waiter in layout.waiters))
    next_ = service.engine("w2")
    next_.send(next_.request("rw", timeout_s=DEADLINE_S))
    service.layout(lambda layout: len(layout.waiters) == 2)
    os.kill(service.process.pid, signal.SIGSTOP)  # so that it learns of the death and of the free lock at once
    waiting.kill()
    waiting.wait(DEADLINE_S)
    writer.close()
    os.kill(service.process.pid, signal.SIGCONT)
    granted, _ = next_.receive()
    assert isinstance(granted, gms.Granted)
    history = service.layout(lambda layout: layout.writer is not None and layout.writer.owner == "w2").history
    assert not any("begun by victim" in event.text for event in history)


def test_who_waits_hears_why_and_is_refused_in_time(service: Service) -> None:
    writer = service.engine("w1")
    writer.acquire("rw")
    other = service.engine("w2")
    assert other.acquire("rw").code == "timeout"
    began = time.monotonic()
    other.send(other.request("rw", timeout_s=1.5))
    queued = []
    while True:
        got = other.channel.receive(DEADLINE_S)
        assert got is not None
        if not isinstance(got[0], gms.Queued):
            break
        queued.append(got[0])
    assert isinstance(got[0], gms.GmsError) and got[0].code == "timeout"
    assert "w1" in got[0].text
    assert time.monotonic() - began >= 1.5
    assert len(queued) == 2 and queued[0].ahead == 0 and "w1" in queued[0].holder


def test_a_commit_with_a_map_alive_is_refused_and_can_be_repeated(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    _, (descriptor,) = writer.allocate(2 * MIB)
    mapped = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    refused = writer.ask(gms.Commit())
    assert isinstance(refused, gms.GmsError) and refused.code == "still_mapped"
    mapped[:4] = b"more"
    mapped.close()
    assert writer.ask(gms.Commit()).lock == "ro"
    assert writer.read()[0][:4] == b"more"


def test_more_than_the_budget_is_refused_whole(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    _, descriptors = writer.allocate(40 * MIB)
    refused = writer.ask(gms.Allocate((8 * MIB, 30 * MIB)))
    assert isinstance(refused, gms.GmsError) and refused.code == "out_of_memory"
    assert service.layout(lambda layout: layout.bytes > 0).bytes == 40 * MIB
    assert writer.ask(gms.Free((0,))) == gms.Done()
    _, more = writer.allocate(8 * MIB, 30 * MIB)
    for descriptor in (*descriptors, *more):
        os.close(descriptor)


def test_no_descriptor_left_is_no_room(service: Service) -> None:
    import resource

    writer = service.engine()
    writer.acquire("rw")
    limit = service.descriptors() + 8
    resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    refused = writer.ask(gms.Allocate((2 * MIB,) * 20))
    assert isinstance(refused, gms.GmsError) and refused.code == "out_of_memory"
    _, descriptors = writer.allocate(2 * MIB)
    assert [os.fstat(one).st_size for one in descriptors] == [2 * MIB]
    os.close(descriptors[0])


def test_room_is_made_only_of_what_nobody_reads(service: Service) -> None:
    first = service.engine("w1")
    first.acquire("rw")
    first.write(*patterns(40))
    second = service.engine("w2")
    second.acquire("rw", make_room=True)
    assert second.ask(gms.Allocate((40 * MIB,))).code == "out_of_memory"
    assert second.ask(gms.Release()) == gms.Done()
    service.layout(lambda layout: len(layout.readers) == 1)
    first.close()
    service.layout(lambda layout: not layout.readers)
    assert second.acquire("rw", make_room=True).lock == "rw"
    assert "m" not in service.kept
    second.write(*patterns(40))


def bad_messages() -> list[tuple[str, object, str]]:
    entry = gms.Entry("a", 0, 0, "u8", (1,), (1,), 1)
    return [
        ("commit without a lock", gms.Commit(), "not_allowed"),
        ("allocate without a lock", gms.Allocate((1,)), "not_allowed"),
        ("describe without a lock", gms.Describe(), "not_allowed"),
        ("release without a lock", gms.Release(), "bad_request"),
        ("another version", gms.Acquire(PROTOCOL_OTHER, "o", "m", "rw"), "version"),
        ("an unknown layout", gms.Acquire(1, "o", "nobody", "rw"), "unknown_layout"),
        ("an owner of great length", gms.Acquire(1, "o" * 1000, "m", "rw"), "bad_request"),
        ("put without a lock", gms.Put((entry,)), "not_allowed"),
    ]


PROTOCOL_OTHER = 99


@pytest.mark.parametrize(
    ("message", "code"), [one[1:] for one in bad_messages()], ids=[one[0] for one in bad_messages()]
)
def test_messages_out_of_order_are_refused(service: Service, message: object, code: str) -> None:
    engine = service.engine()
    assert engine.ask(message).code == code
    assert engine.acquire("rw").lock == "rw"


def test_what_a_writer_may_not_say(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    _, (descriptor,) = writer.allocate(2 * MIB)
    os.close(descriptor)

    def code(message: object) -> str:
        return str(writer.ask(message).code)

    def entry(name: str, allocation: int = 0, offset: int = 0, nbytes: int = 1) -> gms.Entry:
        return gms.Entry(name, allocation, offset, "u8", (1,), (1,), nbytes)

    assert code(gms.Allocate(())) == "bad_request"
    assert code(gms.Allocate((0,))) == "bad_request"
    assert code(gms.Allocate((-5, 10))) == "bad_request"
    assert code(gms.Allocate((1,) * 65)) == "bad_request"
    assert code(gms.Allocate((2**62,))) == "out_of_memory"
    assert code(gms.Free((7,))) == "bad_request"
    assert code(gms.Export((0, 0))) == "bad_request"
    assert code(gms.Acquire(1, "o", "m", "rw")) == "bad_request"
    for wrong in (entry("x", 9), entry("x", 0, 2 * MIB), entry("x", 0, -1), entry("x", 0, 0, -4)):
        again = service.engine("again")
        assert again.acquire("rw", layout="other").lock == "rw"
        _, (one,) = again.allocate(2 * MIB)
        os.close(one)
        assert again.ask(gms.Put((wrong,))) == gms.Done()
        assert again.ask(gms.Commit()).code == "bad_request"
        assert again.ask(gms.Release()) == gms.Done()
        again.close()
    assert writer.ask(gms.Put((entry("a"), entry("a")))) == gms.Done()
    assert code(gms.Commit()) == "bad_request"
    assert service.layout(lambda layout: layout.state == "writing").epoch == 1


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\x00\x00\x04\xff\xff\xff\xff",
        b"\xff\xff\xff\xff" + b"x" * 100,
        b"\x00\x00\x10\x00only the beginning",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x00",
        b"\x00",
    ],
    ids=["no msgpack", "oversized", "truncated", "another protocol", "empty", "half a header"],
)
def test_junk_costs_its_own_connection_only(service: Service, junk: bytes) -> None:
    import socket

    from dynamo_box.protocol.framing import connect_unix

    good = service.engine()
    assert good.acquire("rw").lock == "rw"
    with connect_unix(service.path) as bad:
        bad.sendall(junk)
        bad.shutdown(socket.SHUT_WR)
        bad.settimeout(DEADLINE_S)
        assert bad.recv(100) == b""
    good.write(*patterns(2))


def test_descriptors_that_nobody_asked_for_are_closed(service: Service) -> None:
    import socket

    from dynamo_box.protocol.framing import connect_unix, encode_frame

    service.pump(0.5)
    before = service.descriptors()
    for _ in range(20):
        with connect_unix(service.path) as bad, open("/dev/null") as null:
            socket.send_fds(bad, [encode_frame(gms.Commit())], [null.fileno()] * 5)
            bad.settimeout(DEADLINE_S)
            assert bad.recv(100) == b""
    service.pump_until(lambda: service.descriptors() <= before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(service: Service) -> None:
    for path in (service.path, *service.path.parents):
        if str(path).startswith("/tmp/"):
            path.chmod(0o777)  # so that the check of the uid is all there is
    program = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); os.chdir(os.path.dirname(sys.argv[1]))\n"
        "s.settimeout(30); s.connect(os.path.basename(sys.argv[1])); print(s.recv(10))"
    )
    other = subprocess.run([sys.executable, "-S", "-c", program, str(service.path)], capture_output=True, text=True)
    assert other.stdout.strip() in ("b''", "") and (other.stdout or "ConnectionResetError" in other.stderr), other
    assert service.engine().acquire("rw").lock == "rw"


def test_a_layout_of_many_allocations_and_entries(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    for _ in range(2):
        _, descriptors = writer.allocate(*[1] * 16)
        for descriptor in descriptors:
            os.close(descriptor)
    entries = tuple(gms.Entry(f"t{n}", n % 32, n, "u8", (1,), (1,), 1) for n in range(5000))
    writer.ask(gms.Put(entries[:4096]))
    writer.ask(gms.Put(entries[4096:]))
    assert writer.ask(gms.Commit()).bytes == 64 * MIB
    reader = service.engine()
    reader.acquire("ro")
    first, second = reader.ask(gms.Describe()), reader.ask(gms.Describe(4096))
    assert (first.more, second.more) == (True, False)
    assert first.entries + second.entries == entries
    assert len(service.kept["m"][1]) == 32


def test_a_hundred_comings_and_goings_leave_no_descriptor(service: Service) -> None:
    writer = service.engine()
    writer.acquire("rw")
    writer.write(*patterns(2))
    service.layout(lambda layout: layout.state == "committed")
    before = service.descriptors()
    for _ in range(100):
        reader: Engine = service.engine("r")
        assert reader.acquire("ro").lock == "ro"
        for descriptor in reader.export():
            os.close(descriptor)
        reader.close()
    service.pump_until(lambda: service.descriptors() <= before)


def test_too_many_waiters(service: Service) -> None:
    writer = service.engine("w")
    writer.acquire("rw")
    waiting = [service.engine(f"q{number}") for number in range(64)]
    for one in waiting:
        one.send(one.request("rw", timeout_s=120))
    service.layout(lambda layout: len(layout.waiters) == 64)
    assert service.engine("one more").acquire("rw", timeout_s=120).code == "too_many_waiters"
    for one in waiting:
        one.close()
    service.layout(lambda layout: not layout.waiters)
