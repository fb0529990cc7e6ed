"""One sequence of the mock, and a step that is planned for several of them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from dynamo_box.kv.hashing import block_digest, chain_digests
from dynamo_box.protocol.request import pack_tokens
from engines.contract import Output, RemovedBlocks, SequenceRequest
from engines.mock.faults import Point, RequestFaultKind
from engines.mock.timing import Step
from engines.mock.tokens import TokenStream


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the KV tiers have of a chain from its block `first` on, as in `Sought`."""

    first: int
    tiers: str = ""
    lease: int = 0
    priorities: tuple[int | None, ...] = ()


class MockSequence:
    """`context` is the prompt and the output so far, `computed` how much of it has KV; `chain` names its full blocks
    as far as known, `digests` those that it holds, and `opened` counts the blocks beyond them. The first `arriving`
    tokens' KV is on its way, from another worker or the KV tiers. What those have of it is `seeking` or in `lookup`;
    `judged` of its blocks were judged for them. It makes no token beyond `silent_after`, and `points` are where it
    comes to harm. `ending`: the next plan ends it.
    """

    __slots__ = (
        "arriving",
        "cached_tokens",
        "chain",
        "computed",
        "context",
        "digests",
        "ending",
        "judged",
        "limit",
        "lookup",
        "offload_over",
        "offload_stopped",
        "opened",
        "points",
        "prompt_tokens",
        "request",
        "said_before",
        "seeking",
        "silent_after",
        "stops",
        "stream",
    )

    def __init__(self, request: SequenceRequest, limit: int, ordinary: range) -> None:
        self.request = request
        self.limit = limit
        self.context = array("I", request.tokens)
        self.prompt_tokens = len(request.tokens)
        self.stream = TokenStream(pack_tokens(request.tokens), request.sampling, ordinary)
        sampling = request.sampling
        self.stops = frozenset(() if sampling.ignore_eos else sampling.stop_token_ids)
        self.chain: list[bytes] = []
        self.digests: list[bytes] = []
        self.opened = 0
        self.computed = 0
        self.cached_tokens = 0
        self.ending = False
        self.silent_after: int | None = None
        self.points: dict[Point, RequestFaultKind] = {}
        self.arriving = request.transfer.tokens if request.transfer is not None and request.leg == "decode" else 0
        self.seeking = self.offload_stopped = self.offload_over = False
        self.lookup: Lookup | None = None
        self.judged = 0
        self.said_before = 1 if request.leg == "decode" else 0
        """How many tokens of our prompt the client takes for output."""

    def digests_of(self, tokens: int, block_size: int) -> list[bytes]:
        """Of the full blocks in its first `tokens`, each computed once."""
        chain = self.chain
        if tokens // block_size > len(chain):
            packed = pack_tokens(self.context[len(chain) * block_size : tokens])
            chain += chain_digests(packed, block_size, self.request.isolation, chain[-1] if chain else b"")
        return chain[: tokens // block_size]

    def blocks_of(self, tokens: int, block_size: int) -> list[bytes]:
        """As `digests_of`, with that of what is left over, if there is anything."""
        digests, rest = self.digests_of(tokens, block_size), tokens % block_size
        if rest:
            parent = digests[-1] if digests else b""
            packed = pack_tokens(self.context[tokens - rest : tokens])
            digests.append(block_digest(parent, packed, self.request.isolation))
        return digests

    @property
    def produced(self) -> int:
        return len(self.context) - self.prompt_tokens

    @property
    def silent(self) -> bool:
        return self.silent_after is not None and self.produced >= self.silent_after

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed."""
        return len(self.context) - self.computed

    @property
    def decoding(self) -> bool:
        return self.remaining == 1 and self.produced + self.said_before > 0

    def prompt_part(self, tokens: int) -> int:
        """How many of the next `tokens` to compute are of what the client takes for the prompt."""
        return max(0, min(tokens, self.prompt_tokens - self.said_before - self.computed))


@dataclass
class Work:
    """A planned step: how many tokens each sequence computes, and what the planning itself brought about: sequences
    that ended, and those that have got their blocks, into which KV is to arrive. `prefilled` are, once it is
    committed, the prefill legs that have got their token.
    """

    shares: list[tuple[MockSequence, int]] = field(default_factory=list)
    evicted: list[bytes] = field(default_factory=list)
    ended: list[Output] = field(default_factory=list)
    arriving: list[MockSequence] = field(default_factory=list)
    prefilled: list[MockSequence] = field(default_factory=list)
    preempted: bool = False

    @property
    def step(self) -> Step:
        """What it takes its time for. A chunk attends to what is before it and, on average, to half of itself."""
        prefill = decoding = pairs = kv_tokens = 0
        for sequence, tokens in self.shares:
            if sequence.decoding:
                decoding += 1
            else:
                prefill += tokens
            pairs += tokens * sequence.computed + tokens * (tokens + 1) // 2
            kv_tokens += sequence.computed + tokens
        return Step(prefill, decoding, pairs, kv_tokens)

    @property
    def prompt_tokens(self) -> int:
        return sum(sequence.prompt_part(tokens) for sequence, tokens in self.shares)

    @property
    def removed(self) -> list[RemovedBlocks]:
        return [RemovedBlocks(tuple(self.evicted))] if self.evicted else []
