"""A GGUF file → a Hugging Face directory in float32, tensor by tensor.

Memory stays at a few times `CHUNK_BYTES` whatever the model's size: the safetensors header is known before the
first weight is, and weights are dequantised a few rows at a time straight into the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from dynamo_box.errors import BoxError
from dynamo_box.profile.checkpoint import read_header
from dynamo_box.profile.pull.gguf_file import GgufFile, GgufTensor, dequantised
from dynamo_box.profile.pull.gguf_tokenizer import special_token, tokenizer_config_of, tokenizer_of
from dynamo_box.profile.pull.llama import Config, config_of, in_hub_order, tensors_of
from dynamo_box.profile.pull.progress import Progress
from dynamo_box.profile.pull.staging import require_space

CHUNK_BYTES = 8 << 20
FLOAT_BYTES = 4


def convert_gguf(path: Path, into: Path, progress: Progress) -> None:
    """Write config, tokenizer and weights of the model in `path` into the empty directory `into`.

    Raises:
        BoxError: the file is damaged, or holds something that isn't supported; `into` is then of no use.
    """
    file = GgufFile(path)
    config = config_of(file)
    tensors = tensors_of(file, config)
    tokenizer = tokenizer_of(file)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise file.refused(f"has {tokenizer.get_vocab_size()} tokens, but embeddings for {config['vocab_size']}")
    require_space(into, _total_bytes(tensors))
    tokenizer.save(str(into / "tokenizer.json"), pretty=False)
    _write_json(into / "tokenizer_config.json", tokenizer_config_of(file))
    _write_json(into / "config.json", {key: value for key, value in config.items() if value != -1})
    _write_json(into / "generation_config.json", _generation_config(file, config))
    _write_weights(into / "model.safetensors", file, tensors, config, progress)


def _write_weights(
    path: Path, file: GgufFile, tensors: dict[str, GgufTensor], config: Config, progress: Progress
) -> None:
    header = _header(tensors)
    total, done = _total_bytes(tensors), 0
    with path.open("xb") as output:
        os.posix_fallocate(output.fileno(), 0, len(header) + total)
        output.write(header)
        for name, tensor in tensors.items():
            rows = in_hub_order(file.rows_of(tensor), name, config)
            step = max(1, CHUNK_BYTES // (tensor.shape[-1] * FLOAT_BYTES))
            for first in range(0, len(rows), step):
                done += output.write(dequantised(rows[first : first + step], tensor).data)
                progress("converting", done, total, "bytes")
    written = {name: entry.shape for name, entry in read_header(path).items()}
    if written != {name: tensor.shape for name, tensor in tensors.items()}:
        raise BoxError(f"{path} doesn't hold what was written into it", remedy="check the disk")


def _header(tensors: dict[str, GgufTensor]) -> bytes:
    """A safetensors header, padded so that the weights begin at a multiple of eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + _bytes_of(tensor)
        entries[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: GgufTensor) -> int:
    return tensor.rows * tensor.shape[-1] * FLOAT_BYTES


def _total_bytes(tensors: dict[str, GgufTensor]) -> int:
    return sum(_bytes_of(tensor) for tensor in tensors.values())


def _generation_config(file: GgufFile, config: Config) -> dict[str, Any]:
    """Which tokens end an answer: end of text, and end of turn where the file has one besides."""
    ends = [config["eos_token_id"]]
    end_of_turn = special_token(file, "eot", config["vocab_size"])
    if end_of_turn is not None and end_of_turn not in ends:
        ends.append(end_of_turn)
    fields = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": config["pad_token_id"],
    }
    return {key: value for key, value in fields.items() if value != -1}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
