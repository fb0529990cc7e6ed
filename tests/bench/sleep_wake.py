"""Sleep and wake of a real box: how long waking takes from each place, what a second worker saves, how often the
weights are in memory, and what a request pays that wakes its model.

    python tests/bench/sleep_wake.py [--rounds 5] [--workers 1 2 4] [--swaps 8] [--only wake memory swap] [--json]

The embedded model has to be in the store of `$DYNBOX_HOME` (`dynbox pull smollm2`). Each part starts boxes of its own,
with run dir, logs and snapshots in a temporary directory (`--directory`: on a disk, not on a tmpfs).

wake    from device, host and disk: the supervisor's seconds by phase, "total" from the request to the registered
        worker; "beyond" is what is left of it without the canary, the population and the move of the bytes. Beside
        them a cold start (the snapshot is damaged on purpose), and `dynbox up` as a whole.
memory  proportional memory (PSS) of weights over every process of the box, as multiples of one copy: maps of memory
        files named dynbox:…, but for KV, and of weights files; and what the second worker does instead of loading.
swap    requests to two models that don't fit awake together, in turn: seconds to the first token, beside those of a
        model that is awake.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from box_under_test import Box  # noqa: E402

from dynamo_box.control.client import ControlClient  # noqa: E402
from dynamo_box.paths import RunDir, home  # noqa: E402
from dynamo_box.protocol.gms import Place  # noqa: E402

MODEL = "smollm2"
PLACES: tuple[Place, ...] = ("device", "host", "disk")
TIMEOUT_S = 300.0
PARTS = ("wake", "memory", "swap")

_HEADER = re.compile(rb"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(?P<path>.*)")
_WEIGHTS = re.compile(rb"/memfd:dynbox:(?!kv:).*|.*\.safetensors")

Seconds = dict[str, list[float]]


@contextmanager
def running(root: Path, profile: str, figures: dict[str, Any]) -> Iterator[Box]:
    """A box over the user's models; how long `up` took goes into `figures`."""
    directory = Path(tempfile.mkdtemp(dir=root))
    (directory / "home").mkdir()
    (directory / "home" / "models").symlink_to(home().models)
    box = Box(directory / "run", directory / "home")
    try:
        began = time.perf_counter()
        box.up(profile)
        figures["up"] = time.perf_counter() - began
        yield box
    finally:
        box.destroy()


def with_workers(root: Path, count: int) -> str:
    """A profile of that many."""
    path = root / f"workers-{count}.yaml"
    path.write_text(f"extends: {MODEL}\nmodel:\n  workers: {count}\n  context_length: 1024\n  kv_memory: 64MiB\n")
    return str(path)


def logged(box: Box, event: str) -> list[dict[str, Any]]:
    """Lines of that event from the workers, oldest first."""
    lines = box.dynbox("logs", "--json", "--lines", "10000").stdout.splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event and ".aggregated." in line["process"]]


def one_copy(box: Box) -> int:
    weights: int = box.ps()["models"][0]["residency"]["weights_bytes"]
    return weights


def weights_memory(box: Box) -> int:
    """Proportional bytes of weights, over all processes of the box."""
    kib = 0
    for pid in box.pids():
        try:
            lines = Path(f"/proc/{pid}/smaps").read_bytes().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ours = False
        for line in lines:
            if header := _HEADER.fullmatch(line):
                ours = bool(_WEIGHTS.fullmatch(header["path"]))
            elif ours and line.startswith(b"Pss:"):
                kib += int(line.split()[1])
    return kib * 1024


def seconds_by_phase(wakes: list[dict[str, float]]) -> Seconds:
    """Also what is left without canary, population and the move of the bytes."""
    found: Seconds = {}
    for phases in wakes:
        rest = phases["total"] - sum(phases.get(name, 0.0) for name in ("canary", "populate", "restore"))
        for name, seconds in {**phases, "beyond": rest}.items():
            found.setdefault(name, []).append(seconds)
    return found


