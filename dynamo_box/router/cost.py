"""The decision: which worker takes a request. Pure: everything it depends on comes in, randomness included.

    cost = overlap_weight * prefill_blocks + decode_blocks        (in blocks; the lowest wins)

`prefill_blocks` is what the worker would have to compute before this request's first token: prompt tokens
that it has accepted and not yet computed, and this prompt less what is cached. A block that it can load from host
memory or disk counts as a part of one (`TierCosts`). `decode_blocks` are the KV
blocks in use on the worker with this request added, shared ones counted once: the longer the batch, the
slower each step.

A request in two legs (see `legs.py`) is weighed so on its prefill workers, without blocks of its own among their
`decode_blocks`. On its decode workers the `decode_blocks` alone count, since what they need of the prompt arrives.

Temperature 0 takes the lowest cost; among equals whoever has an `edge`, then the smallest index, then chance. Above 0
the worker is drawn with probabilities softmax(-(cost normalised by its range) / temperature).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dynamo_box.protocol.figures import Candidate
from dynamo_box.protocol.request import Leg

Mode = Literal["kv", "round-robin", "random"]

MODES: tuple[Mode, ...] = get_args(Mode)
EDGES: dict[Leg, str] = {"whole": "preferred", "prefill": "for prefill alone", "decode": "more cached"}
"""What an edge is, by leg."""

MAX_KNOB = 1e6
"""Largest overlap weight and temperature; keeps every cost finite."""


@dataclass(frozen=True, slots=True)
class Knobs:
    overlap_weight: float = 1.0
    temperature: float = 0.0

    def overridden(self, overlap_weight: float | None, temperature: float | None) -> Knobs:
        """These, with what one request asks for itself."""
        return Knobs(
            self.overlap_weight if overlap_weight is None else overlap_weight,
            self.temperature if temperature is None else temperature,
        )

    def problem(self) -> str:
        """Why these can't be used, or "" when they can."""
        for name, value in (("overlap_weight", self.overlap_weight), ("temperature", self.temperature)):
            if not 0.0 <= value <= MAX_KNOB:  # false for NaN
                return f"{name} must be a number from 0 to {MAX_KNOB:,.0f}, not {value}"
        return ""


@dataclass(frozen=True, slots=True)
class TierCosts:
    """What loading a block from a tier costs, in blocks computed."""

    host: float = 0.1
    disk: float = 0.3

    def problem(self) -> str:
        """Why these can't be used, or "" when they can."""
        for name, value in (("host_block_cost", self.host), ("disk_block_cost", self.disk)):
            if not 0.0 <= value <= MAX_KNOB:
                return f"{name} must be a number from 0 to {MAX_KNOB:,.0f}, not {value}"
        return ""


DEFAULT_COSTS = TierCosts()


@dataclass(frozen=True, slots=True)
class Option:
    """A worker that could take the request, as it stands now.

    `overlap_blocks` of the prompt are cached there, and `host_blocks` and `disk_blocks` more would be loaded;
    `prefill_tokens` it has yet to compute, without this request; `decode_blocks` it would have in use with this
    request added; `indexed_blocks` is the size of its index; the largest `edge` wins among equals.
    """

    worker: str
    overlap_blocks: int
    prefill_tokens: int
    decode_blocks: int
    indexed_blocks: int
    host_blocks: int = 0
    disk_blocks: int = 0
    edge: int = 0

    @property
    def spared_blocks(self) -> int:
        """Blocks of the prompt that aren't computed."""
        return self.overlap_blocks + self.host_blocks + self.disk_blocks


@dataclass(frozen=True, slots=True)
class Choice:
    """`option` won; `candidates` are all that were weighed; `reason` is one line for a person."""

    option: Option
    candidates: tuple[Candidate, ...]
    reason: str


def parse_mode(text: str) -> Mode:
    """Raises:
    ValueError: no such mode.
    """
    for mode in MODES:
        if mode == text:
            return mode
    raise ValueError(f"no routing mode {text!r}; there are {', '.join(MODES)}")


def prefill_blocks(option: Option, prompt_tokens: int, block_size: int, tier_costs: TierCosts = DEFAULT_COSTS) -> float:
    """Blocks to compute before the first token, other requests' included; never below theirs."""
    uncached = max(prompt_tokens - option.spared_blocks * block_size, 0)
    loading = option.host_blocks * tier_costs.host + option.disk_blocks * tier_costs.disk
    return (option.prefill_tokens + uncached) / block_size + loading


