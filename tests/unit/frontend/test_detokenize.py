"""Pieces add up to the whole, whatever the ids, and no piece holds half a character."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dynamo_box.frontend.detokenize import MAX_HELD_TOKENS, Vocabulary, byte_characters


@functools.cache
def byte_level() -> Tokenizer:
    """Every byte is a token, so that ids make any bytes at all, with a few merges and awkward added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    merges = [("Ġ", "a"), ("ð", "Ł"), ("Ã", "©")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("é"), AddedToken("日本 x"), AddedToken("<think>"), AddedToken("a b")])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """As in sentencepiece models: words with ▁, and a token for each byte."""
    words = ["<unk>", "▁", "▁he", "llo", "▁world", "é", "世"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def pieces(tokenizer: Tokenizer, kind: str | None, ids: list[int], cuts: list[int]) -> list[str]:
    """The text of `ids`, fed in runs as long as `cuts` say."""
    detokenizer = Vocabulary(tokenizer, kind).detokenizer()
    said, rest = [], list(ids)
    for length in cuts:
        said.append(detokenizer.feed(rest[:length]))
        rest = rest[length:]
    said.append(detokenizer.feed(rest))
    said.append(detokenizer.finish())
    return said


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 264), max_size=60), st.lists(st.integers(1, 4), max_size=40))
def test_random_ids_add_up_to_what_the_tokenizer_says(ids: list[int], cuts: list[int]) -> None:
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer, "ByteLevel", ids, cuts)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_text_comes_out_as_it_went_in_and_never_by_halves(text: str) -> None:
    tokenizer = byte_level()
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text).ids
    said = pieces(tokenizer, "ByteLevel", ids, [1] * len(ids))
    assert "".join(said) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):  # the library reads the added token é as half a character
        assert not any("\ufffd" in piece for piece in said)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_at_most_three_tokens_of_one_byte_are_held_back(data: bytes) -> None:
    tokenizer = byte_level()
    by_byte = {byte: tokenizer.token_to_id(character) for character, byte in byte_characters().items()}
    detokenizer = Vocabulary(tokenizer, "ByteLevel").detokenizer()
    said = ""
    for count, byte in enumerate(data, 1):
        said += detokenizer.feed([by_byte[byte]])
        assert len(data[:count].decode("utf-8", "replace")) - len(said) <= 3
    assert said + detokenizer.finish() == data.decode("utf-8", "replace")


def test_special_tokens_and_ids_beyond_the_vocabulary_are_silent() -> None:
    tokenizer = byte_level()
    special = tokenizer.token_to_id("<|im_start|>")
    assert "".join(pieces(tokenizer, "ByteLevel", [special, 999_999, special], [1, 1])) == ""


def test_other_tokenizers_add_up_for_text_of_theirs() -> None:
    tokenizer = byte_fallback()
    for text in ("hello world", "hé世", "hello 🙂 world", "🙂", "a b c"):
        ids = [tokenizer.token_to_id("<s>"), *tokenizer.encode(text).ids]
        said = pieces(tokenizer, "Sequence", ids, [1] * len(ids))
        assert "".join(said) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in said)


def test_other_tokenizers_hold_back_a_bounded_number_of_tokens() -> None:
    tokenizer = byte_fallback()
    detokenizer = Vocabulary(tokenizer, "Sequence").detokenizer()
    silent = longest = 0
    for _ in range(200):
        silent = 0 if detokenizer.feed([0xFF]) else silent + 1
        longest = max(longest, silent)
    assert longest < MAX_HELD_TOKENS
