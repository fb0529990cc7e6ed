"""What prefill here and decode there is worth: the same load on the same two workers and cores, in two legs and in one;
what handing a prompt over costs; how long a death is felt.

    python tests/bench/disagg.py [--rates 0.1 0.2 0.4 0.8] [--requests 32] [--rounds 5]
                                 [--only load handover chunks recovery] [--quick] [--json]

The embedded model has to be in the store of `$DYNBOX_HOME` (`dynbox pull smollm2`). Boxes have run dir, logs and disk
tier in a temporary directory (`--directory`: on a disk, not on a tmpfs).

load        half the requests are long prompts with short answers (1,500 and 8 tokens), half short prompts with long
            answers (32 and 200 tokens), at so many requests a second in all, the same ones at the same random times on
            `smollm2-disagg`, on the same where only long prompts go in two legs (policy conditional), and on
            `smollm2-duo`. The time between tokens is that of the long answers. It pays from the rate on at which, and
            at all higher ones, the p99 is lower in two legs.
handover    a prompt of 2,000 random tokens: the worker's own word of it, and the gap between its first and second
            token at the client less that of the same prompt in one leg; both over a copy of as many bytes.
chunks      the same prompt with steps of at most so many tokens (`max_batch_tokens`): what a step has computed is
            stored while the next one runs. Time to the first token, from there to the second, and both together.
recovery    from `kill -9` of the prefill worker to the next token at the client: one that has just got a short prompt,
            and one in the middle of a long prompt; and of the decode worker in the middle of an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from box_under_test import Box, eventually  # noqa: E402
from two_legs import Ask, figures, nothing_is_held, workers  # noqa: E402

from dynamo_box.paths import home  # noqa: E402

MODEL = "smollm2"
PREFILL, DECODE = "smollm2.prefill.0", "smollm2.decode.0"
PROFILES = {"two legs": "smollm2-disagg", "one leg": "smollm2-duo"}
WAYS = {
    "two legs": (PROFILES["two legs"], "fallback"),
    "long prompts in two legs": (PROFILES["two legs"], "conditional:min_uncached_tokens=512"),
    "one leg": (PROFILES["one leg"], ""),
}
"""How a load is served: profile and policy."""
VOCABULARY = 49152
PARTS = ("load", "handover", "chunks", "recovery")
TIMEOUT_S = 600.0
LONG_PROMPT = (1500, 8)
LONG_ANSWER = (32, 200)
HANDED_OVER = 2000
STEP_TOKENS = (256, 512, 1024, 2048)
FEW = 8
WARM_UP_TOKENS = 64


@contextmanager
def box_of(root: Path, profile: str) -> Iterator[Box]:
    """A running box over the user's models, whose workers have each answered something."""
    directory = Path(tempfile.mkdtemp(dir=root))
    (directory / "home").mkdir()
    (directory / "home" / "models").symlink_to(home().models)
    box = Box(directory / "run", directory / "home")
    try:
        box.up(profile)
        for number, worker in enumerate(workers(box)):
            ask(box, prompt(-1 - number, WARM_UP_TOKENS), FEW, backend_instance_id=worker).whole()
        ask(box, prompt(-10, WARM_UP_TOKENS), FEW).whole()
        yield box
    finally:
        box.destroy()


def prompt(seed: int, tokens: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(100, VOCABULARY) for _ in range(tokens)]


