"""Prompts from conversations: ids by segment equal those of the whole, and special tokens stay the template's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from dynamo_box.frontend.control_tokens import ControlTokens, free_mark
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.segments import SegmentCache
from dynamo_box.frontend.tokenizer import ModelTokenizer
from dynamo_box.protocol.request import unpack_tokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
written = st.text(max_size=30).map(lambda text: text.encode("utf-8", "ignore").decode())
awkward = st.lists(st.one_of(written, st.sampled_from([*SPECIAL, "<|im_", "start|>", "<", "\ufdd0"])), max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ModelTokenizer:
    return ModelTokenizer(tiny_model)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def framed(messages: list[dict[str, str]]) -> str:
    turns = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    return turns + "<|im_start|>assistant\n"


def copy_of(model: Path, to: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    to.mkdir()
    tokenizer.save(str(to / "tokenizer.json"))
    (to / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text())
    return to


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(written, min_size=1, max_size=4))
def test_ids_by_segment_are_those_of_the_whole(
    tokenizer: ModelTokenizer, reference: tokenizers.Tokenizer, contents: list[str]
) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    whole = reference.encode(framed(messages), add_special_tokens=False).ids
    for _ in range(2):  # the second time from the cache
        assert unpack_tokens(tokenizer.encode_chat(messages)) == whole


@settings(max_examples=200, deadline=None)
@given(parts=awkward)
def test_whatever_a_message_holds_only_the_template_frames_turns(
    tokenizer: ModelTokenizer, reference: tokenizers.Tokenizer, parts: list[str]
) -> None:
    messages = [{"role": "user", "content": "".join(parts)}, {"role": "assistant", "content": "".join(parts[:2])}]
    ids = unpack_tokens(tokenizer.encode_chat(messages))
    control = [reference.token_to_id(text) for text in SPECIAL]
    assert sum(token in control for token in ids) == 5
    assert reference.decode(ids, skip_special_tokens=False) == framed(messages)


def test_a_raw_prompt_may_hold_special_tokens(tokenizer: ModelTokenizer, reference: tokenizers.Tokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    assert unpack_tokens(tokenizer.encode_text(text)) == reference.encode(text, add_special_tokens=False).ids


def test_a_raw_prompt_begins_as_the_model_wants_it(tiny_model: Path, tmp_path: Path) -> None:
    own = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    begin = own.token_to_id("<|endoftext|>")
    own.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", begin), ("<|im_end|>", 2)]
    )
    tokenizer = ModelTokenizer(copy_of(tiny_model, tmp_path / "model", own))
    plain = own.encode("hello", add_special_tokens=False).ids
    assert unpack_tokens(tokenizer.encode_text("hello")) == [begin, *plain]
    assert begin not in unpack_tokens(tokenizer.encode_chat([{"role": "user", "content": "hello"}]))


def test_a_tokenizer_whose_segments_do_not_add_up_gets_the_whole_text(tiny_model: Path, tmp_path: Path) -> None:
    own = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    own.add_special_tokens([AddedToken("<|user|>", special=True, rstrip=True)])
    tokenizer = ModelTokenizer(copy_of(tiny_model, tmp_path / "model", own))
    text = "<|user|>   hi <|im_end|> there"
    assert unpack_tokens(tokenizer.encode_text(text)) == own.encode(text, add_special_tokens=False).ids
    with pytest.raises(ApiError, match="special tokens"):
        tokenizer.encode_chat([{"role": "user", "content": "<|user|>"}])


def test_a_mark_is_one_that_nobody_wrote() -> None:
    control = ControlTokens({"<|a|>": b"0000", "|a": b"1111"})
    mark = free_mark(["\ufdd0", "x"])
    assert mark == "\ufdd1"
    disarmed = control.disarm("<<|a|>|a", mark)
    assert not control.occur_in(disarmed)
    assert disarmed.replace(mark, "") == "<<|a|>|a"
    assert free_mark(["".join(chr(code) for code in range(0xFDD0, 0xFDF0))]) is None


def test_the_cache_is_bounded_in_bytes_and_forgets_the_oldest() -> None:
    cache = SegmentCache(max_bytes=100, max_segment_bytes=60)
    for text in ("a", "b", "c"):
        cache.put(text * 8, b"1234")
    assert cache.get("a" * 8) is None
    assert cache.get("b" * 8) == b"1234"
    cache.put("d" * 8, b"1234")
    assert cache.get("c" * 8) is None  # b was used more lately
    cache.put("long" * 10, b"1234")
    assert cache.get("long" * 10) is None
    assert cache.bytes == 72


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        ModelTokenizer(tmp_path)
