"""Weights in a real service: written once, mapped by all, let go in sleep and mapped again."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.tiny_model import make_tiny_llama
from gms_process import NAME, GmsProcess
from worker_process import WorkerProcess

from dynamo_box.protocol import status
from dynamo_box.protocol.spec import ModelSpec, WorkerSpec

MIB = 1024 * 1024
PROMPT = list(range(40, 90))
WEIGHTS = 31 * MIB
"""Less than the model of these tests has."""
QUICK = 30.0

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan has it for every worker."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its weights stand out from what else a process maps."""
    path = tmp_path_factory.mktemp("models") / "model"
    sizes = {"hidden": 256, "intermediate": 1024, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 32}
    return make_tiny_llama(path, dtype="float32", vocab_size=512, **sizes)  # type: ignore[arg-type]


@contextmanager
def worker(
    run_dir: Path, model: Path, name: str, *, fingerprint: str = "one", gms: str = NAME
) -> Iterator[WorkerProcess]:
    spec = WorkerSpec(
        name=name,
        model=ModelSpec("m", str(model), fingerprint, 2048, 16),
        engine="native",
        role="aggregated",
        run_dir=str(run_dir),
        threads=1,
        device="cpu",
        kv_bytes=32 * MIB,
        max_batch=8,
        gms=gms,
        layout="m" if gms else "",
    )
    process = WorkerProcess(run_dir, spec, "engines.native")
    try:
        yield process
    finally:
        process.end()


def ready(process: WorkerProcess) -> WorkerProcess:
    process.await_status(status.Ready, status.Failed)
    assert isinstance(process.seen[-1], status.Ready), process.seen[-1]
    return process


def answers(process: WorkerProcess) -> list[list[int]]:
    """Greedy and seeded."""
    with process.peer() as peer:
        return [
            peer.run(PROMPT, max_tokens=20, ignore_eos=True)[0],
            peer.run(PROMPT, max_tokens=20, ignore_eos=True, temperature=1.0, seed=5)[0],
        ]


def sleep(process: WorkerProcess) -> status.Slept:
    process.status.send(status.Sleep(1, QUICK))
    slept: status.Slept = process.await_status(status.Slept)
    return slept


def wake(process: WorkerProcess, deadline_s: float = QUICK) -> status.Woken:
    process.status.send(status.Wake(2, deadline_s))
    woken: status.Woken = process.await_status(status.Woken)
    return woken


def wrote(process: WorkerProcess, name: str) -> bool:
    lines = [json.loads(line) for line in process.log.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["event"] == "weights" and line["process"] == name]
    return bool(line["wrote"])


def memory(pid: int, what: str, of: str) -> int:
    """Bytes by smaps of the mappings whose name contains `of`."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if " " in key:
            counts = of in line
        elif counts and key == what:
            total += int(rest.split()[0]) * 1024
    return total


def anonymous(pid: int) -> int:
    return memory(pid, "Anonymous", "")


def test_one_copy_serves_all_and_the_store_is_read_once(tmp_path: Path, model: Path) -> None:
    run_dir, path = tmp_path / "run", make_copy(model, tmp_path / "model")
    with worker(run_dir, path, "alone", gms="") as alone:
        expected = answers(ready(alone))
    with GmsProcess(run_dir) as gms, worker(run_dir, path, "first") as first:
        ready(first)
        weights = path / "model.safetensors"
        size = weights.stat().st_size
        header = weights.read_bytes()[: 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
        weights.write_bytes(header + bytes(size - len(header)))
        with worker(run_dir, path, "second") as second:
            ready(second)
            assert wrote(first, "first")
            assert not wrote(second, "second")
            assert answers(first) == answers(second) == expected
            pids = (gms.process.pid, first.pid, second.pid)
            shared = sum(memory(pid, "Pss", "memfd:") for pid in pids)
            assert 0.9 * size < shared < 1.02 * size + 2 * MIB, "and what rounding up to the granularity adds"
            for pid in pids:
                assert "model.safetensors" not in Path(f"/proc/{pid}/maps").read_text()


def make_copy(model: Path, to: Path) -> Path:
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_it_answers_as_before_from_wherever_its_weights_were(tmp_path: Path, model: Path, place: Any) -> None:
    run_dir = tmp_path / "run"
    with GmsProcess(run_dir) as gms, worker(run_dir, model, "first") as process:
        expected = answers(ready(process))
        before = anonymous(process.pid)
        slept = sleep(process)
        assert slept.error == ""
        assert slept.kv_bytes >= 5 * 16 * 8 * 2 * 4 * 32 * 4, "five blocks were in use"
        assert slept.weights_bytes >= WEIGHTS
        assert before - anonymous(process.pid) >= 0.9 * slept.kv_bytes
        assert memory(process.pid, "Rss", "memfd:") == 0
        asleep = process.figures(lambda figures: figures.kv_bytes == 0)
        assert (asleep.weights_bytes, asleep.running, asleep.kv_blocks_cached) == (0, 0, 0)
        if place != "device":
            assert gms.move("m", place).error == ""
            assert wake(process, 0.5).error
            assert gms.move("m", "device").error == ""
        woken = wake(process)
        assert woken.error == ""
        assert list(woken.phases) == ["attach", "remap", "populate", "kv", "canary", "register"]
        assert answers(process) == expected


def test_weights_that_changed_meanwhile_are_not_mapped(tmp_path: Path, model: Path) -> None:
    run_dir = tmp_path / "run"
    other = make_tiny_llama(tmp_path / "other", dtype="float32")
    with GmsProcess(run_dir), worker(run_dir, model, "first") as process:
        ready(process)
        assert sleep(process).error == ""
        with worker(run_dir, other, "second", fingerprint="two") as successor:
            ready(successor)
            woken = wake(process)
            assert woken.broken
            assert "changed meanwhile" in woken.error
            process.status.send(status.Stop())
            assert process.exit_code() == 0


def test_a_service_killed_while_awake_disturbs_nobody_and_sleep_goes_on(tmp_path: Path, model: Path) -> None:
    run_dir = tmp_path / "run"
    with GmsProcess(run_dir) as gms, worker(run_dir, model, "first") as process:
        expected = answers(ready(process))
        gms.kill()
        assert answers(process) == expected
        slept = sleep(process)
        assert (slept.error, slept.weights_bytes >= WEIGHTS) == ("", True)
        woken = wake(process, 0.5)
        assert woken.error
        assert process.instance() is None
        process.process.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
