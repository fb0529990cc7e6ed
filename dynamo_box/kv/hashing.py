"""The identity of a KV block, the same in frontend, router, workers and tiers.

A chain over full blocks: digest(n) = blake2b(digest(n-1) ‖ tokens of block n as u32 LE, 16 bytes, key = isolation key).
The isolation key keeps apart what must never share KV: models, LoRAs, cache salts, KV dtypes, block sizes. It is the
32-byte blake2b digest of the canonical msgpack of those fields. The router keeps a block's first 8 bytes as an integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec

DIGEST_BYTES = 16
TOKEN_BYTES = 4


def isolation_key(
    fingerprint: str, *, block_size: int, kv_dtype: str, lora: str | None = None, cache_salt: str | None = None
) -> bytes:
    """32 bytes. Equal only if everything that changes the content or the visibility of KV is equal."""
    fields = [fingerprint, lora, cache_salt, kv_dtype, block_size]
    return blake2b(msgspec.msgpack.encode(fields), digest_size=32).digest()


def block_digest(parent: bytes, block_tokens: bytes, key: bytes) -> bytes:
    """16 bytes. `parent` is the digest before it, b"" for the first; `block_tokens` is one block as u32 LE."""
    return blake2b(parent + block_tokens, digest_size=DIGEST_BYTES, key=key).digest()


def chain_digests(tokens: bytes, block_size: int, key: bytes, parent: bytes = b"") -> list[bytes]:
    """Digests of the full blocks of `tokens` (u32 LE); a partial last block has none."""
    stride = block_size * TOKEN_BYTES
    digests = []
    for start in range(0, len(tokens) - stride + 1, stride):
        parent = blake2b(parent + tokens[start : start + stride], digest_size=DIGEST_BYTES, key=key).digest()
        digests.append(parent)
    return digests


def short_hash(digest: bytes) -> int:
    """The router's name for a block: the first 8 bytes, big-endian."""
    return int.from_bytes(digest[:8], "big")


def short_hashes(digests: Sequence[bytes]) -> tuple[int, ...]:
    return tuple(int.from_bytes(digest[:8], "big") for digest in digests)
