"""tokenizer.json and tokenizer_config.json from a GGUF file's metadata: byte-level BPE vocabularies.

`tokenizer.ggml.pre` names how text is cut before merging; the cuts are those of the models' own tokenizers. A
wrong cut gives tokens that the model never saw in training, so an unknown name is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from dynamo_box.errors import BoxError
from dynamo_box.profile.pull.gguf_file import GgufFile

CONTROL, USER_DEFINED = 3, 4  # of llama.cpp's llama_token_type

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """How a family cuts text. With `merge_whole_words` a word that is a token is taken before any merge."""

    cut: Callable[[], Any]
    composed: bool = False
    merge_whole_words: bool = False
    begins_with_bos: bool = False


def _words(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_apart() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


GPT2 = PreTokenizer(lambda: pre_tokenizers.ByteLevel(add_prefix_space=False))
SMOLLM = PreTokenizer(_digits_apart)
LLAMA3 = PreTokenizer(_words(LLAMA3_WORDS), merge_whole_words=True, begins_with_bos=True)
QWEN2 = PreTokenizer(_words(QWEN2_WORDS), composed=True)

PRE_TOKENIZERS = {
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata describes.

    Raises:
        BoxError: it is of a kind that isn't supported, or its metadata contradict each other.
    """
    model = file.require("tokenizer.ggml.model", str)
    kind = file.get("tokenizer.ggml.pre", str, "default")
    if model != "gpt2" or kind not in PRE_TOKENIZERS:
        raise BoxError(
            f"{file.path.name} has a tokenizer of kind {model}/{kind}, which can't be converted "
            f"(supported: gpt2 with {', '.join(PRE_TOKENIZERS)})",
            remedy="pull the model as a safetensors repository or directory, which has its own",
        )
    family = PRE_TOKENIZERS[kind]
    tokens = _strings(file, "tokenizer.ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise file.refused("has the same token twice in its vocabulary")
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=_merges(file, vocabulary), ignore_merges=family.merge_whole_words)
    )
    if family.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.cut()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(file, tokens, family)
    _add_special_tokens(file, tokenizer, tokens)
    return tokenizer


def tokenizer_config_of(file: GgufFile) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by name, and the chat template."""
    tokens = _strings(file, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.require("llama.context_length", int),
    }
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = special_token(file, key, len(tokens))
        if number is not None:
            config[f"{role}_token"] = tokens[number]
    if template := file.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    return config


def special_token(file: GgufFile, key: str, vocabulary: int) -> int | None:
    """The id that the file gives to a special token, if any.

    Raises:
        BoxError: it lies outside the vocabulary.
    """
    number = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
    if number >= vocabulary:
        raise file.refused(f"names token {number} as {key}, in a vocabulary of {vocabulary}")
    return number if number >= 0 else None


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.require(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise file.refused(f"metadata {key} is no list of texts")
    return values


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise file.refused(f"merges {merge!r}, which its vocabulary doesn't have")
        merges.append((left, right))
    return merges


def _add_special_tokens(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    kinds = file.get("tokenizer.ggml.token_type", list, [])
    if kinds and len(kinds) != len(tokens):
        raise file.refused(f"gives {len(kinds)} token types for {len(tokens)} tokens")
    marked = {CONTROL: tokenizer.add_special_tokens, USER_DEFINED: tokenizer.add_tokens}
    for kind, add in marked.items():
        add(
            [
                AddedToken(token, normalized=False, special=kind == CONTROL)
                for token, found in zip(tokens, kinds, strict=False)
                if found == kind
            ]
        )


def _post_processor(file: GgufFile, tokens: list[str], family: PreTokenizer) -> Any:
    bos, eos = (special_token(file, key, len(tokens)) for key in ("bos", "eos"))
    before = (
        [tokens[bos]]
        if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, family.begins_with_bos)
        else []
    )
    after = [tokens[eos]] if eos is not None and file.get("tokenizer.ggml.add_eos_token", bool, False) else []
    if not before and not after:
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[
            *before,
            "$A",
            *after,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{token}:1" for token in after),
        ],
        special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
    )
