"""A task → prompt tokens, block hashes and the limits of its sequence."""

from __future__ import annotations

import asyncio

import msgspec

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend.errors import context_too_long, invalid_request
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.kv.hashing import TOKEN_BYTES, chain_digests, isolation_key, short_hashes
from dynamo_box.protocol.request import Sampling, pack_tokens

MAX_CHARACTERS_ON_LOOP = 8192
MAX_TOKENS_ON_LOOP = 2048
"""More than this is tokenised and hashed in a thread: it takes longer than a millisecond."""


class Prompt(msgspec.Struct, frozen=True):
    """`tokens` are packed; `hashes` are the router's names of the full blocks; `hashing_ms` is what they took."""

    tokens: bytes
    count: int
    isolation: bytes
    hashes: tuple[int, ...]
    sampling: Sampling


async def prepare(task: Task, tokenizer: ModelTokenizer, instance: Instance) -> Prompt:
    """Raises ApiError (400): no template, empty, foreign token ids, or too long for the context."""
    if task.tokens is not None:
        if any(token >= tokenizer.vocabulary_size for token in task.tokens):
            raise invalid_request(
                f"'prompt' holds a token id outside of the vocabulary of {tokenizer.vocabulary_size}",
                "prompt",
            )
        packed = pack_tokens(task.tokens)
    else:
        text = _text_of(task, tokenizer)
        if len(text) > MAX_CHARACTERS_ON_LOOP:
            packed = await asyncio.to_thread(tokenizer.encode, text)
        else:
            packed = tokenizer.encode(text)
    count = len(packed) // TOKEN_BYTES
    field = "messages" if task.chat else "prompt"
    if count == 0:
        raise invalid_request(f"'{field}' is empty", field)
    if count + 1 > instance.context_length:
        raise context_too_long(count, instance.context_length)
    key = isolation_key(
        instance.fingerprint,
        block_size=instance.block_size,
        kv_dtype=instance.kv_dtype,
        cache_salt=task.cache_salt,
    )
    if count > MAX_TOKENS_ON_LOOP:
        digests = await asyncio.to_thread(chain_digests, packed, instance.block_size, key)
    else:
        digests = chain_digests(packed, instance.block_size, key)
    return Prompt(packed, count, key, short_hashes(digests), _sampling(task, instance.context_length - count))


def _text_of(task: Task, tokenizer: ModelTokenizer) -> str:
    if task.messages is None:
        return task.text or ""
    if tokenizer.chat_template is None:
        raise invalid_request(
            f"model {task.model} has no chat template; use /v1/completions",
            "messages",
            "unsupported_parameter",
        )
    return tokenizer.chat_template.render(task.messages)


def _sampling(task: Task, room: int) -> Sampling:
    """`room` is what the context leaves after the prompt."""
    max_tokens = room if task.max_tokens is None else min(task.max_tokens, room)
    return Sampling(
        max_tokens=max_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        top_k=task.top_k,
        seed=task.seed,
        min_tokens=min(task.min_tokens, max_tokens),
        ignore_eos=task.ignore_eos,
    )
