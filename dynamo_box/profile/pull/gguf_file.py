"""Reading a GGUF file: typed metadata, and tensors as rows of still quantised bytes in a mapping of the file.

Layout (little-endian): magic, version, tensor count, key count; key–value pairs; tensor descriptions; padding
to `general.alignment`; tensor data at the offsets described. Constants and dequantising come from the `gguf`
package. Its reader is not used: it takes 4 s for a vocabulary of 49,152 (this one 0.2 s), and it reads past the
end of the file without noticing, so that a hostile array length keeps it busy for ever. Here every length is held
against the bytes that are left.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from dynamo_box.errors import BoxError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
MOST_ELEMENTS = 1 << 48

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

SUPPORTED = tuple(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"))

Value = TypeVar("Value")
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class GgufTensor(msgspec.Struct, frozen=True):
    """`shape` is row-major, as in numpy (GGUF turns it round); `start` counts from the file's begin."""

    name: str
    quantisation: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.quantisation]
        return self.shape[-1] // block * size

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GgufFile:
    """An open GGUF file whose structure has been checked as a whole.

    Raises:
        BoxError: on opening: it is not GGUF, damaged, cut off, or of a quantisation that isn't supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        try:
            self._read()
        except _DamageError as error:
            raise self.refused(str(error)) from error

    def get(self, key: str, kind: type[Value], default: Value) -> Value:
        """The metadata value of `key`, `default` if there is none.

        Raises:
            BoxError: it is of another type.
        """
        value = self.metadata.get(key, default)
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refused(f"metadata {key} is {type(value).__name__}, not {kind.__name__}")
        return value

    def require(self, key: str, kind: type[Value]) -> Value:
        """Like `get`, for what a model can't do without."""
        if key not in self.metadata:
            raise self.refused(f"metadata {key} is missing")
        return self.get(key, kind, kind())

    def rows_of(self, tensor: GgufTensor) -> Bytes:
        """The quantised rows, (rows, row bytes), without a copy."""
        count = tensor.rows * tensor.row_bytes
        return np.frombuffer(self._data, np.uint8, count, tensor.start).reshape(tensor.rows, tensor.row_bytes)

    def refused(self, why: str) -> BoxError:
        return BoxError(
            f"{self.path.name}: {why}",
            remedy="the file is damaged, incomplete or of another kind; get it again",
        )

    def _read(self) -> None:
        cursor = _Cursor(self._data)
        if cursor.take(4) != MAGIC:
            raise _DamageError("is not a GGUF file: it doesn't begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise _DamageError(f"has GGUF version {version} (supported: 2 and 3, little-endian)")
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, object] = {}
        for _ in range(key_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.value_type())
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _DamageError(f"has alignment {alignment!r}, not a power of two")
        described = [cursor.tensor() for _ in _bounded(tensor_count, cursor.left)]
        data_start = -(-cursor.position // alignment) * alignment
        self.tensors = {
            tensor.name: msgspec.structs.replace(tensor, start=data_start + tensor.start) for tensor in described
        }
        if len(self.tensors) != len(described):
            raise _DamageError("describes a tensor twice")
        for tensor in self.tensors.values():
            end = tensor.start + tensor.rows * tensor.row_bytes
            if end > len(self._data):
                raise _DamageError(
                    f"tensor {tensor.name} ends at byte {end:,}, the file at {len(self._data):,}: cut off?"
                )


def dequantised(rows: Bytes, tensor: GgufTensor) -> Floats:
    """Quantised rows as float32, (rows, row length)."""
    values: Floats = dequantize(rows, tensor.quantisation)
    return values


class _DamageError(Exception):
    """What is wrong with the file, as the end of a sentence that begins with its name."""


class _Cursor:
    """Reads forward; raises `_DamageError` rather than reading past the end."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _DamageError(
                f"is cut off or damaged: {count:,} bytes expected at {self.position:,}, {self.left:,} left"
            )
        taken = self._data[self.position : self.position + count]
        self.position += count
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start = self.position
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise _DamageError(f"has text that is not UTF-8 at byte {start:,}") from error

    def value_type(self) -> GGUFValueType:
        number = self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise _DamageError(f"has metadata of unknown type {number}") from error

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.value_type(), self.scalar("Q")
        if item is GGUFValueType.ARRAY:
            raise _DamageError("has an array of arrays in its metadata")
        if item is GGUFValueType.STRING:
            return [self.string() for _ in _bounded(count, self.left)]
        code = SCALARS[item]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))

    def tensor(self) -> GgufTensor:
        """`start` still counts from the begin of the data."""
        name = self.string()
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _DamageError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        if min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
            raise _DamageError(f"tensor {name} has the shape {shape}")
        number, start = self.scalar("I"), self.scalar("Q")
        quantisation = _supported_quantisation(name, number)
        if shape[-1] % GGML_QUANT_SIZES[quantisation][0]:
            raise _DamageError(f"tensor {name} has rows of {shape[-1]}, which {quantisation.name} can't divide")
        return GgufTensor(name, quantisation, shape, start)


def _supported_quantisation(tensor: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise _DamageError(f"tensor {tensor} has the unknown quantisation {number}") from None
    if kind in SUPPORTED:
        return kind
    raise BoxError(
        f"tensor {tensor} is quantised as {kind.name}, which can't be converted",
        remedy=f"get the model as one of {', '.join(kind.name for kind in SUPPORTED)}",
    )


def _bounded(count: int, left: int) -> range:
    """`range(count)` for items of at least eight bytes each."""
    if count * 8 > left:
        raise _DamageError(f"claims {count:,} items in {left:,} bytes")
    return range(count)