def wake(root: Path, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with running(root, MODEL, figures) as box, ControlClient.connect(RunDir(box.run_dir)) as client:
        for place in PLACES:
            wakes: list[dict[str, float]] = []
            sleeps: list[dict[str, float]] = []
            asked: list[float] = []
            for _ in range(rounds):
                slept = client.sleep(MODEL, to=place, timeout_s=TIMEOUT_S)
                began = time.perf_counter()
                woken = client.wake(MODEL, timeout_s=TIMEOUT_S)
                asked.append(time.perf_counter() - began)
                if slept.residency.place != place or woken.residency.cold:
                    raise SystemExit(f"{place}: {slept.text}; {woken.text} {woken.residency.note}")
                sleeps.append(slept.residency.sleep_phases)
                wakes.append(woken.residency.wake_phases)
            figures[f"wake from {place}"] = seconds_by_phase(wakes)
            figures[f"wake from {place}"]["at the client"] = asked
            figures[f"sleep to {place}"] = {"total": [phases["total"] for phases in sleeps]}
        figures["cold start, after a damaged snapshot"] = cold_start(box, client)
        began = time.perf_counter()
        client.restart(f"{MODEL}.aggregated.0", 30.0, TIMEOUT_S)
        figures["restart of the worker, weights mapped"] = time.perf_counter() - began
        loaded, *_, mapped = [line["phases"] for line in logged(box, "weights")]
        figures["load from the store"] = loaded
        figures["load phase of the restarted worker"] = mapped
    return figures


def cold_start(box: Box, client: ControlClient) -> dict[str, float]:
    """What a wake takes whose snapshot can't be used: its phases."""
    client.sleep(MODEL, to="disk", timeout_s=TIMEOUT_S)
    for shard in (box.home / "cache" / "snapshots").glob("*/*/shard-*"):
        os.truncate(shard, 0)
    woken = client.wake(MODEL, timeout_s=TIMEOUT_S)
    if not woken.residency.cold:
        raise SystemExit(f"a damaged snapshot was loaded: {woken.text}")
    return woken.residency.wake_phases


def memory(root: Path, counts: list[int]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for count in counts:
        found: dict[str, Any] = {}
        with running(root, with_workers(root, count), found) as box:
            client = box.client(timeout=TIMEOUT_S)
            for number in range(2 * count):  # every worker has computed with them
                client.completions.create(model=MODEL, prompt=f"{number} once upon a time", max_tokens=4)
            found["pss"] = weights_memory(box)
            found["one copy"] = one_copy(box)
            found["ratio"] = found["pss"] / found["one copy"]
            lines = logged(box, "weights")
            found["wrote"] = [sum(line["phases"].values()) for line in lines if line["wrote"]]
            found["mapped, without the wait for the writer"] = [
                sum(seconds for phase, seconds in line["phases"].items() if phase != "acquire")
                for line in lines
                if not line["wrote"]
            ]
        figures[f"{count} workers"] = found
    return figures


def swap(root: Path, swaps: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    first_token: Seconds = {}
    with running(root, "two-models", figures) as box:
        client = box.client(timeout=TIMEOUT_S)
        names = [model["name"] for model in box.ps()["models"]]
        for turn in range(swaps):
            name = names[turn % len(names)]
            for _ in range(2):
                what = next(each["state"] for each in box.ps()["models"] if each["name"] == name)
                began = time.perf_counter()
                stream = client.completions.create(
                    model=name, prompt=f"{turn} {what}: the capital of France", max_tokens=4, stream=True
                )
                for number, _ in enumerate(stream):
                    if number == 0:
                        seconds = time.perf_counter() - began
                        first_token.setdefault(f"{name}, {what}", []).append(seconds)
        models = {model["name"]: model["residency"] for model in box.ps()["models"]}
        figures["wakes"] = {name: residency["wakes"] for name, residency in models.items()}
        figures["cold wakes"] = {name: residency["cold_wakes"] for name, residency in models.items()}
        figures["last wake"] = {name: residency["wake_phases"] for name, residency in models.items()}
    figures["first token"] = first_token
    return figures


def told(value: object, depth: int = 1) -> Iterator[str]:
    """Lines for people: lists of seconds as medians with the best in brackets, in ms."""
    if isinstance(value, dict):
        for name, each in value.items():
            head = f"{'  ' * depth}{name}"
            if isinstance(each, dict):
                yield head
                yield from told(each, depth + 1)
            elif isinstance(each, list) and each:
                yield f"{head:44} {median(each) * 1000:9.1f} ms ({min(each) * 1000:.1f})"
            elif isinstance(each, float):
                yield f"{head:44} {each:9.3f}" + ("" if name == "ratio" else " s")
            else:
                yield f"{head:44} {each!s:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--swaps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        if "wake" in options.only:
            figures["wake"] = wake(root, options.rounds)
        if "memory" in options.only:
            figures["memory"] = memory(root, options.workers)
        if "swap" in options.only:
            figures["swap"] = swap(root, options.swaps)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(figures)).decode())
    else:
        for part, found in figures.items():
            print(part, *told(found), sep="\n")


if __name__ == "__main__":
    main()
