"""Text → token ids of one model, cached by segment.

Special tokens cut the text before anything else is looked at, so the ids of a prompt are those of its segments put
together, and a conversation's earlier messages need not be tokenised again. Where a tokenizer does not work that way (a
prefix that it adds at the start of a text, say), which a probe at load time finds out, the whole text is tokenised.

A special token that a user writes into a message is taken as one, as by the reference systems.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from pathlib import Path

import tokenizers

from dynamo_box.frontend.detokenize import Vocabulary
from dynamo_box.frontend.templates import ChatTemplate, load_chat_template
from dynamo_box.protocol.request import pack_tokens

MAX_CACHED_BYTES = 32 * 1024 * 1024
MAX_CACHED_SEGMENT = 256 * 1024
_PROBE = "Grüße, 世界!\n  def f(x):\treturn x"


class ModelTokenizer:
    """Thread-safe. Raises OSError or ValueError when the directory holds no tokenizer that can be read."""

    def __init__(self, model: Path) -> None:
        content = (model / "tokenizer.json").read_text("utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{model / 'tokenizer.json'} is no tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = json.loads(content).get("decoder") or {}
        self.vocabulary = Vocabulary(self._tokenizer, decoder.get("type"))
        self.vocabulary_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {
            token.content: pack_tokens([number])
            for number, token in added.items()
            if token.special and not (token.lstrip or token.rstrip or token.single_word)
        }
        self.chat_template: ChatTemplate | None = load_chat_template(model, set(self._special))
        self._cut = re.compile("|".join(sorted(map(re.escape, self._special), key=len, reverse=True)))
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._by_segment = bool(self._special) and self._probe()

    def encode(self, text: str) -> bytes:
        """Packed ids (u32 LE); nothing is added at the start or the end."""
        if not self._by_segment:
            return self._encode_plain(text)
        pieces: list[bytes] = []
        position = 0
        for match in self._cut.finditer(text):
            if match.start() > position:
                pieces.append(self._segment(text[position : match.start()]))
            pieces.append(self._special[match.group()])
            position = match.end()
        if position < len(text):
            pieces.append(self._segment(text[position:]))
        return b"".join(pieces)

    def _segment(self, text: str) -> bytes:
        with self._lock:
            known = self._cache.get(text)
            if known is not None:
                self._cache.move_to_end(text)
                return known
        packed = self._encode_plain(text)
        cost = len(text) * 4 + len(packed)
        if cost <= MAX_CACHED_SEGMENT:
            with self._lock:
                if text not in self._cache:
                    self._cache[text] = packed
                    self._cached_bytes += cost
                while self._cached_bytes > MAX_CACHED_BYTES:
                    old_text, old_packed = self._cache.popitem(last=False)
                    self._cached_bytes -= len(old_text) * 4 + len(old_packed)
        return packed

    def _encode_plain(self, text: str) -> bytes:
        return pack_tokens(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _probe(self) -> bool:
        """Do the ids of segments add up to those of the whole?"""
        special = next(iter(self._special))
        whole = self._encode_plain(f"{special}{_PROBE}{special}\n{_PROBE}{special}")
        cut = self._special[special]
        apart = cut + self._encode_plain(_PROBE) + cut + self._encode_plain(f"\n{_PROBE}") + cut
        return whole == apart