def ask(box: Box, tokens: list[int], max_tokens: int, **nvext: Any) -> Ask:
    body = {"model": MODEL, "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "nvext": nvext}
    return Ask(box, body, TIMEOUT_S)


def arrivals(asked: Ask, since: float) -> list[float]:
    """Seconds from `since` to each piece of text."""
    return [time.perf_counter() - since for _ in asked.pieces()]


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


# load


def offered(box: Box, rate: float, requests: int, seed: int) -> dict[str, float]:
    """Milliseconds under an open load of so many requests a second."""
    chooser = random.Random(seed)
    kinds = [LONG_PROMPT, LONG_ANSWER] * ((requests + 1) // 2)
    chooser.shuffle(kinds)
    due = 0.0
    began = time.perf_counter()

    def one(number: int, kind: tuple[int, int]) -> tuple[tuple[int, int], list[float]]:
        asked = time.perf_counter()
        return kind, arrivals(ask(box, prompt(seed * 1000 + number, kind[0]), kind[1]), asked)

    with ThreadPoolExecutor(requests) as many:
        running = []
        for number, kind in enumerate(kinds[:requests]):
            time.sleep(max(0.0, began + due - time.perf_counter()))
            running.append(many.submit(one, number, kind))
            due += chooser.expovariate(rate)
        answers = [each.result() for each in running]
    took = time.perf_counter() - began
    between = [gap for kind, times in answers if kind == LONG_ANSWER for gap in gaps(times)]
    first = {kind: [times[0] for asked, times in answers if asked == kind] for kind in (LONG_PROMPT, LONG_ANSWER)}
    every = [seconds for kind in first.values() for seconds in kind]
    return {
        "itl p50": quantile(between, 0.5) * 1e3,
        "itl p99": quantile(between, 0.99) * 1e3,
        "ttft p50": quantile(every, 0.5) * 1e3,
        "ttft p99": quantile(every, 0.99) * 1e3,
        "ttft p50, long prompts": median(first[LONG_PROMPT]) * 1e3,
        "ttft p50, long answers": median(first[LONG_ANSWER]) * 1e3,
        "over after s": took,
    }


def load(root: Path, rates: list[float], requests: int, rounds: int) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, list[float]]]] = {f"{rate:g}/s": {} for rate in rates}
    for seed in range(rounds):
        for way, (profile, policy) in WAYS.items():
            with box_of(root, profile) as box:
                if policy:
                    box.dynbox("disagg", "--policy", policy)
                for place, rate in enumerate(rates):
                    figure = offered(box, rate, requests, seed * 100 + place)
                    nothing_is_held(box)
                    of_way = found[f"{rate:g}/s"].setdefault(way, {})
                    for name, value in figure.items():
                        of_way.setdefault(name, []).append(value)
    figures_by_rate: dict[str, Any] = dict(found)

    def lower(way: str, rate: float, name: str) -> bool:
        by_way = found[f"{rate:g}/s"]
        return median(by_way[way][name]) < median(by_way["one leg"][name])

    for way in [each for each in WAYS if each != "one leg"]:
        for name in ("itl p99", "ttft p99"):
            pays = None
            for rate in sorted(rates, reverse=True):
                if not lower(way, rate, name):
                    break
                pays = rate
            figures_by_rate[f"lower {name}, {way}, from"] = "no rate" if pays is None else f"{pays:g}/s"
    return figures_by_rate


# hand-over


def copy_seconds(size: int) -> float:
    """One copy of so many bytes, between buffers that are there."""
    source, target = memoryview(bytearray(b"x" * size)), memoryview(bytearray(b"y" * size))
    began = time.perf_counter()
    target[:] = source
    return time.perf_counter() - began


def handed_over_in(box: Box, before: dict[str, Any]) -> float:
    """By the prefill worker's own word."""
    after: dict[str, Any] = eventually(
        lambda: (now := figures(box, PREFILL))["handed_over"] > before["handed_over"] and now, "the worker says so"
    )
    return float(after["handover_seconds"] - before["handover_seconds"])


