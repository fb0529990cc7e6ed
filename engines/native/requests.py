"""Which requests the engine takes: no torch."""

from __future__ import annotations

import math

from dynamo_box.protocol.kv import DIGEST_BYTES, LONGEST_HOLD_S
from engines.contract import DISAGG, EngineInfo, RequestRejected, SequenceRequest

MAX_ISOLATION_BYTES = 64


def check(sequence: SequenceRequest, info: EngineInfo, vocab_size: int) -> None:
    """Refuse what could never be computed, or would harm others.

    Raises:
        RequestRejected: with what is wrong.
    """
    tokens, sampling = sequence.tokens, sequence.sampling
    if not tokens:
        raise RequestRejected("the prompt is empty")
    if len(tokens) >= info.context_length:
        raise RequestRejected(f"the prompt has {len(tokens)} tokens; at most {info.context_length - 1} fit the context")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise RequestRejected(f"the prompt has token ids outside the vocabulary of {vocab_size}")
    if sampling.max_tokens < 1:
        raise RequestRejected(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
    if not 0.0 <= sampling.temperature < math.inf:
        raise RequestRejected(f"temperature is {sampling.temperature}; it must be a number of at least 0")
    if not 0.0 < sampling.top_p <= 1.0:
        raise RequestRejected(f"top_p is {sampling.top_p}; it must be above 0 and at most 1")
    _check_leg(sequence, info)
    if len(sequence.isolation) > MAX_ISOLATION_BYTES:
        raise RequestRejected(f"an isolation key of {len(sequence.isolation)} bytes is too long")


def _check_leg(sequence: SequenceRequest, info: EngineInfo) -> None:
    if sequence.leg == "whole":
        return
    if DISAGG not in info.capabilities:
        raise RequestRejected(f"a {sequence.leg} leg needs an engine with KV tiers")
    ttl_s, transfer = sequence.transfer_ttl_s, sequence.transfer
    if sequence.leg == "prefill":
        if not 0.0 < ttl_s <= LONGEST_HOLD_S:
            raise RequestRejected(f"transfer_ttl_s is {ttl_s}; it must be above 0 and at most {LONGEST_HOLD_S:g}")
    elif transfer is None:
        raise RequestRejected("a decode leg needs the transfer that its prefill leg ended with")
    elif len(transfer.key) != DIGEST_BYTES:
        raise RequestRejected(f"the key of the transfer has {len(transfer.key)} bytes instead of {DIGEST_BYTES}")
    elif transfer.tokens != len(sequence.tokens) - 1 or transfer.tokens < 1:
        raise RequestRejected(
            f"the transfer covers {transfer.tokens} tokens; a decode leg has one more, not {len(sequence.tokens)}"
        )
