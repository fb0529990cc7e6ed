"""A worker's role, which is nothing but what router and frontend send it, and how it changes while the process lives.

    serving as one ──SetRole──► finishing what runs, withdrawn, refusing new ──nothing in flight──► serving as the other

The engine knows nothing of it: weights and KV stay where they are. With requests left at the deadline the worker serves
on in the role that it had. One that sleeps has nothing to finish: it has the new role when it wakes. The end of the
process (Stop, Drain, TERM, no supervisor) interrupts a change.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from dynamo_box.protocol import status
from engines.contract import DISAGG, EngineInfo
from engines.log import get_logger
from engines.shell_announce import Announcement
from engines.shell_requests import Requests

LEGS = ("prefill", "decode")
ROLES = (*LEGS, "aggregated")
LONGEST_S = 86_400.0
CHANGING = "worker is changing its role"

log = get_logger()


class Host(Protocol):
    """What the worker around it lends."""

    def send(self, message: status.ChildMessage) -> None: ...

    def fatal(self, cause: str) -> None: ...


class Role:
    def __init__(self, host: Host, info: EngineInfo, requests: Requests, announcement: Announcement) -> None:
        self._host = host
        self._serves_legs = DISAGG in info.capabilities
        self._requests = requests
        self._announcement = announcement
        self._task: asyncio.Task[None] | None = None

    @property
    def now(self) -> str:
        return self._announcement.role

    @property
    def changing(self) -> bool:
        return self._task is not None

    def set(self, message: status.SetRole, *, asleep: bool) -> None:
        """Begin to change it, or answer at once. The worker is not between sleeping and waking."""
        error = self._why_not(message.role)
        if error:
            self._host.send(status.Answer(message.id, error=error))
        elif asleep or message.role == self.now:
            self._announcement.role = message.role
            self._answer(message)
        else:
            self._task = asyncio.get_running_loop().create_task(self._change(message))
            self._task.add_done_callback(self._done)

    def abandon(self) -> None:
        """The process ends: what it refuses and announces is no longer decided here."""
        if self._task is not None:
            self._task.cancel()

    def _why_not(self, role: str) -> str:
        if self.changing:
            return f"the {CHANGING}"
        if role not in ROLES:
            return f"role {role!r} is not one of {', '.join(ROLES)}"
        if role in LEGS and not self._serves_legs:
            return f"this worker's engine can't serve as {role}: it has no KV tiers, or does nothing with them"
        return ""

    async def _change(self, message: status.SetRole) -> None:
        self._announcement.withdraw()
        self._requests.refuse_new(CHANGING)
        idle = await self._requests.idle(min(max(0.0, message.drain_s), LONGEST_S))
        left = self._requests.in_flight
        if idle:
            log.info("another role", before=self.now, now=message.role)
            self._announcement.role = message.role
        self._requests.accept()
        try:
            self._announcement.renew()
        except OSError as error:  # it tries again by itself
            log.error("the instance file can't be written", error=str(error))
        self._task = None  # what is asked for next, on hearing the answer, may begin
        if idle:
            self._answer(message)
        else:
            text = f"{left} requests still run after {message.drain_s:g} s: it serves on as {self.now}"
            self._host.send(status.Answer(message.id, error=text))

    def _answer(self, message: status.SetRole) -> None:
        self._host.send(status.Answer(message.id, text=f"serves as {message.role}"))

    def _done(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the change of the role failed", error=f"{type(error).__name__}: {error}")
            self._host.fatal(f"{type(error).__name__}: {error}")
