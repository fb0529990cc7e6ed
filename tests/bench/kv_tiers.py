"""What the KV tiers are worth: time to the first token by where a prompt's KV was found, and what offloading costs.

    python tests/bench/kv_tiers.py [--rounds 5] [--tokens 2000] [--only ttft throughput] [--directory DIR] [--json]

The embedded model has to be in the store of `$DYNBOX_HOME` (`dynbox pull smollm2`). Boxes have run dir, logs and disk
tier in a temporary directory (`--directory`: on a disk, not on a tmpfs).

ttft        a prompt of random tokens: cold; again (device: the engine's own pool); again after a sleep and a wake,
            which empty the pool (host); again after `down` and `up` (disk). Each figure counts only if the answer's
            usage says that the tokens were reused, and the tiers say from where.
throughput  the same load (distinct prompts, several at once) on two boxes in turn, one with tiers and one without:
            output tokens a second, offload running all the time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from box_under_test import Box, eventually  # noqa: E402

from dynamo_box.control.client import ControlClient  # noqa: E402
from dynamo_box.paths import RunDir, home  # noqa: E402

MODEL = "smollm2"
VOCABULARY = 49152
TIMEOUT_S = 300.0
PARTS = ("ttft", "throughput")
AT_ONCE = 4
REQUESTS = 24
PROMPT_TOKENS = 256
OUTPUT_TOKENS = 64


@contextmanager
def home_of_a_box(root: Path) -> Iterator[Box]:
    """A box that doesn't run yet, over the user's models."""
    directory = Path(tempfile.mkdtemp(dir=root))
    (directory / "home").mkdir()
    (directory / "home" / "models").symlink_to(home().models)
    box = Box(directory / "run", directory / "home")
    try:
        yield box
    finally:
        box.destroy()


def worker_tiers(box: Box) -> dict[str, Any]:
    figures = box.process(f"{MODEL}.aggregated.0")["figures"]
    found: dict[str, Any] = figures["tiers"]
    return found


def offloaded(box: Box) -> bool:
    """Whether everything is in host memory and, if it is to go there, on disk."""
    tiers = worker_tiers(box)
    store = box.process("kvstore")["figures"]
    return not tiers["queued"] and not tiers["pinned"] and not store["disk"]["queued"]


def first_token(box: Box, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and the prompt tokens that were reused."""
    client = box.client(timeout=TIMEOUT_S)
    began = time.perf_counter()
    seconds = 0.0
    cached = 0
    stream = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=4,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"nvext": {"ignore_eos": True}},
    )
    for chunk in stream:
        seconds = seconds or time.perf_counter() - began
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
    return seconds, cached


def ttft(root: Path, rounds: int, tokens: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"cold": [], "device": [], "host": [], "disk": []}
    chooser = random.Random(0)
    reusable = (tokens - 1) // 16 * 16
    prompts = [[chooser.randrange(100, VOCABULARY) for _ in range(tokens)] for _ in range(rounds)]

    def measure(box: Box, where: str, prompt: list[int], expected: int) -> None:
        before = worker_tiers(box)
        took, cached = first_token(box, prompt)
        if cached != expected:
            raise SystemExit(f"{where}: {cached} of {tokens} tokens were reused, not {expected}")
        after = worker_tiers(box)
        for tier in ("host", "disk"):
            loaded = after[tier]["loaded"] - before[tier]["loaded"]
            if loaded != (expected if tier == where else 0):
                raise SystemExit(f"{where}: {loaded} tokens came from {tier}")
        seconds[where].append(took)

    with home_of_a_box(root) as box:
        box.up(MODEL)
        first_token(box, [1, 2, 3, 4] * 8)
        for prompt in prompts:
            measure(box, "cold", prompt, 0)
            measure(box, "device", prompt, reusable)
            eventually(lambda: offloaded(box), "the tiers have it")
            with ControlClient.connect(RunDir(box.run_dir)) as client:
                client.sleep(MODEL, to="device", timeout_s=TIMEOUT_S)
                client.wake(MODEL, timeout_s=TIMEOUT_S)
            measure(box, "host", prompt, reusable)
        for prompt in prompts:
            box.down()
            box.up(MODEL)
            first_token(box, [1, 2, 3, 4] * 8)
            measure(box, "disk", prompt, reusable)
        figures: dict[str, Any] = {"ttft ms": {where: [s * 1e3 for s in took] for where, took in seconds.items()}}
    cold = median(seconds["cold"])
    figures["faster than cold"] = {where: cold / median(took) for where, took in seconds.items() if where != "cold"}
    return figures


def load(box: Box, seed: int) -> float:
    """Output tokens a second."""
    chooser = random.Random(seed)
    client = box.client(timeout=TIMEOUT_S)
    prompts = [[chooser.randrange(100, VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]

    def one(prompt: list[int]) -> int:
        done = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=OUTPUT_TOKENS,
            temperature=0.0,
            extra_body={"nvext": {"ignore_eos": True}},
        )
        assert done.usage is not None
        return done.usage.completion_tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tokens = sum(pool.map(one, prompts))
    return tokens / (time.perf_counter() - began)


def throughput(root: Path, rounds: int) -> dict[str, Any]:
    bare = root / "without-tiers.yaml"
    bare.write_text(f"extends: {MODEL}\nmemory:\n  tiers: {{host: 0, disk: 0}}\n")
    rates: dict[str, list[float]] = {"with tiers": [], "without": []}
    for seed in range(rounds):
        for name, profile in (("with tiers", MODEL), ("without", str(bare))):
            with home_of_a_box(root) as box:
                box.up(profile)
                load(box, 1000 + seed)
                rates[name].append(load(box, seed))
                if name == "with tiers" and not worker_tiers(box)["offloaded"]:
                    raise SystemExit("nothing was offloaded")
    ratio = median(rates["with tiers"]) / median(rates["without"])
    return {"output tokens/s": rates, "with tiers / without": ratio}


def show(figures: dict[str, Any]) -> Iterator[str]:
    for name, figure in figures.items():
        if isinstance(figure, dict):
            yield name
            yield from ("  " + line for line in show(figure))
        elif isinstance(figure, list):
            best = min(figure)
            yield f"{name:24} {median(figure):10.1f} (min {best:.1f}, max {max(figure):.1f})"
        else:
            yield f"{name:24} {figure:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the KV tiers are worth.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        if "ttft" in arguments.only:
            figures["ttft"] = ttft(Path(root), arguments.rounds, arguments.tokens)
        if "throughput" in arguments.only:
            figures["throughput"] = throughput(Path(root), arguments.rounds)
    print(json.dumps(figures) if arguments.json else "\n".join(show(figures)))


if __name__ == "__main__":
    main()
