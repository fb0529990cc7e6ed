"""Sampling: the draws, the filters, and that a broken row harms only its own sequence."""

from __future__ import annotations

from typing import Any

import torch

from dynamo_box.protocol.request import Sampling
from engines.contract import SequenceRequest
from engines.native.sampler import draw, keep_likeliest, keep_nucleus, sample
from engines.native.sequence import Sequence


def sequence(*, eos: frozenset[int] = frozenset(), **sampling: Any) -> Sequence:
    settings = Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return Sequence.of(SequenceRequest(0, "r", [1, 2, 3], settings, b""), 0, eos)


def test_draws_are_uniform_and_repeat() -> None:
    draws = [draw(seed, position) for seed in range(50) for position in range(200)]
    assert draws[:200] == [draw(0, position) for position in range(200)]
    tenths = torch.tensor(draws).histc(10, 0.0, 1.0)
    assert all(880 < count < 1120 for count in tenths.tolist())


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    logits = probabilities.log().repeat(4000, 1)
    tokens = sample(logits, [sequence(temperature=1.0, seed=seed) for seed in range(4000)])
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
    assert torch.allclose(shares.double(), probabilities, atol=0.03)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 4.0])
    keep_likeliest(logits, 2)
    assert logits.isfinite().tolist() == [False, True, False, True]
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    keep_nucleus(probabilities, 0.65)
    assert (probabilities > 0).tolist() == [False, True, False, True]
    flat = torch.full((5000,), 1 / 5000, dtype=torch.float64) + torch.linspace(0, 1e-6, 5000).double()
    flat /= flat.sum()
    keep_nucleus(flat, 0.5)
    assert 2400 < int((flat > 0).sum()) < 2501


def test_nothing_stops_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    assert sample(logits.clone(), [sequence(eos=frozenset({2, 99}), min_tokens=1)]) == [3]
    assert sample(logits.clone(), [sequence(eos=frozenset({2}), min_tokens=0)]) == [2]


def test_a_row_of_no_numbers_is_told_apart() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 2.0], [3.0, 1.0]])
    tokens = sample(logits, [sequence(), sequence(temperature=1.0, seed=1), sequence()])
    assert tokens == [1, None, 0]
