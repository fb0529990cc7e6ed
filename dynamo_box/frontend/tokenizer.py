"""Text → token ids of one model, cached by segment.

Special tokens cut the text before anything else is looked at, so the ids of a prompt are those of its segments put
together. Where a tokenizer does not work that way (a prefix that it adds at the start of a text, special tokens that
swallow the blanks around them), which a probe at load time finds out, the whole text is tokenised every time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from dynamo_box.frontend.control_tokens import ControlTokens, free_mark
from dynamo_box.frontend.detokenize import Vocabulary
from dynamo_box.frontend.errors import invalid_request
from dynamo_box.frontend.extent import most_characters_per_token
from dynamo_box.frontend.segments import SegmentCache
from dynamo_box.frontend.templates import ChatTemplate, load_chat_template
from dynamo_box.protocol.request import pack_tokens

MAX_CACHED_BYTES = 32 * 1024 * 1024
MAX_CACHED_SEGMENT_BYTES = 256 * 1024
LONG_CHARACTERS = 8192
"""A longer text takes more than a millisecond."""
_PROBE = "Grüße, 世界!\n  def f(x):\treturn x"


class FarTooLong(Exception):
    """A text can only be more tokens than it may be: `tokens` at least, which was found without tokenising it."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"at least {tokens} tokens")
        self.tokens = tokens


class ModelTokenizer:
    """For any thread.

    Raises:
        OSError, ValueError: the directory holds no tokenizer or template that can be read.
    """

    def __init__(self, model: Path) -> None:
        content = (model / "tokenizer.json").read_text("utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{model / 'tokenizer.json'} is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        definition = json.loads(content)
        decoder = definition.get("decoder") or {}
        self.vocabulary = Vocabulary(self._tokenizer, decoder.get("type"))
        self.vocabulary_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._most_characters = most_characters_per_token(definition, self._tokenizer.get_vocab(with_added_tokens=True))
        special = {
            token.content: (number, token)
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._control = ControlTokens({text: pack_tokens([number]) for text, (number, _) in special.items()})
        self.chat_template: ChatTemplate | None = load_chat_template(model, set(special))
        self._cache = SegmentCache(MAX_CACHED_BYTES, MAX_CACHED_SEGMENT_BYTES)
        self._prefix = _ids_before_a_text(self._tokenizer)
        self._by_segment = all(_cuts_cleanly(token) for _, token in special.values()) and self._segments_add_up(special)
        # From here on special tokens are found by `_control` alone: what it leaves is ordinary text.
        self._tokenizer.encode_special_tokens = self._by_segment

    def encode_text(self, text: str, max_tokens: int | None = None) -> bytes:
        """Packed ids (u32 LE) of a raw prompt, in which special tokens count as such; begins as the model wants it.

        Raises:
            FarTooLong: its sheer length can't be `max_tokens`.
        """
        self._require_fit(text, max_tokens)
        return self._prefix + self._encode(text)

    def encode_chat(self, messages: list[dict[str, str]], max_tokens: int | None = None) -> bytes:
        """Packed ids (u32 LE) of a conversation, up to where the answer begins.

        Raises:
            ApiError: the template refuses the messages, or they hold special tokens that can't be disarmed (400).
            FarTooLong: the sheer length of the conversation can't be `max_tokens`.
        """
        if self.chat_template is None:
            raise invalid_request("this model has no chat template; use /v1/completions", "messages")
        written = [message["content"] for message in messages]
        if not any(map(self._control.occur_in, written)):
            rendered = self.chat_template.render(messages)
            self._require_fit(rendered, max_tokens)
            return self._encode(rendered)
        mark = free_mark(written)
        if mark is None or not self._by_segment:
            raise invalid_request("the messages hold special tokens of this model; take them out", "messages")
        disarmed = [{**each, "content": self._control.disarm(each["content"], mark)} for each in messages]
        rendered = self.chat_template.render(disarmed)
        self._require_fit(rendered, max_tokens, ignored=rendered.count(mark))
        return self._encode(rendered, mark)

    def _require_fit(self, text: str, max_tokens: int | None, ignored: int = 0) -> None:
        """`ignored` characters of `text` don't count."""
        if max_tokens is None or self._most_characters is None:
            return
        fewest = -(-(len(text) - ignored) // self._most_characters)
        if fewest > max_tokens:
            raise FarTooLong(fewest)

    def _encode(self, text: str, mark: str = "") -> bytes:
        if not self._by_segment:
            return self._encode_plain(text)
        pieces: list[bytes] = []
        for segment, special in self._control.cut(text):
            if segment:
                pieces.append(self._segment(segment.replace(mark, "") if mark else segment))
            pieces.append(special)
        return b"".join(pieces)

    def _segment(self, text: str) -> bytes:
        packed = self._cache.get(text)
        if packed is None:
            packed = self._encode_plain(text)
            self._cache.put(text, packed)
        return packed

    def _encode_plain(self, text: str) -> bytes:
        if len(text) > LONG_CHARACTERS:
            # `encode` keeps the interpreter lock, and with it every other request, until it is done.
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        else:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return pack_tokens(encoding.ids)

    def _segments_add_up(self, special: dict[str, Any]) -> bool:
        """Do the ids of segments add up to those of the whole?"""
        for text, (number, _) in special.items():
            whole = self._encode_plain(f"{text}{_PROBE}{text}\n{_PROBE}{text}")
            cut = pack_tokens([number])
            if whole != cut + self._encode_plain(_PROBE) + cut + self._encode_plain(f"\n{_PROBE}") + cut:
                return False
        return True


def _cuts_cleanly(token: tokenizers.AddedToken) -> bool:
    """Is this special token found wherever its text stands, and is that all it takes?"""
    return not (token.lstrip or token.rstrip or token.single_word or token.normalized) and len(token.content) > 1


def _ids_before_a_text(tokenizer: tokenizers.Tokenizer) -> bytes:
    """The ids that the tokenizer's post-processor puts before a text, such as a beginning-of-sequence token."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    at = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
    return pack_tokens(full[:at])
