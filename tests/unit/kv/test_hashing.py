"""A block's name says everything that decides what its KV holds, and who may see it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.kv.hashing import (
    TOKEN_BYTES,
    block_digest,
    chain_digests,
    isolation_key,
    short_hash,
    short_hashes,
)
from dynamo_box.protocol.request import pack_tokens, unpack_tokens

KEY = isolation_key("model", block_size=4, kv_dtype="float32")
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(tokens=tokens)
def test_only_full_blocks_have_a_digest_and_each_follows_from_its_parent(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    digests = chain_digests(packed, 4, KEY)
    assert len(digests) == len(tokens) // 4
    parent = b""
    for number, digest in enumerate(digests):
        block = packed[number * 4 * TOKEN_BYTES : (number + 1) * 4 * TOKEN_BYTES]
        parent = block_digest(parent, block, KEY)
        assert digest == parent


@given(first=tokens, second=tokens)
def test_two_prompts_share_digests_exactly_as_far_as_they_share_full_blocks(
    first: list[int], second: list[int]
) -> None:
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    left, right = (chain_digests(pack_tokens(each), 4, KEY) for each in (first, second))
    same = sum(a == b for a, b in zip(left, right, strict=False))
    assert same == min(shared // 4, len(left), len(right))


@given(tokens=tokens, cut=st.integers(0, 9))
def test_a_chain_can_go_on_from_any_of_its_blocks(tokens: list[int], cut: int) -> None:
    packed = pack_tokens(tokens)
    whole = chain_digests(packed, 4, KEY)
    cut = min(cut, len(whole))
    rest = chain_digests(packed[cut * 4 * TOKEN_BYTES :], 4, KEY, parent=whole[cut - 1] if cut else b"")
    assert whole[:cut] + rest == whole


@pytest.mark.parametrize(
    "other",
    [
        isolation_key("other", block_size=4, kv_dtype="float32"),
        isolation_key("model", block_size=8, kv_dtype="float32"),
        isolation_key("model", block_size=4, kv_dtype="bfloat16"),
        isolation_key("model", block_size=4, kv_dtype="float32", lora="a"),
        isolation_key("model", block_size=4, kv_dtype="float32", cache_salt="a"),
    ],
)
def test_whatever_must_not_share_kv_has_another_key(other: bytes) -> None:
    assert len(other) == 32
    assert other != KEY
    assert chain_digests(pack_tokens([1, 2, 3, 4]), 4, other) != chain_digests(pack_tokens([1, 2, 3, 4]), 4, KEY)


def test_the_name_of_a_block_never_changes_between_versions() -> None:
    digests = chain_digests(pack_tokens(range(8)), 4, KEY)
    assert [digest.hex() for digest in digests] == [
        "2d0c097a890cfa9e4c459823b5b909e7",
        "6227df0ebde61266092a34f198c2d0c1",
    ]
    assert short_hashes(digests) == tuple(short_hash(digest) for digest in digests)
    assert short_hash(digests[0]) == int(digests[0].hex()[:16], 16)


@given(tokens=tokens)
def test_tokens_survive_packing(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tokens


@pytest.mark.parametrize("bad", [[-1], [2**32]])
def test_what_is_no_token_is_refused(bad: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_tokens(bad)
    with pytest.raises(ValueError, match="multiple"):
        unpack_tokens(b"abc")
