"""The supervisor's beat goes on, whatever it meets, and says what it met."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from dynamo_box.supervisor.lock import Holder, RunDirLock
from dynamo_box.supervisor.sdnotify import Notifier
from dynamo_box.supervisor.supervision import Supervision


class Events:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, level: str, process: str | None, text: str) -> None:
        self.texts.append(f"{level}: {text}")


class FailingBox:
    """Its tick fails twice in one way, then in another, then works."""

    def __init__(self, beaten: asyncio.Event) -> None:
        self.events = Events()
        self._errors: list[Exception] = [OSError("gone"), OSError("gone"), KeyError("x")]
        self._beaten = beaten

    def tick(self) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self._beaten.set()


def test_a_beat_that_fails_is_said_once_and_the_next_one_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    lock = RunDirLock.acquire(tmp_path / "lock", Holder(os.getpid(), "test"))

    async def scenario() -> Events:
        beaten = asyncio.Event()
        supervision = Supervision.__new__(Supervision)
        box = FailingBox(beaten)
        supervision.__dict__.update(_box=box, _own_log=None, _notifier=Notifier(), _lock=lock)
        beat = asyncio.create_task(supervision._beat())
        await asyncio.wait_for(beaten.wait(), 30)
        beat.cancel()
        return box.events

    said = asyncio.run(scenario()).texts
    lock.release()
    assert [text.partition("everything: ")[2] for text in said] == ["OSError('gone')", "KeyError('x')"]
