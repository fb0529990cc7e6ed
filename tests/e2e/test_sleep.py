"""Weights once for all, models that sleep and wake, and what the kernel says of it: with the real model."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from box_under_test import COMMAND_DEADLINE_S, Box, eventually
from fakes.memory_files import small_file_system

from dynamo_box.control.client import ControlClient
from dynamo_box.paths import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ONE_COPY = 134_515_008 * 4
MODEL = "smollm2"
PROMPT = "The capital of France is"


def answer(box: Box, model: str = MODEL, tokens: int = 6) -> str:
    with box.client(timeout=120) as client:
        done = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
    assert done.usage is not None and done.usage.completion_tokens == tokens
    return done.choices[0].text


def weights_pss(pids: set[int]) -> int:
    """Proportional bytes of weights over processes: mapped memory files of the box but those of KV, and the model's own
    file.
    """
    total = 0
    for pid in pids:
        of_weights = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                of_weights = bool(re.search(r"/memfd:dynbox:(?!kv:)|safetensors", line))
            elif of_weights and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def gms(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in box.ps()["processes"] if each["kind"] == "gms")
    return found


def kill_service(box: Box) -> None:
    """Return when there is another one that has said how it is."""
    before = gms(box)
    os.kill(before["pid"], signal.SIGKILL)
    eventually(
        lambda: (now := gms(box))["restarts"] > before["restarts"] and now["state"] == "ready" and now["figures"],
        "the service is there again",
    )


def layout(box: Box) -> dict[str, Any]:
    figures = eventually(lambda: gms(box)["figures"], "figures of the service")
    found: dict[str, Any] = next(each for each in figures["layouts"] if each["name"] == MODEL)
    return found


def anonymous(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Anonymous:"))


def target(link: str) -> str:
    """ "" if it is gone."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def descriptors_and_mappings(pid: int) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{pid}/fd")), len(Path(f"/proc/{pid}/maps").read_text().splitlines())


@pytest.fixture(scope="module")
def duo(tmp_path_factory: pytest.TempPathFactory, smollm2_home: Path) -> Iterator[Box]:
    root = tmp_path_factory.mktemp("duo")
    (root / "home").mkdir()
    (root / "home" / "models").symlink_to(smollm2_home / "models")
    made = Box(root / "run", root / "home")
    made.up("smollm2-duo")
    yield made
    made.destroy()


def test_two_workers_hold_one_copy_of_the_weights(duo: Box) -> None:
    pss = weights_pss(duo.pids())
    assert ONE_COPY <= pss <= 1.02 * ONE_COPY
    both = {"smollm2.aggregated.0", "smollm2.aggregated.1"}
    eventually(lambda: {each["owner"] for each in layout(duo)["readers"]} == both, "both read them")


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_asleep_in_each_place_and_awake_with_the_same_answers(duo: Box, place: str) -> None:
    before = answer(duo)
    slept = json.loads(duo.dynbox("sleep", MODEL, "--to", place, "--json").stdout)
    assert slept["residency"]["place"] == place
    (freed,) = slept["freed"]
    assert freed["device"] == "cpu" and freed["holders"] == []
    if place == "device":
        assert layout(duo)["device_bytes"] >= ONE_COPY
    else:
        assert freed["freed_bytes"] >= 0.96 * ONE_COPY  # workers' other memory moves a little meanwhile
        eventually(lambda: layout(duo)["device_bytes"] == 0, "the service says so too")
    woken = duo.dynbox("wake", MODEL)
    assert "cold start" not in woken.stdout + woken.stderr
    assert answer(duo) == before
    assert weights_pss(duo.pids()) <= 1.02 * ONE_COPY


def test_the_service_is_killed_and_nothing_reloads(duo: Box) -> None:
    epoch = layout(duo)["epoch"]
    starts = {each["name"]: each["pid"] for each in duo.ps()["processes"] if each["kind"] == "worker"}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(answer, duo, MODEL, 40) for _ in range(2)]
        kill_service(duo)
        assert all(each.result() for each in running)
    eventually(lambda: len(layout(duo)["readers"]) == 2, "the readers are back")
    assert layout(duo)["epoch"] == epoch
    assert {each["name"]: each["pid"] for each in duo.ps()["processes"] if each["kind"] == "worker"} == starts


def test_a_wake_that_finds_the_service_just_killed_waits_for_the_next_one(duo: Box) -> None:
    before = answer(duo)
    duo.dynbox("sleep", MODEL, "--to", "host")
    supervisor, service = duo.ps()["box"]["pid"], gms(duo)["pid"]
    with ThreadPoolExecutor(1) as pool, ControlClient.connect(RunDir(duo.run_dir)) as client:
        os.kill(supervisor, signal.SIGSTOP)
        try:
            waking = pool.submit(client.wake, MODEL, COMMAND_DEADLINE_S)
            os.kill(service, signal.SIGKILL)
            eventually(lambda: service not in duo.pids(), "it is dead")
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert not waking.result().residency.cold
    assert answer(duo) == before


