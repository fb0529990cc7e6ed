"""A task → prompt tokens, block hashes and the limits of its sequence."""

from __future__ import annotations

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from dynamo_box.discovery.instances import Instance
from dynamo_box.frontend.errors import context_too_long, invalid_request
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.tokenizer import LONG_CHARACTERS, FarTooLong, ModelTokenizer
from dynamo_box.kv.hashing import TOKEN_BYTES, chain_digests, isolation_key, short_hashes
from dynamo_box.protocol.request import Sampling, pack_tokens

MAX_TOKENS_ON_LOOP = 2048
"""More than this is tokenised and hashed in a thread: it takes longer than a millisecond."""

MAX_LONG_AT_ONCE = 2
"""Tokenising takes some hundred bytes a token, so this bounds memory; one more long prompt waits."""

SEED_BITS = 63
"""What a signed 64-bit seed holds without its sign."""

_long_prompts = ThreadPoolExecutor(MAX_LONG_AT_ONCE, thread_name_prefix="long-prompt")


class Prompt(msgspec.Struct, frozen=True):
    """`tokens` are packed; `hashes` are the router's names of the full blocks, `last_digest` is the whole digest of the
    last of them (b"" if there is none); `hashing_ms` is what these took.
    """

    tokens: bytes
    count: int
    isolation: bytes
    block_size: int
    hashes: tuple[int, ...]
    last_digest: bytes
    hashing_ms: float
    sampling: Sampling


async def prepare(task: Task, tokenizer: ModelTokenizer, instance: Instance, context_length: int) -> Prompt:
    """`instance` is any worker of the model; `context_length` bounds prompt and answer together.

    Raises:
        ApiError: no template, an empty prompt, foreign token ids, or too long for the context (400).
    """
    if _is_long(task):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_long_prompts, _prepare, task, tokenizer, instance, context_length)
    return _prepare(task, tokenizer, instance, context_length)


def _is_long(task: Task) -> bool:
    if task.messages is not None:
        return sum(len(message["content"]) for message in task.messages) > LONG_CHARACTERS
    return len(task.text or "") > LONG_CHARACTERS or len(task.tokens or ()) > MAX_TOKENS_ON_LOOP


def _prepare(task: Task, tokenizer: ModelTokenizer, instance: Instance, context_length: int) -> Prompt:
    field = "prompt" if task.messages is None else "messages"
    try:
        packed = _encode(task, tokenizer, context_length)
    except FarTooLong as error:
        raise context_too_long(f"at least {error.tokens}", context_length, field) from error
    count = len(packed) // TOKEN_BYTES
    if count == 0:
        raise invalid_request(f"'{field}' is empty", field)
    if count + 1 > context_length:
        raise context_too_long(count, context_length, field)
    began = time.perf_counter()
    key = isolation_key(
        instance.fingerprint,
        block_size=instance.block_size,
        kv_dtype=instance.kv_dtype,
        cache_salt=task.cache_salt,
    )
    digests = chain_digests(packed, instance.block_size, key)
    hashes = short_hashes(digests)
    hashing_ms = (time.perf_counter() - began) * 1000
    return Prompt(
        tokens=packed,
        count=count,
        isolation=key,
        block_size=instance.block_size,
        hashes=hashes,
        last_digest=digests[-1] if digests else b"",
        hashing_ms=hashing_ms,
        sampling=_sampling(task, context_length - count),
    )


def _encode(task: Task, tokenizer: ModelTokenizer, max_tokens: int) -> bytes:
    if task.messages is not None:
        return tokenizer.encode_chat(task.messages, max_tokens)
    if task.text is not None:
        return tokenizer.encode_text(task.text, max_tokens)
    tokens = task.tokens or []
    if any(token >= tokenizer.vocabulary_size for token in tokens):
        raise invalid_request(
            f"'prompt' holds a token id outside of the vocabulary of {tokenizer.vocabulary_size}", "prompt"
        )
    return pack_tokens(tokens)


def _sampling(task: Task, room: int) -> Sampling:
    """`room` is what the context leaves after the prompt. What is sampled has a seed, the client's or one that is drawn
    here: only so do two workers that share an answer sample alike.
    """
    max_tokens = room if task.max_tokens is None else min(task.max_tokens, room)
    seed = task.seed
    if seed is None and task.temperature > 0:
        seed = secrets.randbits(SEED_BITS)
    return Sampling(
        max_tokens=max_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        top_k=task.top_k,
        seed=seed,
        min_tokens=min(task.min_tokens, max_tokens),
        ignore_eos=task.ignore_eos,
    )
