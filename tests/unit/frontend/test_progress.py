"""What is left of a request for whoever goes on with it."""

from __future__ import annotations

import pytest

from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.frontend.progress import Progress
from dynamo_box.kv.hashing import chain_digests, isolation_key, short_hashes
from dynamo_box.protocol.request import Sampling, pack_tokens, unpack_tokens

BLOCK = 4
KEY = isolation_key("f00", block_size=BLOCK, kv_dtype="float64")


def progress(prompt: list[int], **limits: int) -> Progress:
    tokens = pack_tokens(prompt)
    digests = chain_digests(tokens, BLOCK, KEY)
    return Progress(
        Prompt(
            tokens=tokens,
            count=len(prompt),
            isolation=KEY,
            block_size=BLOCK,
            hashes=short_hashes(digests),
            last_digest=digests[-1] if digests else b"",
            hashing_ms=0.0,
            sampling=Sampling(**{"max_tokens": 30, **limits}, temperature=0.5, seed=7, ignore_eos=True),
        )
    )


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("said", [0, 1, 3, 4, 5, 17])
def test_prompt_and_what_was_said_are_a_prompt_like_any_other(length: int, said: int) -> None:
    tokens = list(range(100, 100 + length + said))
    it = progress(tokens[:length])
    for token in tokens[length:]:
        it.take([token])
    assert unpack_tokens(it.tokens) == tokens
    assert it.count == length + said
    assert it.hashes == short_hashes(chain_digests(it.tokens, BLOCK, KEY)), "as if it were hashed from its begin"
    assert it.begun == (said > 0)


def test_limits_shrink_by_what_was_said_and_nothing_else_changes() -> None:
    it = progress([1, 2], max_tokens=5, min_tokens=2)
    seen = []
    for _ in range(5):
        assert not it.complete
        it.take([9])
        seen.append((it.sampling.max_tokens, it.sampling.min_tokens))
        assert (it.sampling.temperature, it.sampling.seed, it.sampling.ignore_eos) == (0.5, 7, True)
    assert seen == [(4, 1), (3, 0), (2, 0), (1, 0), (0, 0)]
    assert it.complete
