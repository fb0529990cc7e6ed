"""Logits to tokens.

A sampled token is found by inverting the cumulative distribution at a number drawn from (seed, position)
alone: the same request gives the same tokens whatever runs beside it, after a preemption, or continued by
another worker. The distribution is summed in the order of token ids, not of probabilities, so that two tokens
of nearly equal probability can't swap places from one batch shape's rounding to the next.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from hashlib import blake2b

import torch

from engines.native.sequence import Sequence

GREEDY_BELOW = 1e-5
"""Temperatures below this choose the likeliest token: dividing by less overflows."""

_NUCLEUS_PROBE = 1024
_DRAW_BITS = 53


def sample(logits: torch.Tensor, sequences: Many[Sequence]) -> list[int | None]:
    """The next token of each sequence from its row of `logits`; None where they are not finite numbers."""
    for row, sequence in enumerate(sequences):
        if sequence.stop_ids and not sequence.may_stop:
            logits[row, [token for token in sequence.stop_ids if token < logits.shape[1]]] = float("-inf")
    best, tokens = logits.max(dim=-1)
    chosen: list[int | None] = [*tokens.tolist()]
    random = [row for row, one in enumerate(sequences) if one.request.sampling.temperature >= GREEDY_BELOW]
    if random:
        drawn = _draw_tokens(logits[random], [sequences[row] for row in random])
        for row, token in zip(random, drawn, strict=True):
            chosen[row] = token
    finite = best.isfinite().tolist()
    return [token if usable else None for token, usable in zip(chosen, finite, strict=True)]


def draw(seed: int, position: int) -> float:
    """A number in [0, 1), uniform over seeds and positions; the same for the same two."""
    digest = blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def _draw_tokens(logits: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
    temperatures = logits.new_tensor([one.request.sampling.temperature for one in sequences])
    shifted = (logits - logits.max(dim=-1, keepdim=True).values) / temperatures[:, None]
    for row, sequence in enumerate(sequences):
        keep_likeliest(shifted[row], sequence.request.sampling.top_k)
    probabilities = torch.softmax(shifted, dim=-1)
    for row, sequence in enumerate(sequences):
        keep_nucleus(probabilities[row], sequence.request.sampling.top_p)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    draws = torch.tensor([draw(one.seed, len(one.tokens)) for one in sequences], dtype=torch.float64)
    points = draws[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].tolist()


def keep_likeliest(logits: torch.Tensor, top_k: int) -> None:
    """Set all but the `top_k` highest logits (and what equals the last) to -inf; 0 or less keeps all."""
    if 0 < top_k < len(logits):
        logits.masked_fill_(logits < logits.topk(top_k).values[-1], float("-inf"))


def keep_nucleus(probabilities: torch.Tensor, top_p: float) -> None:
    """Zero all but the likeliest tokens that first add up to `top_p` (and what equals the last of them).

    The nucleus is usually small: a full sort of the vocabulary costs several times the search among the first
    1,024.
    """
    if top_p >= 1.0:
        return
    size = len(probabilities)
    for count in (min(_NUCLEUS_PROBE, size), size):
        likeliest = probabilities.topk(count).values
        reached = likeliest.cumsum(dim=0, dtype=torch.float64) >= top_p
        if bool(reached[-1]):
            last = likeliest[int(reached.int().argmax())]
            probabilities.masked_fill_(probabilities < last, 0.0)
            return
