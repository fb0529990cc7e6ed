"""How long a step and a hand-over take, against the formulas and against what was measured on the real thing."""

from __future__ import annotations

import math

import pytest

from engines.mock.options import MockOptions
from engines.mock.timing import Link, Step, copy_seconds, step_seconds

PARAMETERS, WIDTH, WEIGHTS, KV_FP8 = 70.6e9, 80 * 8192, 70.6e9, 2 * 80 * 8 * 128
LLAMA_70B_FP8 = {"parameters": PARAMETERS, "width": WIDTH, "weights_bytes": WEIGHTS, "kv_bytes_per_token": KV_FP8}
TWO_H100 = MockOptions(**LLAMA_70B_FP8, tensor_parallel=2)
ONE_H200 = MockOptions(**LLAMA_70B_FP8, memory_bytes_per_s=4.8e12)

# Output tokens a second of Llama 3.3 70B FP8 by prompt and output tokens, from NVIDIA/TensorRT-LLM,
# docs/source/performance/perf-overview.md, commit 00f37686.
MEASURED = {
    (128, 2048): (6651, 4336),
    (500, 2000): (5222, 3666),
    (1000, 1000): (4205, 2909),
    (2048, 128): (762, 442),
    (2048, 2048): (3082, 2003),
    (5000, 500): (898, 566),
    (20000, 2000): (437, 283),
}
MEMORY_USED, NOT_KV, CHUNK = 0.95, 5e9, 8192  # the overview's share of memory; activations of a GPU; default chunk


def output_rate(options: MockOptions, memory: float, prompt: int, output: int) -> float:
    """Output tokens a second when as many requests as the KV pool holds are decoding, and each one that ends is
    replaced: a step has one token of each, and of prompts what keeps up with that.
    """
    kv = MEMORY_USED * memory - WEIGHTS - NOT_KV * options.tensor_parallel
    batch = int(kv / options.kv_bytes_per_token / (prompt + output / 2))
    prefill = batch * prompt / output
    kv_tokens = batch * (prompt + output / 2)
    whole = Step(round(prefill), batch, round(kv_tokens + prefill * prompt / 2), round(kv_tokens + prefill))
    again = step_seconds(options, Step(0, 1)) * max(0.0, prefill / CHUNK - 1)  # weights, once more for each chunk
    return batch / (step_seconds(options, whole) + again)


@pytest.mark.parametrize(("prompt", "output"), MEASURED)
def test_what_was_measured_comes_out(prompt: int, output: int) -> None:
    h100, h200 = MEASURED[prompt, output]
    assert output_rate(TWO_H100, 2 * 80e9, prompt, output) == pytest.approx(h100, rel=0.065)
    assert 0.85 < output_rate(ONE_H200, 141e9, prompt, output) / h200 < 1.0


def test_one_request_decodes_as_fast_as_was_measured() -> None:
    assert 1 / step_seconds(ONE_H200, Step(0, 1, 500, 500)) == pytest.approx(51.14, rel=0.02)


def test_a_step_is_what_it_computes_reads_and_passes_between_gpus() -> None:
    options = MockOptions(
        parameters=1e9,
        width=1000,
        weights_bytes=3e9,
        kv_bytes_per_token=500,
        tensor_parallel=4,
        flops_per_s=1e12,
        flops_efficiency=0.5,
        memory_bytes_per_s=1e10,
        memory_efficiency=0.25,
        link_bytes_per_s=1e9,
    )
    compute = (2 * 1e9 * 110 + 4 * 1000 * 7000) / (4 * 1e12 * 0.5)
    memory = (3e9 + 500 * 9000) / (4 * 1e10 * 0.25)
    links = 110 * 8 * 1000 * 3 / 4 / 1e9
    step = Step(prefill_tokens=100, decoding=10, pairs=7000, kv_tokens=9000)
    assert step_seconds(options, step) == pytest.approx(compute + memory + links)
    assert step_seconds(options, Step()) == 0, "nothing to do takes no time"


def test_weights_have_two_bytes_a_parameter_where_nothing_is_said_and_one_gpu_has_no_links() -> None:
    slow_links = MockOptions(parameters=1e9, width=1000, link_bytes_per_s=1e-9)
    said = MockOptions(parameters=1e9, width=1000, weights_bytes=2e9)
    assert step_seconds(slow_links, Step(10)) == step_seconds(said, Step(10))


def test_decoding_gets_slower_with_the_batch_and_with_its_contexts() -> None:
    alone, batch, long = (
        step_seconds(TWO_H100, Step(0, size, size * context, size * context))
        for size, context in ((1, 1000), (64, 1000), (64, 8000))
    )
    assert alone < batch < long
    assert batch < 2 * alone, "which is why batches pay"


@pytest.mark.parametrize(
    ("options", "tokens", "seconds"),
    [
        ({"kv_bytes_per_token": 1000, "transfer_bytes_per_s": 1e6}, 100, 0.1),
        ({"kv_bytes_per_token": 1000, "transfer_bytes_per_s": 1e6, "tensor_parallel": 4}, 100, 0.025),
        ({"kv_bytes_per_token": 1000, "transfer_bytes_per_s": 1e6, "speedup": 10}, 100, 0.01),
        ({"kv_bytes_per_token": 1000, "transfer_bytes_per_s": 1e6, "speedup": "infinite"}, 100, 0.0),
        ({"kv_bytes_per_token": 327_680, "tensor_parallel": 2}, 2000, 2000 * 327_680 / 110e9),
    ],
)
def test_a_copy_takes_its_bytes_over_all_gpus(options: dict[str, float], tokens: int, seconds: float) -> None:
    assert copy_seconds(MockOptions(**options), tokens) == pytest.approx(seconds)


def test_chunks_leave_behind_the_steps_that_compute_them() -> None:
    """Four chunks of 100 tokens, a step each 0.1 s: only the last copy is left when the last step is done."""
    fast = Link(MockOptions(kv_bytes_per_token=1000, transfer_bytes_per_s=2.5e6))
    for end in (0.1, 0.2, 0.3, 0.4):
        fast.copy(100, end)
    assert fast.copy(0, 0.4) == pytest.approx(0.44)
    slow = Link(MockOptions(kv_bytes_per_token=1000, transfer_bytes_per_s=0.5e6))
    for end in (0.1, 0.2, 0.3, 0.4):
        slow.copy(100, end)
    assert slow.copy(0, 0.4) == pytest.approx(0.1 + 4 * 0.2), "a link that is slower than the steps holds it up"


def test_a_copy_waits_for_those_before_it_and_not_for_time_gone_by() -> None:
    link = Link(MockOptions(kv_bytes_per_token=1000, transfer_bytes_per_s=1e6))
    assert [link.copy(100, 5.0), link.copy(100, 5.0), link.copy(100, 9.0)] == pytest.approx([5.1, 5.2, 9.1])
    assert math.isclose(link.copy(0, 20.0), 20.0)