def test_a_descriptor_that_somebody_kept_is_named_and_the_sleep_exits_with_1(duo: Box) -> None:
    pid = gms(duo)["pid"]
    links = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    path = next(link for link in links if ":device:" in target(link))
    program = f"import sys; kept = open({path!r}, 'rb'); print('open', flush=True); sys.stdin.read()"
    stray = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PATH": "/"}
    )
    assert stray.stdin is not None and stray.stdout is not None
    with stray:
        assert stray.stdout.readline() == "open\n"
        fell_short = duo.dynbox("sleep", MODEL, "--to", "host", code=1)
        assert f"(pid {stray.pid})" in fell_short.stdout + fell_short.stderr
        stray.stdin.close()
    duo.dynbox("wake", MODEL)


def test_a_damaged_snapshot_is_refused_and_the_model_loads_from_its_source(duo: Box) -> None:
    before = answer(duo)
    duo.dynbox("sleep", MODEL, "--to", "disk")
    shard = max(
        (path for path in (duo.home / "cache" / "snapshots").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert "cold start" in duo.dynbox("wake", MODEL).stdout
    assert answer(duo) == before
    assert weights_pss(duo.pids()) <= 1.02 * ONE_COPY


def test_a_full_disk_is_said_and_the_weights_stay_on_the_device(duo: Box) -> None:
    before = answer(duo)
    with small_file_system(duo.home / "cache" / "snapshots", "1m"):
        failed = duo.dynbox("sleep", MODEL, "--to", "disk", code=1)
        assert "its weights are still on the device" in failed.stderr and "free" in failed.stderr
        assert f"hint: once that is mended, `dynbox sleep {MODEL} --to disk`" in failed.stderr
        assert answer(duo) == before
    assert weights_pss(duo.pids()) <= 1.02 * ONE_COPY


def test_without_memory_to_wake_it_sleeps_on_and_wakes_when_there_is_some(duo: Box) -> None:
    """A service that can open nothing more can make no memory file."""
    before, cold = answer(duo), duo.ps()["models"][0]["residency"]["cold_wakes"]
    duo.dynbox("sleep", MODEL, "--to", "host")
    pid = gms(duo)["pid"]
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    refused = duo.dynbox("wake", MODEL, code=1)
    assert "Too many open files" in refused.stderr
    residency = duo.ps()["models"][0]["residency"]
    assert (residency["state"], residency["place"]) == ("asleep", "host")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert answer(duo) == before
    assert duo.ps()["models"][0]["residency"]["cold_wakes"] == cold


def test_a_worker_that_dies_asleep_is_started_when_its_model_wakes(duo: Box) -> None:
    before = answer(duo)
    duo.dynbox("sleep", MODEL)
    os.kill(duo.process("smollm2.aggregated.1")["pid"], signal.SIGKILL)
    eventually(lambda: duo.process("smollm2.aggregated.1")["state"] == "stopped", "the death is noticed")
    duo.dynbox("wake", MODEL)
    assert duo.wait_ready() and answer(duo) == before


def cycle(box: Box, count: int) -> None:
    """Sleep and wake under traffic; no request fails, and nothing grows."""
    over = threading.Event()

    def ask_on() -> int:
        answers = 0
        while not over.is_set():
            answer(box, tokens=3)
            answers += 1
        return answers

    def sizes() -> dict[str, tuple[int, int]]:
        return {each["name"]: descriptors_and_mappings(each["pid"]) for each in box.ps()["processes"]}

    with ThreadPoolExecutor(3) as pool:
        askers = [pool.submit(ask_on) for _ in range(3)]
        try:
            for number in range(count):
                box.dynbox("sleep", MODEL, "--to", ("device", "host")[number % 2])
                box.dynbox("wake", MODEL)
                if number == 2:
                    first = sizes()
                    memory = {each["name"]: anonymous(each["pid"]) for each in box.ps()["processes"]}
        finally:
            over.set()
        assert all(asker.result() > 0 for asker in askers)
    for name, (descriptors, mappings) in sizes().items():
        assert descriptors <= first[name][0] + 8, name
        assert mappings <= first[name][1] + 40, name
    for each in box.ps()["processes"]:
        assert anonymous(each["pid"]) <= memory[each["name"]] + (64 << 20), each["name"]
    assert weights_pss(box.pids()) <= 1.02 * ONE_COPY


def test_many_cycles_under_traffic_leave_nothing_behind(duo: Box) -> None:
    cycle(duo, 5)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_cycles_under_traffic_leave_nothing_behind(duo: Box) -> None:
    cycle(duo, 200)


def test_two_models_that_do_not_fit_together_are_served_alternately(box: Box) -> None:
    box.up("two-models")
    models = ("smollm2", "smollm2-bf16")
    states = {each["name"]: each["state"] for each in box.ps()["models"]}
    assert states == {"smollm2": "ready", "smollm2-bf16": "asleep"}
    assert {each.id for each in box.client().models.list()} == set(models)
    for name in models * 2:
        assert answer(box, name)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(answer, box, name, 3) for name in models * 6]
        assert all(each.result() for each in waiting)
    residencies = [each["residency"] for each in box.ps()["models"]]
    assert all(each["wakes"] >= 2 and each["cold_wakes"] == 0 for each in residencies)
    awake = [each for each in residencies if each["state"] == "awake"]
    assert len(awake) == 1
    box.dynbox("sleep", awake[0]["model"])
    eventually(lambda: gms(box)["figures"]["device_bytes"] == 0, "nothing is left on the device")
