"""Safetensors files mapped into memory.

A tensor is a view of the file's pages: nothing is parsed or copied, several workers share one copy in the
page cache, and matrices that lie side by side in the file can be used as one. We map the files ourselves,
rather than through the safetensors package, for that last reason, and to page them in step by step so that
progress can be told.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from engines.contract import EngineError, ReportProgress

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_LENGTH_BYTES = 8
_PAGE_IN_BYTES = 64 * 1024 * 1024
_MADV_POPULATE_READ = 22  # Linux 5.14; not named by the mmap module


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes `start` to `end` of a mapped file."""

    file: mmap.mmap
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Checkpoint:
    """The weights of a model directory: one model.safetensors, or several named by an index.

    Raises:
        EngineError: files that are missing or damaged.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._files: list[mmap.mmap] = []
        self._places: dict[str, _Place] = {}
        for name in _file_names(model):
            self._map(model / name)

    @property
    def file_bytes(self) -> int:
        return sum(len(file) for file in self._files)

    @property
    def dtype(self) -> torch.dtype:
        """What most of the weights are kept in, judged by the token embeddings."""
        return self._place("model.embed_tokens.weight").dtype

    def page_in(self, progress: ReportProgress) -> None:
        """Have the kernel map every page now, so that the first request doesn't pay for it."""
        total, done = self.file_bytes, 0
        progress("weights", 0, total, "bytes")
        for file in self._files:
            for start in range(0, len(file), _PAGE_IN_BYTES):
                length = min(_PAGE_IN_BYTES, len(file) - start)
                with contextlib.suppress(OSError):  # an older kernel pages in on first use instead
                    file.madvise(_MADV_POPULATE_READ, start, length)
                done += length
                progress("weights", done, total, "bytes")

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of the file, or a copy if it is kept in another dtype.

        Raises:
            EngineError: no such tensor, or one of another shape.
        """
        place = self._place(name)
        if place.shape != tuple(shape):
            raise _damaged(f"{name} of {self._model} has shape {list(place.shape)}, not {list(shape)}")
        return _view(place.file, place, place.shape).to(dtype)

    def source(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A view of the file, in the dtype that it is kept in.

        Raises:
            EngineError: no such tensor, or one of another shape.
        """
        return self.tensor(name, shape, self._place(name).dtype)

    def close(self) -> None:
        """Unmap the files; no view of them may be left."""
        self._places.clear()
        for file in self._files:
            file.close()
        self._files.clear()

    def stacked(self, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
        """Tensors joined along their first dimension: a view where the file has them side by side, else a
        copy.
        """
        parts = [self.tensor(name, shape, dtype) for name, shape in zip(names, shapes, strict=True)]
        places = [self._place(name) for name in names]
        neighbours = all(after.file is before.file and after.start == before.end for before, after in pairwise(places))
        if neighbours and places[0].dtype == dtype:
            rows = sum(place.shape[0] for place in places)
            return _view(places[0].file, places[0], (rows, *places[0].shape[1:]))
        return torch.cat(parts)

    def _place(self, name: str) -> _Place:
        try:
            return self._places[name]
        except KeyError:
            raise _damaged(f"the weights of {self._model} have no {name}") from None

    def _map(self, path: Path) -> None:
        try:
            with path.open("rb") as opened:
                # Nominally writable, since torch warns of read-only memory; private, and never written to.
                file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            header_end = _HEADER_LENGTH_BYTES + int.from_bytes(file[:_HEADER_LENGTH_BYTES], "little")
            header: dict[str, Any] = json.loads(file[_HEADER_LENGTH_BYTES:header_end])
        except (OSError, ValueError) as error:
            raise _damaged(f"{path} can't be read as safetensors: {error}") from None
        self._files.append(file)
        for name, entry in header.items():
            if name != "__metadata__":
                self._places[name] = _locate(path, file, header_end, name, entry)


def _locate(path: Path, file: mmap.mmap, header_end: int, name: str, entry: dict[str, Any]) -> _Place:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise _damaged(f"{name} of {path} is kept in {entry['dtype']}, which is not supported")
    start, end = (header_end + offset for offset in entry["data_offsets"])
    shape = tuple(entry["shape"])
    if end > len(file) or end - start != prod(shape) * dtype.itemsize:
        raise _damaged(f"{path} is cut short or damaged at {name}")
    return _Place(file, dtype, shape, start, end)


def _view(file: mmap.mmap, first: _Place, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(file, dtype=first.dtype, count=prod(shape), offset=first.start)
    return flat.view(shape)


def _file_names(model: Path) -> list[str]:
    index = model / "model.safetensors.index.json"
    if index.exists():
        try:
            return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(f"{index} can't be read: {error}") from None
    return ["model.safetensors"]


def _damaged(cause: str) -> EngineError:
    return EngineError(cause, remedy="pull the model again", permanent=True)