def weigh(
    option: Option,
    prompt_tokens: int,
    block_size: int,
    overlap_weight: float,
    tier_costs: TierCosts = DEFAULT_COSTS,
) -> Candidate:
    blocks = prefill_blocks(option, prompt_tokens, block_size, tier_costs)
    return Candidate(
        worker=option.worker,
        overlap_blocks=option.overlap_blocks,
        prefill_blocks=blocks,
        decode_blocks=option.decode_blocks,
        cost=overlap_weight * blocks + option.decode_blocks,
        host_blocks=option.host_blocks,
        disk_blocks=option.disk_blocks,
    )


def decide(
    mode: Mode,
    options: Sequence[Option],
    *,
    prompt_tokens: int,
    block_size: int,
    knobs: Knobs,
    rng: random.Random,
    last: str = "",
    pinned: bool = False,
    tier_costs: TierCosts = DEFAULT_COSTS,
    leg: Leg = "whole",
) -> Choice:
    """Choose among `options` (at least one) for one leg of a request, or for the whole of it.

    `last` is the worker that round-robin chose before; names go round in sorted order. `pinned`: the client
    named the only option.
    """
    computed, weight = (0, 0.0) if leg == "decode" else (prompt_tokens, knobs.overlap_weight)
    candidates = tuple(weigh(option, computed, block_size, weight, tier_costs) for option in options)
    if pinned:
        winner, why = 0, "named by the request"
    elif mode == "round-robin":
        winner, why = _next_in_turn([option.worker for option in options], last), "its turn"
    elif mode == "random":
        winner, why = rng.randrange(len(options)), "drawn at random"
    elif len(options) == 1:
        winner, why = 0, "the only worker" if leg == "whole" else f"the only one for {leg}"
    elif knobs.temperature > 0.0:
        winner = _draw([candidate.cost for candidate in candidates], knobs.temperature, rng)
        why = f"{_against(candidates, winner)}, drawn at temperature {knobs.temperature:g}"
    else:
        winner, tie = _lowest(candidates, options, rng, leg)
        why = _against(candidates, winner) + tie
    option = options[winner]
    prompt_blocks = -(-prompt_tokens // block_size)
    rest = "the rest arrives, " if leg == "decode" else _loads(option)
    reason = f"{option.worker}: {option.overlap_blocks} of {prompt_blocks} blocks cached, {rest}{why}"
    return Choice(option, candidates, reason)


def _loads(option: Option) -> str:
    parts = []
    if option.host_blocks:
        parts.append(f"{option.host_blocks} in host memory")
    if option.disk_blocks:
        parts.append(f"{option.disk_blocks} on disk")
    return f"{' and '.join(parts)}, " if parts else ""


def _next_in_turn(workers: list[str], last: str) -> int:
    later = [worker for worker in workers if worker > last]
    return workers.index(min(later or workers))


def _draw(costs: list[float], temperature: float, rng: random.Random) -> int:
    lowest, spread = min(costs), max(costs) - min(costs)
    if spread == 0.0:
        return rng.randrange(len(costs))
    weights = [math.exp(-(cost - lowest) / spread / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]


def _lowest(
    candidates: Sequence[Candidate], options: Sequence[Option], rng: random.Random, leg: Leg
) -> tuple[int, str]:
    lowest = min(candidate.cost for candidate in candidates)
    level = [index for index, candidate in enumerate(candidates) if candidate.cost == lowest]
    if len(level) == 1:
        return level[0], ""
    best = max(options[index].edge for index in level)
    level = [index for index in level if options[index].edge == best]
    if len(level) == 1:
        return level[0], f" (level; {EDGES[leg]})"
    smallest = min(options[index].indexed_blocks for index in level)
    smallest_level = [index for index in level if options[index].indexed_blocks == smallest]
    if len(smallest_level) == 1:
        return smallest_level[0], " (level; the smallest index)"
    return rng.choice(smallest_level), " (level; drawn)"


def _against(candidates: Sequence[Candidate], winner: int) -> str:
    """The winner's cost beside the best of the others'."""
    best_other = min(candidate.cost for index, candidate in enumerate(candidates) if index != winner)
    return f"cost {candidates[winner].cost:.1f} vs {best_other:.1f}"
