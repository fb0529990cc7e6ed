"""What `transformers` makes of the same weights, and when a divergence from it is excused."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEAR_TIE = 1e-3
"""float32 only: where the reference's best two logits lie closer than this, either token is right."""


@dataclass(frozen=True)
class Greedy:
    """Generated tokens, and by how much each was ahead of the second best."""

    tokens: list[int]
    margins: list[float]


class Reference:
    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        renamed = "cache" in inspect.signature(self._model.forward).parameters
        self._cache = "cache" if renamed else "past_key_values"

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> Greedy:
        """`count` tokens, whatever ends a sequence."""
        tokens: list[int] = []
        margins: list[float] = []
        inputs, past = torch.tensor([prompt]), None
        for _ in range(count):
            result = self._model(input_ids=inputs, use_cache=True, **{self._cache: past})
            past = result[self._cache]
            best = result.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            inputs = best.indices[:1][None]
        return Greedy(tokens, margins)

    @torch.inference_mode()
    def shortfalls(self, prompt: list[int], answer: list[int]) -> list[float]:
        """By how much each token of `answer` falls short of the best one after all that precedes it; 0 if it is that.

        Greedy generation would give `answer` exactly if all are 0. It takes one pass instead of one for each token.
        """
        logits = self._model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        given = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return (logits.max(dim=1).values - given).tolist()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def next_logits(self, tokens: list[int]) -> torch.Tensor:
        return self._model(input_ids=torch.tensor([tokens])).logits[0, -1]  # type: ignore[no-any-return]


def divergence(expected: Greedy, tokens: list[int]) -> int | None:
    """The first place at which `tokens` leave the reference."""
    for place, (one, other) in enumerate(zip(expected.tokens, tokens, strict=True)):
        if one != other:
            return place
    return None
