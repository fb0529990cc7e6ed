"""What a Hugging Face directory says of itself: config.json and the headers of its safetensors, checked.

Only headers are read, never weights, so it takes milliseconds for any size of model. Anything that could make
a loader read past the end of a file, or fail minutes later, is found here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dynamo_box.errors import BoxError
from dynamo_box.profile.facts import ModelFacts

HEADER_LIMIT = 100_000_000  # the safetensors library's own
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of a safetensors header; `data_offsets` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def bytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


class Config(msgspec.Struct, frozen=True):
    """The fields of config.json that planning needs."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    num_key_value_heads: int | None = None
    head_dim: int | None = None


def facts_of(path: Path, *, name: str, source: str) -> ModelFacts:
    """Check the directory and sum it up.

    Raises:
        BoxError: it is not a whole model in safetensors, with the file and the reason.
    """
    config = _read_config(path / "config.json")
    if not (path / "tokenizer.json").is_file():
        raise _refused(path / "tokenizer.json", "is missing; the box needs a tokenizer in that form")
    tensors = read_tensors(path)
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.bytes
    return ModelFacts(
        name=name,
        source=source,
        architecture=config.model_type or ", ".join(config.architectures),
        weights_bytes=sum(by_dtype.values()),
        dtype=DTYPES[max(by_dtype, key=lambda dtype: by_dtype[dtype])][0],
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
    )


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a directory's safetensors files, which must be those that its index (if any) names.

    Raises:
        BoxError: no weights, a shard too few, or a header that doesn't fit its file.
    """
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise BoxError(
            f"{path} holds no *.safetensors weights",
            remedy="pickled weights (.bin, .pt, .pth) are not loaded, since they can run code; "
            "convert them to safetensors, or pull a repository or GGUF file that has them in another form",
        )
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if name in tensors:
                raise _refused(shard, f"holds tensor {name!r} a second time")
            tensors[name] = tensor
    if (path / INDEX).is_file():
        _check_index(path / INDEX, {shard.name for shard in shards}, tensors)
    if not tensors:
        raise _refused(shards[0], "holds no tensors")
    return tensors


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file: contiguous, of known dtypes, and ending where the file ends.

    Raises:
        BoxError: they don't.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _refused(path, f"claims a header of {length:,} bytes in a file of {size:,}")
        raw = file.read(length)
    try:
        header = msgspec.json.decode(raw, type=dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        tensors = msgspec.convert(header, dict[str, TensorEntry])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise _refused(path, f"has no readable header: {error}") from error
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if tensor.dtype not in DTYPES:
            raise _refused(path, f"tensor {name!r} has dtype {tensor.dtype}")
        start, end = tensor.data_offsets
        expected = math.prod(tensor.shape) * DTYPES[tensor.dtype][1]
        if start != position or end - start != expected or min(tensor.shape, default=0) < 0:
            raise _refused(path, f"tensor {name!r} lies at {start:,}–{end:,}; {expected:,} bytes from {position:,} fit")
        position = end
    if 8 + length + position != size:
        raise _refused(path, f"has {size:,} bytes where its tensors need {8 + length + position:,}: incomplete?")
    return tensors


def _read_config(path: Path) -> Config:
    try:
        config = msgspec.json.decode(path.read_bytes(), type=Config)
    except FileNotFoundError:
        raise BoxError(f"{path.parent} is no Hugging Face model: it has no config.json") from None
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise _refused(path, f"can't be used: {error}") from error
    for field, value in msgspec.structs.asdict(config).items():
        if isinstance(value, int) and value < 1:
            raise _refused(path, f"has {field} {value}")
    return config


def _check_index(path: Path, shards: set[str], tensors: Mapping[str, TensorEntry]) -> None:
    try:
        weight_map = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])["weight_map"]
        missing_shards = sorted(set(weight_map.values()) - shards)
        missing_tensors = sorted(weight_map.keys() - tensors.keys())
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise _refused(path, f"is no index of shards: {error}") from error
    if missing_shards or missing_tensors:
        missing = ", ".join(os.fspath(name) for name in (missing_shards or missing_tensors)[:3])
        raise _refused(path, f"names {missing}, which the directory lacks")


def _refused(path: Path, why: str) -> BoxError:
    return BoxError(f"{path}: {why}", remedy="the model is incomplete or damaged; get it again")
