"""What goes wrong with disks: the tier turns itself off with a reason, answers at once, and comes back by itself."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_tiers import DEADLINE_S, FAST, FILE_BYTES, LAYOUT, Tier, memory

from dynamo_box.kv.store.disk import Pace


class ChangingPace(Pace):
    """One whose patience the test sets."""

    def lose_patience(self, patience_s: float) -> None:
        object.__setattr__(self, "patience", patience_s)


class BrokenCalls:
    """Of the operating system, in the threads that write and read blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.errors: dict[str, int] = {}
        self.calls = 0

    def __setitem__(self, name: str, number: int) -> None:
        """From now on `os.<name>` fails with that error; 0 ends it."""
        if name not in self.errors:
            real = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                if self.errors[name] and threading.current_thread().name in ("kv-disk-0", "kv-disk-1"):
                    self.calls += 1
                    raise OSError(self.errors[name], os.strerror(self.errors[name]))
                return real(*arguments, **named)

            self._monkeypatch.setattr(os, name, call)
        self.errors[name] = number


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> BrokenCalls:
    return BrokenCalls(monkeypatch)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.EROFS, "read-only"),
        (errno.EIO, "the disk fails"),
        (errno.EACCES, "isn't ours"),
        (errno.ENOENT, "vanished"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "quota"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENODEV, "No such device"),
    ],
)
@pytest.mark.parametrize("call", ["open", "pwritev", "rename", "fstat"])
def test_each_error_at_each_step_of_writing(
    tmp_path: Path, broken: BrokenCalls, call: str, error: int, reason: str
) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            broken[call] = error
            seen: list[str] = []
            written = disk.offer(1)
            assert not isinstance(written, str)
            written.add_done_callback(lambda _: None)
            assert await written is False
            await disk.until(lambda: disk.state == "suspended" or bool(disk.notes))
            seen += [text for level, text in disk.notes if level == "warning"]
            assert reason in seen[0]
            assert not disk.has(1)
            broken[call] = 0
            await disk.ready()
            assert disk.files() == {}
            assert disk.temporaries() == []
            assert await disk.write(1) == [True]
            assert await disk.right(1) == [True]
            assert [level for level, _ in disk.notes] == ["warning", "info"]
            disk.check()

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["open", "preadv", "fstat"])
def test_errors_of_reading(tmp_path: Path, broken: BrokenCalls, call: str) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            await disk.write(*range(10))
            broken[call] = errno.EIO
            result, _ = await disk.read(*range(10))
            assert result.good == [False] * 10
            assert "can't be read" in result.error
            assert disk.known[LAYOUT.name] == set()
            assert not disk.has(5)
            broken[call] = 0
            await disk.ready()
            held = disk.held()
            assert 10 > len(held) >= 6  # those that failed are dropped: the next would fail again
            assert await disk.right(*held) == [True] * len(held)
            disk.check()

    asyncio.run(scenario())


def test_while_it_is_suspended_everything_is_answered_at_once(tmp_path: Path, broken: BrokenCalls) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", pace=dataclasses.replace(FAST, retry=1000.0)) as disk:
            await disk.ready()
            await disk.write(1, 2)
            broken["pwritev"] = errno.EIO
            offered = [disk.offer(number) for number in range(3, 40)]
            assert [await each for each in offered if not isinstance(each, str)] == [False] * len(offered)
            await disk.until(lambda: disk.state == "suspended")
            assert not disk.has(1)
            assert disk.offer(50) == "suspended"
            assert (await disk.read(1))[0].error == "refused"
            assert disk.known[LAYOUT.name] == set()
            assert disk.tier.figures().blocks == 0
            assert disk.tier.clear() == 0

    asyncio.run(scenario())


def test_what_is_cleared_while_it_is_suspended_does_not_come_back(tmp_path: Path, broken: BrokenCalls) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            await disk.write(1, 2)
            broken["pwritev"] = errno.EIO
            assert await disk.write(3) == [False]
            await disk.until(lambda: disk.state == "suspended")
            disk.tier.clear()
            broken["pwritev"] = 0
            await disk.ready()
            await disk.until(lambda: disk.held() == set() and disk.tier.figures().used_bytes == 0)
            assert await disk.write(1) == [True]
            disk.check()

    asyncio.run(scenario())


