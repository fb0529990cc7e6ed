"""One layout: who may read it, who writes it, who waits, and where its bytes are. No I/O.

The epoch that is committed may have any number of readers. One writer at a time builds the next epoch beside it, and
replaces it at the commit; those who read the one before go on doing so until they leave. So a writer waits for
writers only, and a reader for a commit only: nobody is starved, and nobody who waits stands in another's way except
writers in the order in which they came.

Every method that may change who holds what returns the effects, in order, for the caller to carry out. A waiter is
asked whether it lives at the very moment it is granted the lock (`alive`): a lock given to the dead is lost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dynamo_box.gms.epoch import Epoch
from dynamo_box.protocol.figures import LayoutEvent, LockHolder
from dynamo_box.protocol.gms import Acquire, ErrorCode, Place

MAX_WAITERS = 64
MAX_TIMEOUT_S = 600.0
MAX_HISTORY = 32


# Effects


@dataclass(frozen=True)
class Grant:
    """`holder` has the lock on `epoch` from now on."""

    holder: int
    lock: Literal["rw", "ro"]
    epoch: Epoch


@dataclass(frozen=True)
class Refuse:
    holder: int
    code: ErrorCode
    text: str


@dataclass(frozen=True)
class Dead:
    """This waiter was to be granted the lock and was found dead."""

    holder: int


@dataclass(frozen=True)
class Discard:
    """Nobody needs the bytes of `epoch` any more. `forget`: it was the committed one, and nothing replaces it."""

    epoch: Epoch
    forget: bool = False


Effect = Grant | Refuse | Dead | Discard


@dataclass(eq=False)
class _Party:
    """A connection that holds or awaits a lock. `since` is Unix time."""

    id: int
    request: Acquire
    pid: int
    since: float
    epoch: Epoch | None = None

    @property
    def who(self) -> str:
        return f"{self.request.owner or 'somebody'} (pid {self.pid})"

    def figures(self, lock: str) -> LockHolder:
        return LockHolder(self.request.owner, self.pid, lock, self.since)


class Layout:
    """The lock table of one layout. Parties are named by numbers that the caller gives out.

    `alive(id)` tells whether a waiter still lives; `now()` is Unix time, for people; deadlines are the caller's to
    watch (`expire`).
    """

    def __init__(self, name: str, alive: Callable[[int], bool], now: Callable[[], float]) -> None:
        self.name = name
        self.committed: Epoch | None = None
        self.history: deque[LayoutEvent] = deque(maxlen=MAX_HISTORY)
        self.moving: Place | Literal[""] = ""
        """The place that the committed epoch is on its way to."""
        self._alive = alive
        self._now = now
        self._writer: _Party | None = None
        self._committing = False
        self._readers: dict[int, _Party] = {}
        self._waiters: dict[int, _Party] = {}
        self._last_number = 0

    # What is

    @property
    def state(self) -> Literal["empty", "writing", "committed"]:
        if self._writer is not None:
            return "writing"
        return "committed" if self.committed is not None else "empty"

    @property
    def building(self) -> Epoch | None:
        return self._writer.epoch if self._writer is not None else None

    @property
    def idle(self) -> bool:
        """Nothing is lost if the layout is not remembered."""
        return self.committed is None and not (self._writer or self._readers or self._waiters or self.moving)

    @property
    def writer(self) -> LockHolder | None:
        return self._writer.figures("rw") if self._writer else None

    @property
    def readers(self) -> tuple[LockHolder, ...]:
        return tuple(reader.figures("ro") for reader in self._readers.values())

    @property
    def waiters(self) -> tuple[LockHolder, ...]:
        return tuple(waiter.figures(waiter.request.lock) for waiter in self._waiters.values())

    @property
    def waiting(self) -> tuple[int, ...]:
        return tuple(self._waiters)

    @property
    def holders(self) -> tuple[str, ...]:
        """Who stands in the way of moving it."""
        parties = [self._writer] if self._writer else []
        return tuple(party.who for party in (*parties, *self._readers.values()))

    def held_by(self, holder: int) -> tuple[Literal["rw", "ro"], Epoch] | None:
        if self._writer is not None and self._writer.id == holder:
            assert self._writer.epoch is not None
            return "rw", self._writer.epoch
        reader = self._readers.get(holder)
        if reader is not None:
            assert reader.epoch is not None
            return "ro", reader.epoch
        return None

    def queue_of(self, waiter: int) -> tuple[int, str]:
        """How many wait before this one, and what is in the way."""
        ahead = list(self._waiters).index(waiter)
        if self._writer is not None:
            return ahead, f"{self._writer.who} writes it"
        if self.moving:
            return ahead, f"it is on its way to {self.moving}"
        return ahead, "nobody has written it yet"

    def note(self, text: str) -> None:
        self.history.append(LayoutEvent(self._now(), text))

    # Locks

    def acquire(self, holder: int, request: Acquire, pid: int) -> list[Effect]:
        """The caller has not asked for, nor got, a lock here before."""
        assert self.held_by(holder) is None and holder not in self._waiters
        self._waiters[holder] = _Party(holder, request, pid, self._now())
        effects = self._grant()
        if holder not in self._waiters:
            return effects
        if timeout_of(request) == 0:
            return effects + self.expire(holder)
        if len(self._waiters) > MAX_WAITERS:
            del self._waiters[holder]
            effects.append(Refuse(holder, "too_many_waiters", f"{MAX_WAITERS} wait for {self.name} already"))
        return effects

    def expire(self, waiter: int) -> list[Effect]:
        """Its time to wait is over."""
        if waiter not in self._waiters:
            return []
        ahead, reason = self.queue_of(waiter)
        party = self._waiters.pop(waiter)
        return [
            Refuse(
                waiter,
                "timeout",
                f"no {party.request.lock} lock on {self.name} within {timeout_of(party.request):g} s: {reason}"
                + (f", {ahead} wait before" if ahead else ""),
            )
        ]

    def leave(self, holder: int) -> list[Effect]:
        """It gives back its lock or its place in the queue, or is gone. A commit under way is decided without it."""
        if self._waiters.pop(holder, None) is not None:
            return []
        reader = self._readers.pop(holder, None)
        if reader is not None:
            assert reader.epoch is not None
            return self._retire(reader.epoch)
        if self._writer is None or self._writer.id != holder or self._committing:
            return []
        return self._abandon()

    def begin_commit(self) -> Epoch:
        """From here until `end_commit` the writer can't leave."""
        assert self._writer is not None and self._writer.epoch is not None and not self._committing
        self._committing = True
        return self._writer.epoch

    def end_commit(self, error: str = "", *, writer_gone: bool = False) -> list[Effect]:
        """With an error the epoch stays under construction, unless its writer is gone meanwhile."""
        assert self._writer is not None and self._committing
        self._committing = False
        writer, epoch = self._writer, self._writer.epoch
        assert epoch is not None
        if error:
            self.note(f"epoch {epoch.number} of {writer.who} not committed: {error}")
            return self._abandon() if writer_gone else []
        self._writer = None
        before, self.committed = self.committed, epoch
        self.note(f"epoch {epoch.number} committed by {writer.who}: {_mebibytes(epoch.bytes)}")
        effects: list[Effect] = self._retire(before) if before is not None else []
        if not writer_gone:
            writer.since = self._now()
            self._readers[writer.id] = writer
            effects.append(Grant(writer.id, "ro", epoch))
        return effects + self._grant()

    # The epoch as a whole

    def adopt(self, epoch: Epoch) -> None:
        """A predecessor had committed this."""
        assert self.idle
        self.committed = epoch
        self._last_number = max(self._last_number, epoch.number)
        self.note(f"epoch {epoch.number} adopted from an earlier life of the service, on {epoch.place}")

    def begin_move(self, place: Place) -> str:
        """Nobody is granted anything until `end_move`. Returns what is in the way, or ""."""
        if self.moving:
            return f"{self.name} is on its way to {self.moving} already"
        if self.committed is None:
            return f"nothing is committed as {self.name}"
        if self._writer or self._readers:
            return f"{self.name} is in use"
        self.moving = place
        return ""

    def end_move(self, epoch: Epoch | None, text: str) -> list[Effect]:
        """`epoch` is what is committed now: the same bytes elsewhere, or nothing; what was before is the caller's."""
        assert self.moving
        self.moving = ""
        self.committed = epoch
        self.note(text)
        return self._grant()

    def _grant(self) -> list[Effect]:
        effects: list[Effect] = []
        for waiter in list(self._waiters.values()):
            answer = self._answer(waiter.request)
            if answer is None:
                continue
            del self._waiters[waiter.id]
            if not self._alive(waiter.id):
                self.note(f"{waiter.who} died while it waited")
                effects.append(Dead(waiter.id))
            elif isinstance(answer, tuple):
                effects.append(Refuse(waiter.id, *answer))
            elif answer == "ro":
                assert self.committed is not None
                waiter.epoch, waiter.since = self.committed, self._now()
                self._readers[waiter.id] = waiter
                effects.append(Grant(waiter.id, "ro", self.committed))
            else:
                effects += self._let_write(waiter)
        return effects

    def _answer(self, request: Acquire) -> Literal["rw", "ro"] | tuple[ErrorCode, str] | None:
        """What a waiter can be told now; None while it has to wait on."""
        if self.moving:
            return None
        committed, free = self.committed, self._writer is None
        if request.lock == "ro":
            return self._answer_reader(request.expect_hash)
        if (
            request.lock == "rw_or_ro"
            and committed is not None
            and committed.content == request.content
            and committed.place == "device"
        ):
            return "ro"
        return "rw" if free else None

    def _answer_reader(self, expected: str) -> Literal["ro"] | tuple[ErrorCode, str] | None:
        committed = self.committed
        if committed is None:
            if expected and self._writer is None:
                return "stale", f"{self.name} is empty, and nobody writes it"
            return None
        if expected and committed.layout_hash != expected:
            return "stale", f"{self.name} is another layout than the one expected ({committed.layout_hash})"
        if committed.place != "device":
            return "asleep", f"{self.name} is on {committed.place}"
        return "ro"

    def _let_write(self, writer: _Party) -> list[Effect]:
        effects: list[Effect] = []
        if writer.request.make_room and self.committed is not None and not self._read(self.committed):
            given_up, self.committed = self.committed, None
            self.note(f"epoch {given_up.number} given up, to make room for the next")
            effects.append(Discard(given_up, forget=True))
        self._last_number += 1
        writer.epoch = Epoch(self._last_number, writer.request.content)
        writer.since = self._now()
        self._writer = writer
        self.note(f"epoch {self._last_number} begun by {writer.who}")
        effects.append(Grant(writer.id, "rw", writer.epoch))
        return effects

    def _abandon(self) -> list[Effect]:
        assert self._writer is not None and self._writer.epoch is not None
        writer, epoch = self._writer, self._writer.epoch
        self._writer = None
        self.note(f"writer {writer.who} gone before its commit: epoch {epoch.number} discarded")
        return [Discard(epoch), *self._grant()]

    def _retire(self, epoch: Epoch) -> list[Effect]:
        """Let go of an epoch that was replaced once nobody reads it."""
        return [] if epoch is self.committed or self._read(epoch) else [Discard(epoch)]

    def _read(self, epoch: Epoch) -> bool:
        return any(reader.epoch is epoch for reader in self._readers.values())


def timeout_of(request: Acquire) -> float:
    """Seconds that it may wait; what is no number counts as none."""
    wanted = request.timeout_s
    return 0.0 if math.isnan(wanted) else min(max(wanted, 0.0), MAX_TIMEOUT_S)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
