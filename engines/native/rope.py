"""Rotary position embedding, with the arithmetic of the reference: angles in float32 whatever the model
computes in.
"""

from __future__ import annotations

import math

import torch

from engines.native.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position for each pair of channels, shape [head_dim / 2].

    llama3 stretches only the wavelengths that are long against the context the model was first trained on,
    with a smooth passage between (Llama 3.1's release, `apply_scaling`).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _stretch_long_waves(frequencies, rope)
    return frequencies


def _stretch_long_waves(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > rope.original_context / low, frequencies / rope.factor, frequencies)
    smooth = (rope.original_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched / rope.factor + smooth * stretched
    medium = (wavelengths >= rope.original_context / high) & (wavelengths <= rope.original_context / low)
    return torch.where(medium, between, stretched)


class Rotation:
    """The angles of one step's positions, shared by all layers."""

    def __init__(self, positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> None:
        angles = positions.float()[:, None, None] * frequencies
        self._cos = angles.cos().to(dtype)
        self._sin = angles.sin().to(dtype)

    def apply(self, heads: torch.Tensor) -> torch.Tensor:
        """`heads`: [tokens, heads, head_dim], channel i paired with channel i + head_dim / 2."""
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * self._cos - second * self._sin, second * self._cos + first * self._sin), dim=-1)
