"""What `engine.options` of a mock worker may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

import msgspec

from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError


class MockOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`speedup` divides all times of steps and hand-overs, "infinite" makes them nothing.

    `prefill_tokens_per_s` and `decode_ms` are those of one replica. With `parameters` they don't count, and what
    follows it does (see timing.py); `flops_per_s`, `memory_bytes_per_s`, `link_bytes_per_s` and
    `transfer_bytes_per_s` are those of each of its `tensor_parallel` GPUs, and `weights_bytes` is 2 a parameter where
    nothing is said. `transfer_bytes_per_s`, which always counts, is for KV on its way to another worker, in each
    direction.

    `kv_blocks` sizes the pool by itself, else the plan's KV bytes over `kv_bytes_per_token` do.
    `chunk_tokens` is how many prompt tokens one step computes at most. `stop_after` ends every sequence with
    "stop" after that many tokens. `vocab_size` counts where the model directory has no config.json. `fault`:
    see faults.py. `late_cancel`: it breaks if a decode leg is cancelled before its first token.
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
    late_cancel: bool = False
    parameters: float | None = None
    width: int = 0
    weights_bytes: float | None = None
    tensor_parallel: int = 1
    flops_per_s: float = 1979e12
    flops_efficiency: float = 0.58
    memory_bytes_per_s: float = 3.35e12
    memory_efficiency: float = 0.75
    link_bytes_per_s: float = 300e9
    transfer_bytes_per_s: float = 55e9


ABOVE_ZERO = (
    "prefill_tokens_per_s",
    "speedup",
    "chunk_tokens",
    "kv_blocks",
    "kv_bytes_per_token",
    "vocab_size",
    "stop_after",
    "parameters",
    "weights_bytes",
    "tensor_parallel",
    "flops_per_s",
    "flops_efficiency",
    "memory_bytes_per_s",
    "memory_efficiency",
    "link_bytes_per_s",
    "transfer_bytes_per_s",
)
NOT_NEGATIVE = ("decode_ms", "startup_s", "width")
SHARES = ("flops_efficiency", "memory_efficiency")


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
    values = msgspec.structs.asdict(parsed)
    for key in (*ABOVE_ZERO, *NOT_NEGATIVE):
        value = values[key]
        if isinstance(value, int | float):
            least = "must be at least 0" if key in NOT_NEGATIVE else "must be above 0"
            _require(value > 0 or (value == 0 and key in NOT_NEGATIVE), f"{key} {least}, not {value}")
            _require(value <= 1 or key not in SHARES, f"{key} must be at most 1, not {value}")
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
