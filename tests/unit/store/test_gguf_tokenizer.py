"""Text is cut and merged as the model's own tokenizer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import regex
from fakes.tiny_gguf import TOKENS, make_tiny_gguf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynamo_box.profile.pull.gguf_file import GgufFile
from dynamo_box.profile.pull.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_of

# The cuts as llama.cpp has them: each expression cuts what the one before it left.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_CPP_CUTS = {
    "gpt-2": (GPT2_WORDS,),
    "smollm": (r"\p{N}", GPT2_WORDS),
    "llama-bpe": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "qwen2": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}

TEXTS = (
    "Hello, world! It's 1984's best; we'LL see.",
    "1. one\n\n2. two\n   3. three\t\t4",
    "x  =  42;\n\n\nif (y >= 3.14159) { return 0x1F; }  \n",
    "Größe ½ ² ٣٤ 日本語2024年 ไทย 🙂👩‍👩‍👧 e\u0301",
    " \u00a0\u3000 wide\r\n\r\nlines \n 7 ",
)

texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co"]) | st.sampled_from(" \n\t\r0129'sdLl"))


def tokenizer(path: Path, **metadata: Any) -> Tokenizer:
    make_tiny_gguf(path, metadata={f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    return tokenizer_of(GgufFile(path))


def cut(expressions: tuple[str, ...], text: str) -> list[str]:
    pieces = [text]
    for expression in expressions:
        pieces = [part for piece in pieces for part in _parts(expression, piece)]
    return pieces


def _parts(expression: str, text: str) -> list[str]:
    parts, position = [], 0
    for match in regex.finditer(expression, text):
        parts += [text[position : match.start()], match[0]]
        position = match.end()
    return [part for part in [*parts, text[position:]] if part]


@pytest.mark.parametrize("kind", LLAMA_CPP_CUTS)
@pytest.mark.parametrize("text", TEXTS)
def test_cuts_are_llama_cpps(kind: str, text: str) -> None:
    pieces = PRE_TOKENIZERS[kind].cut().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == cut(LLAMA_CPP_CUTS[kind], text)


@pytest.mark.parametrize("kind", LLAMA_CPP_CUTS)
@given(text=texts)
def test_cuts_are_llama_cpps_on_any_text(kind: str, text: str) -> None:
    pieces = PRE_TOKENIZERS[kind].cut().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == cut(LLAMA_CPP_CUTS[kind], text)


def test_digits_stand_alone_where_the_model_learnt_it_so(tmp_path: Path) -> None:
    smollm = tokenizer(tmp_path / "smollm.gguf").encode(" 12").tokens
    gpt2 = tokenizer(tmp_path / "gpt2.gguf", pre="gpt-2").encode(" 12").tokens
    assert smollm == ["Ġ", "1", "2"]
    assert gpt2 == ["Ġ1", "2"]


def test_special_tokens_are_whole_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    built = tokenizer(tmp_path / "tiny.gguf")
    encoding = built.encode("<|im_start|>the<think> the<|im_end|>")
    assert encoding.tokens == ["<|im_start|>", "t", "he", "<think>", "Ġthe", "<|im_end|>"]
    assert encoding.ids[-1] == 2
    assert built.decode(encoding.ids) == "the<think> the"
    assert built.get_vocab_size() == len(TOKENS)


@given(text=st.text())
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.gguf"
    built = tokenizer_of(GgufFile(path)) if path.exists() else tokenizer(path)
    assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


def test_a_begin_of_text_token_is_added_where_the_file_or_the_family_says_so(tmp_path: Path) -> None:
    assert tokenizer(tmp_path / "a.gguf").encode("he").tokens == ["he"]
    with_bos = tokenizer(tmp_path / "b.gguf", add_bos_token=True, add_eos_token=True)
    assert with_bos.encode("he").tokens == ["<|im_start|>", "he", "<|im_end|>"]
    assert with_bos.encode("he", add_special_tokens=False).tokens == ["he"]
    make_tiny_gguf(
        tmp_path / "c.gguf", metadata={"tokenizer.ggml.pre": "llama-bpe"}, leave_out=("tokenizer.ggml.add_bos_token",)
    )
    assert tokenizer_of(GgufFile(tmp_path / "c.gguf")).encode("he").tokens == ["<|im_start|>", "he"]
