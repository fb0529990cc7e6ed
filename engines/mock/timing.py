"""How long a step and a hand-over take, and keeping to it.

Without `parameters` a step has two rates: prompt tokens a second, and a time for one more token of all that decode.
With `parameters` it is the sum of what a transformer does on tensor-parallel GPUs, whose figures are options too:

    compute = (2 × parameters × tokens + 4 × width × pairs) / (flops_per_s × tensor_parallel × flops_efficiency)
    memory  = (weights_bytes + kv_bytes_per_token × KV tokens read) / (memory_bytes_per_s × tensor_parallel
              × memory_efficiency)
    links   = tokens × 8 × width × (tensor_parallel - 1) / tensor_parallel / link_bytes_per_s

A multiplication and an addition for each weight and token (Kaplan et al. 2020, 2.1); in attention the same for scores
and for values, for each pair of a token and one before it, in each layer: `width` is layers × hidden size. Weights are
read once a step, KV once for each sequence. Two all-reduces a layer move 2 × (n - 1) / n × 2 bytes × hidden size a
token over each GPU's link (Shoeybi et al. 2019; a ring).

The sum, rather than the largest of the three, is what measurements look like. With the figures below and a full batch
it gives the output tokens a second of Llama 3.3 70B FP8 in TensorRT-LLM's performance overview (1.0; seven lengths of
prompt and answer from 128/2048 to 20000/2000) within 6 % on two H100, and 3 to 15 % too few on one H200:
`tests/engines/mock/test_timing.py`.

                        H100 SXM 80 GB    H200 SXM 141 GB
    flops_per_s             1979e12           1979e12     dense FP8; bfloat16 has half (NVIDIA's data sheets)
    memory_bytes_per_s      3.35e12           4.8e12      (the same)
    link_bytes_per_s        300e9             300e9       NVLink 4 has 450e9 each way; two thirds are reached
    transfer_bytes_per_s    55e9              55e9        PCIe 5.0 x16: 63e9 by the standard, 55e9 by nvbandwidth
    flops_efficiency        0.58              0.58        fitted to 2048/128 on one H200: 442 output tokens/s
    memory_efficiency       0.75              0.75        51.14 tokens/s of one request on one H200 (NVIDIA's blog,
                                                          December 2024): 19.6 ms, 70.6e9 / 4.8e12 = 14.7 ms if perfect

    Llama 3.3 70B (its config.json): 80 layers, hidden size 8192, 8 KV heads of 128
    parameters 70.6e9 · width 80 × 8192 = 655360 · weights_bytes 70.6e9 in FP8, 141.2e9 in bfloat16
    kv_bytes_per_token 2 × 80 × 8 × 128 × 2 = 327680 in bfloat16, 163840 in FP8
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engines.mock.options import MockOptions


@dataclass(frozen=True, slots=True)
class Step:
    """What a step does: tokens of prompts, sequences that get one token more, pairs of a token and one that it attends
    to, and tokens whose KV is read.
    """

    prefill_tokens: int = 0
    decoding: int = 0
    pairs: int = 0
    kv_tokens: int = 0


def step_seconds(options: MockOptions, step: Step) -> float:
    """By the clock: `speedup` is taken into account."""
    tokens = step.prefill_tokens + step.decoding
    if options.speedup == "infinite" or not tokens:
        return 0.0
    if options.parameters is not None:
        seconds = _modelled(options, options.parameters, step, tokens)
    else:
        seconds = step.prefill_tokens / options.prefill_tokens_per_s
        seconds += options.decode_ms / 1000.0 if step.decoding else 0.0
    return seconds / options.speedup


def _modelled(options: MockOptions, parameters: float, step: Step, tokens: int) -> float:
    gpus = options.tensor_parallel
    flops = 2 * parameters * tokens + 4 * options.width * step.pairs
    compute = flops / (options.flops_per_s * gpus * options.flops_efficiency)
    weights = 2 * parameters if options.weights_bytes is None else options.weights_bytes
    read = weights + options.kv_bytes_per_token * step.kv_tokens
    memory = read / (options.memory_bytes_per_s * gpus * options.memory_efficiency)
    links = tokens * 8 * options.width * (gpus - 1) / gpus / options.link_bytes_per_s
    return compute + memory + links


def copy_seconds(options: MockOptions, tokens: int) -> float:
    """For the KV of so many tokens between the GPUs and host memory, each GPU copying its part."""
    if options.speedup == "infinite":
        return 0.0
    rate = options.transfer_bytes_per_s * options.tensor_parallel * options.speedup
    return tokens * options.kv_bytes_per_token / rate


class Link:
    """One direction of the way between a worker's KV pool and host memory: what is copied goes one after another."""

    def __init__(self, options: MockOptions) -> None:
        self._options = options
        self._free_at = 0.0

    def copy(self, tokens: int, now: float) -> float:
        """When the KV of so many tokens has been copied, and all that was asked for before."""
        self._free_at = max(self._free_at, now) + copy_seconds(self._options, tokens)
        return self._free_at


class Pace:
    """Waits for steps to take their time. What one wait overshoots is taken off the next, so that rates hold;
    a pause of the loop longer than a step is not caught up with.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time()

    def restart(self) -> None:
        """After idling: the next step begins now."""
        self._due = self._loop.time()

    async def step(self, seconds: float) -> None:
        """Always gives the loop a turn, however short the step."""
        now = self._loop.time()
        self._due = max(self._due + seconds, now)
        await asyncio.sleep(self._due - now)
