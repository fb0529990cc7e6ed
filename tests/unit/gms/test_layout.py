"""The lock table of one layout, without processes: whatever happens, in whatever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_box.gms.epoch import Epoch
from dynamo_box.gms.layout import (
    MAX_HISTORY,
    MAX_TIMEOUT_S,
    MAX_WAITERS,
    Dead,
    Discard,
    Effect,
    Grant,
    Layout,
    Refuse,
    timeout_of,
)
from dynamo_box.protocol.gms import Acquire, Entry, Lock


def request(lock: Lock, **changes: Any) -> Acquire:
    return Acquire(1, **{"owner": "w", "layout": "m", "lock": lock, "content": "c", "timeout_s": 10.0, **changes})


def new(alive: Any = lambda _id: True) -> Layout:
    return Layout("m", alive, lambda: 1.0)


def committed(content: str = "c", alive: Any = lambda _id: True) -> Layout:
    """With epoch 1, which nobody reads."""
    layout = new(alive)
    layout.acquire(1, request("rw", content=content), 10)
    layout.begin_commit().layout_hash = "h1"
    layout.end_commit()
    layout.leave(1)
    return layout


def grants(effects: list[Effect]) -> list[tuple[int, str]]:
    return [(effect.holder, effect.lock) for effect in effects if isinstance(effect, Grant)]


def test_the_first_writes_and_the_rest_read_what_it_commits() -> None:
    layout = new()
    assert grants(layout.acquire(1, request("rw_or_ro"), 10)) == [(1, "rw")]
    assert layout.acquire(2, request("rw_or_ro"), 11) == []
    assert layout.acquire(3, request("ro"), 12) == []
    layout.begin_commit()
    assert grants(layout.end_commit()) == [(1, "ro"), (2, "ro"), (3, "ro")]


def test_other_content_is_written_beside() -> None:
    layout = committed()
    assert grants(layout.acquire(2, request("ro"), 11)) == [(2, "ro")]
    assert grants(layout.acquire(3, request("rw_or_ro", content="other"), 12)) == [(3, "rw")]
    layout.begin_commit()
    effects = layout.end_commit()
    assert not any(isinstance(effect, Discard) for effect in effects)
    discarded = layout.leave(2)
    assert [effect.epoch.number for effect in discarded if isinstance(effect, Discard)] == [1]


def test_a_writer_that_goes_hands_on_to_the_next_in_line() -> None:
    layout = new()
    layout.acquire(1, request("rw"), 10)
    layout.acquire(2, request("rw"), 11)
    layout.acquire(3, request("rw"), 12)
    assert layout.queue_of(3) == (1, "w (pid 10) writes it")
    assert grants(layout.leave(1)) == [(2, "rw")]


def test_the_dead_are_passed_over() -> None:
    dead: set[int] = set()
    layout = new(lambda id_: id_ not in dead)
    for number in (1, 2, 3):
        layout.acquire(number, request("rw"), number)
    dead.add(2)
    effects = layout.leave(1)
    assert Dead(2) in effects and grants(effects) == [(3, "rw")]


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_sleeps_is_no_use_to_readers_and_is_written_anew(place: Any) -> None:
    layout = committed()
    assert layout.begin_move(place) == ""
    assert layout.acquire(2, request("ro"), 11) == []
    epoch = Epoch(1, "c", layout_hash="h1", place=place)
    (refused,) = layout.end_move(epoch, "moved")
    assert isinstance(refused, Refuse) and refused.code == "asleep"
    assert grants(layout.acquire(3, request("rw_or_ro"), 12)) == [(3, "rw")]


def test_expectations() -> None:
    layout = committed()
    (refused,) = layout.acquire(2, request("ro", expect_hash="h0"), 11)
    assert isinstance(refused, Refuse) and refused.code == "stale"
    assert grants(layout.acquire(3, request("ro", expect_hash="h1"), 12)) == [(3, "ro")]
    (refused,) = new().acquire(4, request("ro", expect_hash="h1"), 13)
    assert isinstance(refused, Refuse) and refused.code == "stale"


def test_room_is_made_when_nobody_reads() -> None:
    layout = committed()
    given_up, granted = layout.acquire(2, request("rw", make_room=True), 11)
    assert isinstance(given_up, Discard) and given_up.forget
    assert isinstance(granted, Grant)
    assert layout.committed is None


def test_a_commit_that_fails_leaves_the_writer_writing() -> None:
    layout = new()
    layout.acquire(1, request("rw"), 10)
    layout.begin_commit()
    assert layout.leave(1) == []
    assert layout.end_commit("still mapped") == []
    assert layout.held_by(1) is not None
    layout.begin_commit()
    assert any(isinstance(effect, Discard) for effect in layout.end_commit("still mapped", writer_gone=True))
    assert layout.state == "empty"


def test_bounds() -> None:
    layout = new()
    layout.acquire(0, request("rw"), 10)
    for number in range(1, MAX_WAITERS + 1):
        assert layout.acquire(number, request("rw"), 10) == []
    (refused,) = layout.acquire(100, request("rw"), 10)
    assert isinstance(refused, Refuse) and refused.code == "too_many_waiters"
    for number in range(MAX_WAITERS):
        layout.leave(number)
    assert len(layout.history) == MAX_HISTORY
    assert timeout_of(request("rw", timeout_s=float("inf"))) == MAX_TIMEOUT_S
    assert timeout_of(request("rw", timeout_s=float("nan"))) == 0
    assert timeout_of(request("rw", timeout_s=-1.0)) == 0


def test_a_hash_is_of_content_sizes_and_entries() -> None:
    def hash_of(content: str = "c", size: int = 2, name: str = "t", number: int = 1) -> str:
        return Epoch(number, content, {0: size}, (Entry(name, 0, 0, "u8", (1,), (1,), 1),)).compute_hash()

    assert hash_of() == hash_of(number=2)
    assert len({hash_of(), hash_of("d"), hash_of(size=4), hash_of(name="u")}) == 4


class AnyOrder(RuleBasedStateMachine):
    """Never two writers; nobody who asked is forgotten; epochs are discarded once, and never under a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[int] = set()
        self.layout = Layout("m", lambda id_: id_ not in self.dead, lambda: 1.0)
        self.holding: dict[int, tuple[str, Epoch]] = {}
        self.waiting: set[int] = set()
        self.next = 0
        self.committing = False
        self.live: set[Epoch] = set()

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Grant(holder, lock, epoch):
                    assert holder in self.waiting or self.holding[holder] == ("rw", epoch)
                    assert holder not in self.dead
                    self.waiting.discard(holder)
                    self.holding[holder] = (lock, epoch)
                    self.live.add(epoch)
                case Refuse(holder, _, _) | Dead(holder):
                    self.waiting.remove(holder)
                case Discard(epoch, _):
                    self.live.remove(epoch)
                    assert all(held is not epoch for _, held in self.holding.values())

    @rule(lock=st.sampled_from(["rw", "ro", "rw_or_ro"]), content=st.sampled_from("ab"), room=st.booleans())
    def acquire(self, lock: Lock, content: str, room: bool) -> None:
        self.next += 1
        self.waiting.add(self.next)
        self.carry_out(
            self.layout.acquire(self.next, request(lock, content=content, make_room=room), self.next),
        )

    @precondition(lambda self: self.holding or self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted([*self.holding, *self.waiting])))
        if self.committing and self.holding.get(who, ("",))[0] == "rw":
            assert self.layout.leave(who) == []
            return
        self.waiting.discard(who)
        self.holding.pop(who, None)
        self.carry_out(self.layout.leave(who))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        self.carry_out(self.layout.expire(data.draw(st.sampled_from(sorted(self.waiting)))))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.dead.add(data.draw(st.sampled_from(sorted(self.waiting))))

    @precondition(lambda self: not self.committing and self.layout.building is not None)
    @rule()
    def begin_commit(self) -> None:
        self.layout.begin_commit()
        self.committing = True

    @precondition(lambda self: self.committing)
    @rule(error=st.sampled_from(["", "still mapped"]), gone=st.booleans())
    def end_commit(self, error: str, gone: bool) -> None:
        self.committing = False
        if gone:
            (writer,) = (who for who, (lock, _) in self.holding.items() if lock == "rw")
            del self.holding[writer]
        self.carry_out(self.layout.end_commit(error, writer_gone=gone))

    @rule(place=st.sampled_from(["device", "host", "disk"]))
    def begin_move(self, place: Any) -> None:
        moving = bool(self.layout.moving)
        if self.layout.begin_move(place) == "":
            assert not self.holding and not moving

    @precondition(lambda self: self.layout.moving)
    @rule(works=st.booleans())
    def end_move(self, works: bool) -> None:
        epoch = self.layout.committed
        assert epoch is not None
        if works:
            self.live.remove(epoch)
            epoch = Epoch(epoch.number, epoch.content, place=self.layout.moving)  # type: ignore[arg-type]
            self.live.add(epoch)
        self.carry_out(self.layout.end_move(epoch, "moved"))

    @invariant()
    def all_are_accounted_for(self) -> None:
        assert set(self.layout.waiting) == self.waiting
        writers = [epoch for lock, epoch in self.holding.values() if lock == "rw"]
        assert len(writers) <= 1
        assert all(self.layout.held_by(who) == held for who, held in self.holding.items())
        held = {epoch for _, epoch in self.holding.values()}
        assert self.live == held | ({self.layout.committed} if self.layout.committed else set())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if self.layout.moving or self.layout.building is not None:
            return
        locks = {waiter.lock for waiter in self.layout.waiters}
        assert locks <= ({"ro"} if self.layout.committed is None else set())


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
