"""One request while it lives in the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from dynamo_box.kv.hashing import chain_digests
from dynamo_box.protocol.request import FinishReason, Transfer, pack_tokens
from engines.contract import SequenceRequest


@dataclass(slots=True)
class Judged:
    """How far the priority filter has come: `blocks` of the chain are judged, and whether the rest is `stopped` (a
    priority below the threshold) or `over` (its priorities make no sense).
    """

    blocks: int = 0
    stopped: bool = False
    over: bool = False


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the tiers have of a chain from its block `first` on: a letter for each block (see `kv.client.jobs.Sought`).
    The `priorities` are those that the blocks were stored with. `lease` is 0 if there is nothing.
    """

    first: int
    tiers: str = ""
    lease: int = 0
    priorities: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sequence ends that no token of its own ends."""

    finish: FinishReason
    error: str = ""
    transfer: Transfer | None = None


@dataclass(eq=False)
class Sequence:
    """`tokens` is the prompt and what was generated; the KV of the first `computed` of them lies in `blocks`.

    `digests` are those of the full blocks of `tokens`, as far as they were needed. The first `published` of
    `blocks` are known to the pool by theirs, or are copies of such. A preemption empties `blocks`, no more.

    `seeking`: it waits, and what the KV tiers have of it isn't known yet. `loading`: it runs, and some of its blocks
    are being written by a copy from the tiers. `handing`: it runs, as a prefill leg that has its token, until its
    blocks are held in the tiers for another worker. `sought` and `offload` belong to the tiers.

    `awaits_transfer`: a decode leg that has not been given the KV of its prompt. `outcome`: it is to end so.
    """

    request: SequenceRequest
    arrival: int
    tokens: list[int]
    stop_ids: frozenset[int]
    seed: int
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    cached_tokens: int = 0
    cancelled: bool = False
    seeking: bool = False
    loading: bool = False
    handing: bool = False
    awaits_transfer: bool = False
    outcome: Outcome | None = None
    sought: Lookup | None = None
    offload: Judged = field(default_factory=Judged)

    @classmethod
    def of(cls, request: SequenceRequest, arrival: int, eos_ids: frozenset[int]) -> Sequence:
        sampling = request.sampling
        stops = frozenset() if sampling.ignore_eos else eos_ids | frozenset(sampling.stop_token_ids)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return cls(request, arrival, list(request.tokens), stops, seed, awaits_transfer=request.leg == "decode")

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: higher priority, then first come."""
        return (-self.request.priority, self.arrival)

    @property
    def copying(self) -> bool:
        """Whether its blocks must stay as they are until a copy is over."""
        return self.loading or self.handing

    @property
    def computes(self) -> bool:
        """Whether it may be in a step, while it runs."""
        return not self.copying and self.outcome is None

    @property
    def is_over(self) -> bool:
        """Whether it can be ended, and has no reason to go on."""
        return not self.copying and (self.cancelled or self.outcome is not None)

    @property
    def prompt_length(self) -> int:
        """Without the token that a decode leg begins with: another worker generated it."""
        return len(self.request.tokens) - (self.request.leg == "decode")

    @property
    def remaining(self) -> int:
        """Tokens whose KV is yet to be computed; 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be one that ends it."""
        return self.generated >= self.request.sampling.min_tokens

    def digest_blocks(self, block_size: int) -> list[bytes]:
        """The digests of all full blocks of `tokens` so far."""
        done = len(self.digests) * block_size
        if len(self.tokens) - done >= block_size:
            parent = self.digests[-1] if self.digests else b""
            rest = pack_tokens(self.tokens[done:])
            self.digests += chain_digests(rest, block_size, self.request.isolation, parent)
        return self.digests

    def finish_after(self, token: int, context_length: int) -> FinishReason | None:
        """Whether `token`, just appended, was the last one."""
        if token in self.stop_ids and self.generated > self.request.sampling.min_tokens:
            return "stop"
        if self.generated >= self.request.sampling.max_tokens or len(self.tokens) >= context_length:
            return "length"
        return None
