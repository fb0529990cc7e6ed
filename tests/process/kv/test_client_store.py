"""Workers' sides of the tiers and a real store, which is killed and frozen at every step of theirs."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from client_engine import BLOCK_SIZE, DEADLINE_S, IMPATIENT, KEY, LAYOUT, PATIENT, Engine, chain, mapped
from store_peers import MIB, Store, room_for

from dynamo_box.kv.client.jobs import Forgo
from dynamo_box.kv.hashing import isolation_key
from dynamo_box.protocol.kv import KvLayout


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With 64 slots, and a disk."""
    one = Store(
        tmp_path, host_bytes=room_for(64, LAYOUT), disk_bytes=64 * MIB, directory=str(tmp_path / "disk"), flush_s=10.0
    )
    yield one
    one.close()


@pytest.fixture
def engine(store: Store) -> Iterator[Engine]:
    one = Engine(store.path)
    yield one
    one.close()


def arenas() -> set[int]:
    """Inodes of the memory files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:" in line}


def on_disk(store: Store, blocks: int) -> None:
    """Wait until so many are there."""
    store.figures_when(lambda figures: figures.disk.blocks >= blocks)


def successor(store: Store) -> None:
    if store.process.poll() is None:
        store.kill()
    store.start()


def test_between_processes_and_lives(store: Store, engine: Engine) -> None:
    blocks = chain(1, 50, priority=80)

    def other(act: str, name: int, count: int) -> str:
        script = Path(__file__).with_name("other_worker.py")
        command = [sys.executable, str(script), str(store.path), act, str(name), str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE_S).stdout.strip()

    assert engine.store(blocks).stored == 50
    assert other("load", 1, 50) == "50"
    assert other("store", 2, 10) == "10"
    theirs = chain(2, 10)
    assert engine.load(engine.find(theirs), theirs).count == 10
    on_disk(store, 60)
    successor(store)
    engine.lose(blocks)
    assert engine.tiers.wait_connected(DEADLINE_S)
    store.figures_when(lambda figures: figures.disk.blocks >= 60)
    sought = engine.find(blocks)
    assert sought.tiers == "3" * 50
    assert sought.priorities == (80,) * 50
    fetched = engine.load(sought, blocks)
    assert (fetched.count, fetched.error) == (50, "")
    assert engine.find(blocks).tiers == "2" * 50
    assert other("load", 2, 10) == "10"


def test_more_than_fits(store: Store, engine: Engine) -> None:
    """Three chains through an arena that holds one: each comes back from host memory or disk, and is right."""
    chains = [chain(name, 60) for name in range(3)]
    for number, blocks in enumerate(chains, 1):
        assert engine.store(blocks).stored == 60
        on_disk(store, 60 * number)
    tiers = ""
    for blocks in chains:
        sought = engine.find(blocks)
        tiers += sought.tiers
        assert engine.load(sought, blocks).count == 60
    assert tiers.count("3") >= 100
    assert len(tiers) == 180
    store.figures_when(lambda figures: figures.leases == 0)


OTHER_KEYS = {
    "lora": isolation_key("model", block_size=BLOCK_SIZE, kv_dtype="float32", lora="a"),
    "salt": isolation_key("model", block_size=BLOCK_SIZE, kv_dtype="float32", cache_salt="tenant"),
    "dtype": isolation_key("model", block_size=BLOCK_SIZE, kv_dtype="bfloat16"),
    "block size": isolation_key("model", block_size=2 * BLOCK_SIZE, kv_dtype="float32"),
    "model": isolation_key("model-2", block_size=BLOCK_SIZE, kv_dtype="float32"),
    "none": b"",
}


def test_what_keeps_kv_apart(store: Store, engine: Engine) -> None:
    """The same tokens under another key are another chain, in memory and on disk."""
    mine = chain(1, 10)
    assert engine.store(mine).stored == 10
    for name, key in OTHER_KEYS.items():
        theirs = chain(1, 10, key)
        assert engine.find(theirs).tiers == "", name
        assert engine.store(theirs[:5]).stored == 5, name
        assert engine.find(theirs).tiers == "2" * 5, name
        assert engine.find([*theirs[:5], *mine[5:]]).tiers == "2" * 10, "a chain is what its caller says it is"
    on_disk(store, 40)
    successor(store)
    engine.lose(mine)
    assert engine.tiers.wait_connected(DEADLINE_S)
    on_disk(store, 40)
    assert engine.find(mine).tiers == "3" * 10
    for name, key in OTHER_KEYS.items():
        assert engine.find(chain(1, 10, key)).tiers == "3" * 5, name


def test_layouts_share_nothing(tmp_path: Path) -> None:
    """Not even for equal digests: what differs in a layout would differ in the bytes."""
    store = Store(tmp_path, host_bytes=4 * MIB, layouts=4, disk_bytes=64 * MIB, directory=str(tmp_path / "disk"))
    first = Engine(store.path)
    blocks = chain(1, 5, KEY)
    assert first.store(blocks).stored == 5
    on_disk(store, 5)
    for change in ({"kv_dtype": "bfloat16"}, {"block_size": 8}, {"fingerprint": "model-2"}):
        fields: dict[str, Any] = {name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__}
        other = Engine(store.path, layout=KvLayout(**{**fields, **change}))
        assert other.find(blocks).tiers == ""
        other.close()
    first.close()
    store.close()


@pytest.mark.slow
def test_a_store_that_is_killed(store: Store, engine: Engine) -> None:
    """At each step of ours: what was asked has its answer, the old memory goes, and we go on with the next store."""
    host = chain(1, 40)
    assert engine.store(host).stored == 40
    on_disk(store, 40)
    (old,) = arenas()

    def kill(places: Sequence[int]) -> None:
        store.kill()

    def frozen(ask: Callable[[], int]) -> Any:
        """What comes of a question that reached the store and was never answered."""
        store.process.send_signal(signal.SIGSTOP)
        key = ask()
        store.kill()
        return engine.result(key)

    def go_on(stored: int) -> None:
        nonlocal old
        engine.before_in = engine.before_out = lambda places: None
        engine.lose(host)
        store.start()
        assert engine.tiers.wait_connected(DEADLINE_S)
        assert not mapped(old)
        (new,) = arenas()
        assert new != old
        old = new
        on_disk(store, stored)

    other = chain(2, 20)
    assert frozen(lambda: engine.offer(other)).dropped == {"store_gone": 20}
    go_on(40)

    sought = engine.find(host)
    assert sought.tiers == "3" * 40
    result = frozen(lambda: engine.fetch(sought.lease, 40)[0])
    assert (result.count, result.failed_tier) in [(0, "3"), (0, "")], "it may not even have been asked yet"
    assert result.error
    go_on(40)

    engine.before_out = kill
    assert engine.store(other).dropped == {"store_gone": 20}
    go_on(40)

    assert engine.load(engine.find(host), host).count == 40
    assert engine.find(host).tiers == "2" * 40
    engine.before_in = kill
    fetched = engine.load(engine.find(host), host)
    assert 0 < fetched.count <= 40, "what was copied from memory that lives on is right"
    go_on(40)

    assert frozen(lambda: engine.seek(host)).error
    go_on(40)
    assert engine.store(other).stored == 20
    assert engine.load(engine.find(other), other).count == 20


def test_a_store_that_freezes_and_thaws(store: Store) -> None:
    """It counts as gone; once it goes on, so do we, and it has taken back what we had."""
    engine = Engine(store.path)
    first, second = chain(1, 60), chain(2, 60)
    engine.store(first)
    engine.find(first)
    store.process.send_signal(signal.SIGSTOP)
    seek = engine.seek(first)
    engine.until_asked()
    engine.give_up_after(IMPATIENT)
    offer = engine.offer(second)
    assert engine.result(seek).error
    assert engine.result(offer).dropped == {"store_gone": 60}
    assert engine.find(first).error, "at once"
    engine.give_up_after(PATIENT)
    store.process.send_signal(signal.SIGCONT)
    assert engine.tiers.wait_connected(DEADLINE_S)
    engine.tiers.forgo(Forgo(engine.find(first).lease))
    store.figures_when(lambda figures: figures.leases == 0 and figures.reclaimed == 2 and figures.host.queued == 0)
    assert engine.store(second).stored == 60
    assert engine.load(engine.find(second), second).count == 60
    engine.close()


@pytest.mark.slow
def test_a_thousand_jobs_under_fire(store: Store) -> None:
    """Two workers, chains with common beginnings, a store that is killed now and then: each job has its one result, and
    no block that is said to be right is wrong.
    """
    engines = [Engine(store.path, queued_blocks=200) for _ in range(2)]
    stems = [chain(name, 30) for name in range(4)]
    loaded: dict[str, int] = {"2": 0, "3": 0}
    guard, done = threading.Lock(), threading.Semaphore(0)
    failures: list[BaseException] = []

    def one_job(engine: Engine, choice: random.Random) -> None:
        stem = choice.choice(stems)[: choice.randrange(1, 30)]
        blocks = stem if choice.random() < 0.5 else (*stem, *chain(choice.randrange(10, 20), 5))
        if choice.random() < 0.4:
            engine.offer(blocks)
            return
        sought = engine.find(blocks)
        if sought.error:
            assert engine.tiers.wait_connected(DEADLINE_S)
        if not sought.lease:
            return
        if choice.random() < 0.2:
            engine.tiers.forgo(Forgo(sought.lease))
            return
        skip = choice.randrange(len(sought.tiers))
        count = choice.randrange(1, len(sought.tiers) - skip + 1)
        fetched = engine.load(sought, blocks[skip : skip + count], skip)
        with guard:
            for tier, size in fetched.bytes.items():
                loaded[tier] += size // LAYOUT.block_bytes

    def act(number: int) -> None:
        choice = random.Random(number)
        try:
            for _ in range(500):
                one_job(engines[number], choice)
                done.release()
        except BaseException as error:  # noqa: BLE001  # told by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=act, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        for _ in range(180):
            assert done.acquire(timeout=DEADLINE_S), failures
        successor(store)
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert failures == []
    assert min(loaded.values()) > 20, loaded
    for engine in engines:
        engine.close()
    store.figures_when(lambda figures: figures.connections == 0 and figures.leases == 0 and figures.host.queued == 0)
    assert arenas() == set()
