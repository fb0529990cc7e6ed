"""What `engine.options` of a mock worker may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

import msgspec

from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError


class MockOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rates are those of one replica; `speedup` divides all step times, "infinite" makes them nothing.

    `kv_blocks` sizes the pool by itself, else the plan's KV bytes over `kv_bytes_per_token` do.
    `chunk_tokens` is how many prompt tokens one step computes at most. `stop_after` ends every sequence with
    "stop" after that many tokens. `vocab_size` counts where the model directory has no config.json. `fault`:
    see faults.py.
    """

    prefill_tokens_per_s: float = 20_000.0
    decode_ms: float = 10.0
    speedup: float | Literal["infinite"] = 1.0
    startup_s: float = 0.0
    chunk_tokens: int = 2048
    kv_blocks: int | None = None
    kv_bytes_per_token: int = 131_072
    vocab_size: int = 32_000
    stop_after: int | None = None
    fault: str = ""


def parse_options(options: Mapping[str, bool | int | float | str]) -> MockOptions:
    """
    Raises:
        EngineError: an unknown option or a value that makes no sense.
    """
    for key in options:
        if key not in MockOptions.__struct_fields__:
            near = difflib.get_close_matches(key, MockOptions.__struct_fields__, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MockOptions.__struct_fields__)}"
            raise EngineError(f"the mock engine has no option {key!r}", remedy=hint, permanent=True)
    try:
        parsed = msgspec.convert(options, MockOptions)
    except msgspec.ValidationError as error:
        raise EngineError(f"the mock engine's options: {error}", permanent=True) from error
    _require(parsed.prefill_tokens_per_s > 0, "prefill_tokens_per_s must be above 0")
    _require(parsed.decode_ms >= 0, "decode_ms can't be negative")
    _require(isinstance(parsed.speedup, str) or parsed.speedup > 0, "speedup must be above 0, or infinite")
    _require(parsed.startup_s >= 0, "startup_s can't be negative")
    _require(parsed.chunk_tokens > 0, "chunk_tokens must be above 0")
    _require(parsed.kv_blocks is None or parsed.kv_blocks > 0, "kv_blocks must be above 0")
    _require(parsed.kv_bytes_per_token > 0, "kv_bytes_per_token must be above 0")
    _require(parsed.vocab_size > 0, "vocab_size must be above 0")
    _require(parsed.stop_after is None or parsed.stop_after > 0, "stop_after must be above 0")
    return parsed


def pool_blocks(options: MockOptions, spec: WorkerSpec) -> int:
    """How many KV blocks the worker has.

    Raises:
        EngineError: the plan's KV bytes hold none.
    """
    if options.kv_blocks is not None:
        return options.kv_blocks
    block_bytes = options.kv_bytes_per_token * spec.model.block_size
    blocks = spec.kv_bytes // block_bytes
    _require(blocks > 0, f"{spec.kv_bytes} bytes for KV hold not even one block of {block_bytes} bytes")
    return blocks


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise EngineError(f"the mock engine's options: {problem}", permanent=True)