def test_a_disk_that_others_fill_shrinks_the_tier_which_grows_again(small_disk: Path) -> None:
    async def scenario() -> None:
        ballast = small_disk / "ballast"
        async with Tier(small_disk / "kv", blocks=1000) as disk:
            await disk.ready()
            await disk.write(*range(20))
            fill(ballast)
            for number in range(20, 60):
                await disk.write(number)
            assert disk.state == "on"
            assert re.fullmatch(r"the disk has room for .+ of its .+", disk.reason)
            assert [level for level, _ in disk.notes] == ["warning"]
            assert "full" in disk.notes[0][1]
            figures = disk.tier.figures()
            assert figures.evicted
            assert figures.dropped["disk_full"] <= 4
            assert 59 in disk.held()
            held = disk.held()
            assert 10 < len(held) <= 22
            assert await disk.right(*held) == [True] * len(held)
            ballast.unlink()
            await disk.until(lambda: disk.offer(100) != "capacity" and disk.tier.room > 40 * FILE_BYTES)
            await disk.write(*range(200, 220))
            assert len(disk.held()) > len(held)
        async with Tier(small_disk / "kv", blocks=20) as disk:
            await disk.ready()
            assert disk.reason == "", "as much as it may take is there"

    asyncio.run(scenario())


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    async def scenario() -> None:
        ballast = small_disk / "ballast"
        fill(ballast)
        async with Tier(small_disk / "kv", blocks=10) as disk:
            await disk.until(lambda: "full" in disk.reason)
            assert disk.state == "suspended"
            ballast.unlink()
            await disk.ready()
            assert await disk.write(1) == [True]
            assert [level for level, _ in disk.notes] == ["warning", "info"]

    asyncio.run(scenario())


def test_a_disk_with_any_number_of_pages_left(small_disk: Path) -> None:
    """Wherever in the course of a write it becomes full, nothing half is left and all that is there is right."""

    async def scenario() -> None:
        ballast = small_disk / "ballast"
        async with Tier(small_disk / "kv", blocks=1000) as disk:
            await disk.ready()
            for pages in range(12):
                fill(ballast)
                os.truncate(ballast, max(0, ballast.stat().st_size - pages * 4096))
                for number in range(pages * 10, pages * 10 + 5):
                    offered = disk.offer(number)
                    written = False if isinstance(offered, str) else await offered
                    assert written == disk.has(number)
                ballast.unlink()
                await disk.ready()
                held = disk.held()
                assert await disk.right(*held) == [True] * len(held)
                assert disk.temporaries() == []
                disk.check()

    asyncio.run(scenario())


def test_read_only_then_writable(small_disk: Path) -> None:
    async def scenario() -> None:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        async with Tier(small_disk / "kv") as disk:
            await disk.until(lambda: "read-only" in disk.reason)
            assert disk.offer(1) == "suspended"
            subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
            await disk.ready()
            assert await disk.write(1) == [True]

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced", "idle"])
def test_the_directory_goes_and_comes_back(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        path = tmp_path / "kv"
        async with Tier(path) as disk:
            await disk.ready()
            await disk.write(1, 2)
            if how in ("renamed", "replaced"):
                path.rename(tmp_path / "away")
            else:
                shutil.rmtree(path)
            if how == "replaced":
                path.mkdir(mode=0o700)
            if how == "deleted":
                assert (await disk.read(1))[0].good == [False]
            await disk.until(lambda: bool(disk.notes))  # it looks now and then, whether or not it is used
            assert disk.notes[0][1].endswith(("vanished", "replaced"))
            await disk.until(lambda: len(disk.notes) == 2)  # made anew
            await disk.ready()
            assert disk.held() == set()
            assert disk.known[LAYOUT.name] == set()
            assert await disk.write(1) == [True]
            disk.check()

    asyncio.run(scenario())


def test_a_layout_that_is_deleted_below_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            await disk.write(1, 2)
            shutil.rmtree(tmp_path / "kv" / LAYOUT.name)
            assert await disk.right(1) == [False]
            await disk.write(3)
            await disk.ready()
            assert await disk.write(4) == [True]
            assert await disk.right(4) == [True]

    asyncio.run(scenario())


def test_directories_that_are_not_to_be_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "real").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o755)
        (tmp_path / "file").write_bytes(b"")
        for name, word in (("link", "symbolic link"), ("open", "chmod it to 700"), ("file", "Not a directory")):
            async with Tier(tmp_path / name) as disk:
                await disk.until(lambda disk=disk, word=word: word in disk.reason)
                assert disk.state == "suspended"
                assert [level for level, _ in disk.notes] == ["warning"]
        assert list((tmp_path / "real").iterdir()) == list((tmp_path / "open").iterdir()) == []
        async with Tier(tmp_path / "open") as disk:
            await disk.until(lambda: disk.state == "suspended" and "chmod" in disk.reason)
            (tmp_path / "open").chmod(0o700)
            await disk.ready()

    asyncio.run(scenario())


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = ChangingPace(**dataclasses.asdict(FAST))
    release, hanging = threading.Event(), threading.Semaphore(0)

    def slow(call: Callable[..., int]) -> Callable[..., int]:
        def late(*arguments: Any) -> int:
            if threading.current_thread().name != "kv-disk-keeper-0":
                hanging.release()
                release.wait()
            return call(*arguments)

        return late

    async def scenario() -> None:
        async with Tier(tmp_path / "kv", pace=pace) as disk:
            await disk.ready()
            await disk.write(1)
            monkeypatch.setattr(os, "pwritev", slow(os.pwritev))
            monkeypatch.setattr(os, "preadv", slow(os.preadv))
            hung, waiting = disk.offer(2), [disk.offer(number) for number in range(3, 60)]
            reading, behind = asyncio.ensure_future(disk.read(1)), asyncio.ensure_future(disk.read(1))
            for _ in range(2):  # both threads are at it
                await asyncio.to_thread(hanging.acquire, timeout=DEADLINE_S)
            pace.lose_patience(0.1)
            await disk.until(lambda: disk.state == "suspended")
            assert (await behind)[0].good == [False]  # no thread ever was at it
            assert not reading.done()
            assert "hasn't answered" in disk.reason
            assert disk.offer(90) == "suspended"
            assert (await disk.read(1))[0].good == [False]
            assert not isinstance(hung, str)
            assert not hung.done()  # the thread still reads its memory
            assert any(not isinstance(each, str) and each.done() and not each.result() for each in waiting)
            monkeypatch.undo()
            pace.lose_patience(FAST.patience)
            release.set()
            assert (await reading)[0].good == [True]  # late, but right
            assert await hung is False
            await disk.ready()
            assert disk.has(1)
            assert {2, 1} & disk.held()
            held = disk.held()
            assert await disk.right(*held) == [True] * len(held)
            disk.check()

    try:
        asyncio.run(scenario())
    finally:
        release.set()