def handover(root: Path, rounds: int) -> dict[str, Any]:
    ms: dict[str, list[float]] = {name: [] for name in ("worker", "gap", "gap in one leg", "added", "copy")}
    with box_of(root, PROFILES["two legs"]) as box:
        layout = figures(box, "kvstore")["layouts"][0]
        size = -(-HANDED_OVER // layout["block_size"]) * layout["block_bytes"]
        for seed in range(rounds):
            tokens = prompt(seed, HANDED_OVER)
            before = figures(box, PREFILL)
            began = time.perf_counter()
            asked = ask(box, tokens, FEW)
            gap = gaps(arrivals(asked, began))[0]
            if asked.workers != (PREFILL, DECODE):
                raise SystemExit(f"not in two legs: {asked.workers}")
            worker = handed_over_in(box, before)
            alone = ask(box, tokens, FEW, backend_instance_id=PREFILL)
            plain = gaps(arrivals(alone, began))[0]
            if alone.said != asked.said:
                raise SystemExit("two legs said something else than one")
            ms["worker"].append(worker * 1e3)
            ms["gap"].append(gap * 1e3)
            ms["gap in one leg"].append(plain * 1e3)
            ms["added"].append((gap - plain) * 1e3)
            ms["copy"].append(copy_seconds(size) * 1e3)
    copy = median(ms["copy"])
    return {
        "MB": size / 1e6,
        "ms": ms,
        "over the copy": {name: median(ms[name]) / copy for name in ("worker", "gap", "added")},
    }


def chunks(root: Path, rounds: int) -> dict[str, Any]:
    ms: dict[str, dict[str, list[float]]] = {}
    for step in STEP_TOKENS:
        profile = root / f"steps-of-{step}.yaml"
        options = f"options: {{max_batch_tokens: {step}}}"
        profile.write_text(f"extends: {PROFILES['two legs']}\nmodel: {{name: {MODEL}, {options}}}\n")
        times = ms[f"{step} tokens a step"] = {name: [] for name in ("first token", "gap", "second token", "worker")}
        with box_of(root, str(profile)) as box:
            for seed in range(rounds):
                before = figures(box, PREFILL)
                began = time.perf_counter()
                asked = ask(box, prompt(seed, HANDED_OVER), FEW)
                first, second, *_ = arrivals(asked, began)
                if asked.workers != (PREFILL, DECODE):
                    raise SystemExit(f"not in two legs: {asked.workers}")
                times["first token"].append(first * 1e3)
                times["gap"].append((second - first) * 1e3)
                times["second token"].append(second * 1e3)
                times["worker"].append(handed_over_in(box, before) * 1e3)
    return {"ms": ms}


# recovery


def roles(box: Box) -> dict[str, int]:
    """As the frontend knows them."""
    with urlopen(f"http://127.0.0.1:{box.port}/health") as answer:
        found: dict[str, int] = json.load(answer)["roles"][MODEL]
    return found


def recovery(root: Path, rounds: int) -> dict[str, Any]:
    ms: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        ms.setdefault(name, []).append(seconds * 1e3)

    def next_piece(pieces: Iterator[str]) -> float:
        began = time.perf_counter()
        next(pieces)
        return time.perf_counter() - began

    def back(box: Box, worker: str, restarts: int) -> None:
        eventually(lambda: box.process(worker)["restarts"] > restarts, f"{worker} was restarted")
        box.wait_ready()
        eventually(lambda: roles(box) == {"prefill": 1, "decode": 1}, "the frontend knows both workers")
        nothing_is_held(box)

    patient = root / "patient.yaml"  # so many deaths in a row are the bench's, not the worker's
    patient.write_text(f"extends: {PROFILES['two legs']}\nrestart: {{give_up_after: 1000, longest: 1s}}\n")
    with box_of(root, str(patient)) as box:
        for seed in range(rounds):
            alone = ask(box, prompt(9000 + seed, LONG_PROMPT[0]), FEW, backend_instance_id=DECODE)
            cold = next_piece(alone.pieces())
            note(f"first token of {LONG_PROMPT[0]} tokens, undisturbed", cold)
            alone.close()
            for name, tokens in (("short prompt", LONG_ANSWER[0]), ("long prompt", LONG_PROMPT[0])):
                frozen = tokens < LONG_PROMPT[0]
                nothing_is_held(box)
                worker = box.process(PREFILL)
                if frozen:  # so that it has the request and can't have answered it
                    os.kill(worker["pid"], signal.SIGSTOP)
                asked = ask(box, prompt(10_000 + 10 * seed + tokens, tokens), FEW)
                if frozen:
                    eventually(lambda: figures(box, "frontend")["active"], "the request is there")
                else:
                    time.sleep(cold / 2)
                os.kill(worker["pid"], signal.SIGKILL)
                note(f"prefill worker dies, {name}", next_piece(pieces := asked.pieces()))
                for _ in pieces:
                    continue
                if asked.workers != (None, DECODE):
                    raise SystemExit(f"{name}: the death came too late: {asked.workers}")
                back(box, PREFILL, worker["restarts"])
            worker = box.process(DECODE)
            asked = ask(box, prompt(20_000 + seed, LONG_ANSWER[0]), 4 * FEW)
            pieces = asked.pieces()
            for _ in range(FEW):
                next(pieces)
            os.kill(worker["pid"], signal.SIGKILL)
            note("decode worker dies, in its answer", max(next_piece(pieces) for _ in range(2 * FEW)))
            for _ in pieces:
                continue
            back(box, DECODE, worker["restarts"])
    return {"ms": ms}


def show(found: dict[str, Any]) -> Iterator[str]:
    for name, figure in found.items():
        if isinstance(figure, dict):
            yield name
            yield from ("  " + line for line in show(figure))
        elif isinstance(figure, list):
            yield f"{name:44} {median(figure):10.1f} (min {min(figure):.1f}, max {max(figure):.1f})"
        else:
            yield f"{name:44} {figure if isinstance(figure, str) else format(figure, '.2f'):>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What prefill here and decode there is worth.")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8], help="requests a second")
    parser.add_argument("--requests", type=int, default=32, help="at each rate")
    parser.add_argument("--rounds", type=int, default=None, help="default: 5, of the load 3")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="one rate, four requests, one round: does it run?")
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rates, arguments.requests, arguments.rounds = [0.5], 4, 1
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        if "load" in arguments.only:
            found["load"] = load(Path(root), arguments.rates, arguments.requests, arguments.rounds or 3)
        if "handover" in arguments.only:
            found["handover"] = handover(Path(root), arguments.rounds or 5)
        if "chunks" in arguments.only:
            found["chunks"] = chunks(Path(root), arguments.rounds or 5)
        if "recovery" in arguments.only:
            found["recovery"] = recovery(Path(root), arguments.rounds or 5)
    print(json.dumps(found) if arguments.json else "\n".join(show(found)))


if __name__ == "__main__":
    main()
