"""Where tensors lie: each on a boundary that any kernel can load from, all of them in few allocations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dynamo_box.gms.vmm.base import round_up
from dynamo_box.protocol.gms import Entry

ALIGNMENT = 256
"""Bytes; what cudaMalloc gives, and engines' kernels may rely on."""
MAX_ALLOCATION = 1024**3
"""A larger tensor has an allocation of its own."""


class TensorSpec(NamedTuple):
    """`dtype` is the engine's word for it; `stride` counts items, `nbytes` what the tensor spans in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int


class Place(NamedTuple):
    allocation: int
    offset: int


class Packing(NamedTuple):
    """`sizes` of allocations, and for each tensor its place: the number of one of them, and bytes into it."""

    sizes: tuple[int, ...]
    places: tuple[Place, ...]

    def entries(self, specs: Sequence[TensorSpec], ids: Sequence[int]) -> list[Entry]:
        """For the manifest, in which the allocations are called `ids`."""
        return [
            Entry(spec.name, ids[place.allocation], place.offset, spec.dtype, spec.shape, spec.stride, spec.nbytes)
            for spec, place in zip(specs, self.places, strict=True)
        ]


def pack(specs: Sequence[TensorSpec], granularity: int, max_allocation: int = MAX_ALLOCATION) -> Packing:
    """In their order, so that what is used together lies together.

    Raises:
        ValueError: a name comes twice, or a size is negative.
    """
    sizes: list[int] = []
    places: list[Place] = []
    names: set[str] = set()
    for spec in specs:
        if spec.nbytes < 0 or spec.name in names:
            raise ValueError(f"tensor {spec.name} has {spec.nbytes} bytes, or its name comes twice")
        names.add(spec.name)
        offset = round_up(sizes[-1], ALIGNMENT) if sizes else 0
        if not sizes or (offset + spec.nbytes > max_allocation and sizes[-1] > 0):
            sizes.append(0)
            offset = 0
        places.append(Place(len(sizes) - 1, offset))
        sizes[-1] = offset + spec.nbytes
    return Packing(tuple(round_up(max(size, 1), granularity) for size in sizes), tuple(places))