HANGS = """
import asyncio, os, sys, threading
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from disk_tiers import Tier

async def main():
    disk = Tier(Path(sys.argv[2]))
    async with disk:
        await disk.ready()
        os.pwritev = lambda *_: threading.Event().wait()
        disk.offer(1)
        await disk.tier.close(0.05)
    print("over", flush=True)

asyncio.run(main())
"""


def test_a_disk_that_never_answers_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(Path(__file__).parent), str(tmp_path / "kv")],
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=True,
    )
    assert ended.stdout == b"over\n"


def test_two_boxes_on_one_directory(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv", owner="box one") as one:
            await one.ready()
            await one.write(1, 2)
            async with Tier(tmp_path / "kv", owner="box two") as two:
                await two.until(lambda: f"in use by box one (pid {os.getpid()} on " in two.reason)
                assert two.state == "suspended"
                assert two.offer(3) == "suspended"
                assert not two.has(1)
                assert [level for level, _ in two.notes] == ["warning"]
                await one.write(3)
                await one.tier.close(1.0)
                await two.ready()
                assert two.held() == {1, 2, 3}
                assert await two.right(1, 2, 3) == [True] * 3
                assert [level for level, _ in two.notes] == ["warning", "info"]
                two.check()

    asyncio.run(scenario())


HOLDS = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from disk_tiers import Tier

async def main():
    async with Tier(Path(sys.argv[2]), owner="the other box", blocks=100) as disk:
        await disk.ready()
        number = 0
        print("ready", flush=True)
        while True:
            await disk.write(*range(number, number + 32))
            number += 32

asyncio.run(main())
"""


def test_the_other_box_is_killed_while_it_writes(tmp_path: Path) -> None:
    async def scenario() -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(Path(__file__).parent), str(tmp_path / "kv")], stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            assert await asyncio.to_thread(holder.stdout.readline) == b"ready\n"
            async with Tier(tmp_path / "kv", blocks=100) as disk:
                await disk.until(lambda: f"the other box (pid {holder.pid} on" in disk.reason)
                await disk.until(lambda: len(disk.files()) > 50)
                holder.send_signal(signal.SIGKILL)
                await disk.ready()
                held = disk.held()
                assert await disk.right(*held) == [True] * len(held)
                assert disk.temporaries() == []
                assert json.loads((tmp_path / "kv" / "lock").read_text())["owner"] == "box one"
                disk.check()
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()

    asyncio.run(scenario())


def test_a_lock_that_somebody_deletes_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            (tmp_path / "kv" / "lock").unlink()
            await disk.until(lambda: len(disk.notes) == 2)
            await disk.ready()
            assert (tmp_path / "kv" / "lock").exists()

    asyncio.run(scenario())


def test_a_bug_does_not_end_the_tier_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with Tier(tmp_path / "kv") as disk:
            await disk.ready()
            with monkeypatch.context() as patch:
                patch.setattr("dynamo_box.kv.store.disk_writes.write_block", lambda *_, **__: memory(b"x" * 10**6))
                patch.setattr("dynamo_box.kv.store.disk_writes.BlockId", None)
                assert await disk.write(1) == [False]
                await disk.until(lambda: "a bug: TypeError" in "".join(text for _, text in disk.notes))
            await disk.ready()
            assert await disk.write(1) == [True]

    asyncio.run(scenario())


def fill(path: Path) -> None:
    """Until there is no page left."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
