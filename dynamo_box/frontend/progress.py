"""How far a request has come, on whichever workers: all that one more worker needs to go on where the last one was.

What is sampled next depends on the tokens before it and on the seed (see `preprocess`), and not on who samples. So the
prompt with what was said so far, and limits that are lower by as much, give the same rest of the answer anywhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec

from dynamo_box.frontend.preprocess import Prompt
from dynamo_box.kv.hashing import TOKEN_BYTES, chain_digests, short_hashes
from dynamo_box.protocol.request import Sampling, pack_tokens


class Progress:
    """The prompt, the tokens so far, and the limits that are left."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._said = array("I")

    def take(self, tokens: Iterable[int]) -> None:
        """These have been passed on."""
        self._said.extend(tokens)

    @property
    def begun(self) -> bool:
        """Has the client been told anything?"""
        return bool(self._said)

    @property
    def complete(self) -> bool:
        """Is no token left to generate? The limit covers the context too: see `preprocess`."""
        return len(self._said) >= self._prompt.sampling.max_tokens

    @property
    def count(self) -> int:
        """Tokens of the prompt and of what was said."""
        return self._prompt.count + len(self._said)

    @property
    def tokens(self) -> bytes:
        """The same, packed."""
        return self._prompt.tokens + pack_tokens(self._said) if self._said else self._prompt.tokens

    @property
    def sampling(self) -> Sampling:
        """With the limits that are left."""
        sampling, said = self._prompt.sampling, len(self._said)
        return msgspec.structs.replace(
            sampling, max_tokens=sampling.max_tokens - said, min_tokens=max(sampling.min_tokens - said, 0)
        )

    @property
    def hashes(self) -> tuple[int, ...]:
        """The router's names of the full blocks so far."""
        prompt = self._prompt
        if not self._said:
            return prompt.hashes
        hashed = len(prompt.hashes) * prompt.block_size * TOKEN_BYTES
        digests = chain_digests(self.tokens[hashed:], prompt.block_size, prompt.isolation, prompt.last_digest)
        return prompt.hashes + short_hashes(digests)
