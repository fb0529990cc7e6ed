"""From the KV tiers to the engine's pool, before a prompt is computed.

    waits ──Seek──► seeking ──Sought──► waits, what was found is leased ──admitted──► loading ──Fetched──► computes

Only the next few that wait are looked up, so that few leases are held: each keeps blocks in the host tier that others
may need. When a sequence is admitted it is decided how much of what was found is loaded; by then the pool may have
more of its prefix than at the time of the lookup (those blocks are skipped) or less (it is looked up again). Of those
that come together with the same prefix the first loads it, and the others wait for that.

A decode leg is looked up as soon as it comes, before the hold on the KV of its prompt expires, and keeps its lease for
as long as it waits. It loads all that it needs, the partial last block of the prompt included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from dynamo_box.kv.client.jobs import Fetch, Fetched, Forgo, Seek, Sought, Source
from dynamo_box.kv.onboard import PROBE_AFTER, Rates, choose
from dynamo_box.protocol.kv import MAX_BATCH
from engines.log import get_logger
from engines.native.blocks import BlockPool
from engines.native.legs import prompt_digests
from engines.native.sequence import Lookup, Outcome
from engines.native.sequence import Sequence as Request

PREFILL_AT_LEAST = 32
"""Prompt tokens of a step from which its time says something about prefill."""
_FADE = 0.8
NOT_HELD = "nothing is held for it any longer"
"""A hold has all blocks or there is none: its time was up, or the store that had it has ended."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Loading:
    """`blocks` of the pool are written, those of the request's chain from `first` on."""

    request: Request
    first: int
    blocks: tuple[int, ...]
    priorities: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A copy has ended: the request's blocks hold the KV of its first `tokens`. The full ones of them from `first` on
    were loaded, with these `priorities`; `spoilt` are blocks of the pool that hold anything.
    """

    request: Request
    first: int
    priorities: tuple[int | None, ...]
    tokens: int
    spoilt: tuple[int, ...]


class PrefillRate:
    """Prompt tokens a second, from steps that had some to compute; every step weighs as much as its time."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, prompt_tokens: int, other_tokens: int, seconds: float) -> None:
        if prompt_tokens >= max(PREFILL_AT_LEAST, other_tokens):
            self._tokens = self._tokens * _FADE + prompt_tokens + other_tokens
            self._seconds = self._seconds * _FADE + seconds

    @property
    def value(self) -> float | None:
        return self._tokens / self._seconds if self._seconds > 0 else None


class Onboarding:
    """Implements `scheduler.Onboarding`; at most `ahead` of those that wait are looked up."""

    def __init__(self, pool: BlockPool, source: Source, *, block_size: int, block_bytes: int, ahead: int) -> None:
        self._pool = pool
        self._source = source
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._ahead = ahead
        self._keys = count(1)
        self._seeks: dict[int, tuple[Request, int] | None] = {}
        """None: what is found is of no use."""
        self._leased: dict[int, Request] = {}
        self._loading: dict[int, _Loading] = {}
        self._coming: set[bytes] = set()
        """What is being loaded."""
        self._against = 0
        self.prefill = PrefillRate()
        self.loads = self.recomputes = 0
        self.taken_over = self.failed = 0
        """Decode legs that had the KV of their prompts loaded, and those that had not."""

    def use(self, pool: BlockPool) -> None:
        """From now on it is about this pool; no request may be there."""
        self._pool = pool

    @property
    def seeking(self) -> bool:
        return bool(self._seeks)

    @property
    def loading(self) -> bool:
        """Whether blocks of the pool are being written."""
        return bool(self._loading)

    # for the scheduler

    def look_ahead(self, waiting: list[Request]) -> None:
        """Look up those that come next, and let go of what others hold that have been overtaken."""
        ahead = waiting[: self._ahead]
        for request in ahead:
            if request.sought is None and not request.seeking:
                self._look_up(request, len(self._pool.match(self._reusable(request))))
        overtaken = [one for one in self._leased.values() if not one.awaits_transfer and one not in ahead]
        if len(self._leased) > self._ahead:
            for request in overtaken:
                self._give_back(request)

    def is_coming(self, request: Request) -> bool:
        if not self._coming:
            return False
        wanted = self._reusable(request)
        hits = len(self._pool.match(wanted))
        return hits < len(wanted) and wanted[hits] in self._coming

    def may_admit(self, request: Request, hits: int) -> bool:
        if request.sought is None or hits < request.sought.first:
            self._give_back(request)
            self._look_up(request, hits)
        return not request.seeking

    def admitted(self, request: Request, hits: int) -> None:
        if not self._load(request, hits):
            self._give_back(request)
            self._conclude(request, hits * self._block_size)

    def _load(self, request: Request, hits: int) -> bool:
        """Whether it is worth it."""
        found = request.sought
        if found is None or not found.lease:
            return False
        skip = hits - found.first
        tiers = found.tiers[skip:]
        blocks = len(tiers) if request.awaits_transfer else self._worth_loading(tiers)
        if not blocks:
            self.recomputes += bool(tiers)
            return False
        self.loads += 1
        self._leased.pop(request.request.key)
        request.sought = None
        request.loading = True
        places = tuple(request.blocks[hits : hits + blocks])
        key = next(self._keys)
        self._loading[key] = _Loading(request, hits, places, found.priorities[skip : skip + blocks])
        self._coming.update(request.digests[hits : hits + blocks])
        self._source.fetch(Fetch(key, found.lease, places, skip))
        return True

    # for whoever runs it

    def claim(self, request: Request) -> None:
        """Look up what was handed over for a decode leg; what is found is leased, and the hold on it ends."""
        request.seeking = True
        key = next(self._keys)
        self._seeks[key] = (request, 0)
        digests = prompt_digests(request, self._block_size)
        transfer = request.request.transfer
        self._source.seek(Seek(key, tuple(digests), transfer.key if transfer is not None else b""))

    def discard(self, hold: bytes) -> None:
        """End a hold that nobody will claim."""
        key = next(self._keys)
        self._seeks[key] = None
        self._source.seek(Seek(key, (), hold))

    def sought(self, result: Sought) -> None:
        seek = self._seeks.pop(result.key)
        request, first = seek or (None, 0)
        if request is None or not request.seeking or request.cancelled:
            if request is not None:
                request.seeking = False
            if result.lease:
                self._source.forgo(Forgo(result.lease))
            return
        request.seeking = False
        request.sought = Lookup(first, result.tiers, result.lease, result.priorities)
        if result.lease:
            self._leased[request.request.key] = request
        if request.awaits_transfer and request.request.must_transfer:
            self._fail_early(request, result.error or NOT_HELD)

    def fetched(self, result: Fetched) -> Arrived:
        loading = self._loading.pop(result.key)
        self._coming.difference_update(loading.request.digests[loading.first : loading.first + len(loading.blocks)])
        loaded = min(result.count, len(loading.blocks))
        tokens = (loading.first + loaded) * self._block_size
        if loading.request.awaits_transfer:
            tokens = min(tokens, loading.request.prompt_length)
        self._conclude(loading.request, tokens, result.error)
        full = tokens // self._block_size - loading.first
        return Arrived(loading.request, loading.first, loading.priorities[:full], tokens, loading.blocks[loaded:])

    def ended(self, request: Request) -> None:
        """It waits no more."""
        request.seeking = False
        self._give_back(request)

    def _fail_early(self, request: Request, why: str) -> None:
        """What can't have all that it must have need not wait for a place."""
        found = len(request.sought.tiers) if request.sought is not None else 0
        blocks = max(found, len(self._pool.match(self._reusable(request))))
        tokens = min(blocks * self._block_size, request.prompt_length)
        if tokens < request.prompt_length:
            self._give_back(request)
            self._conclude(request, tokens, why)

    def _conclude(self, request: Request, tokens: int, why: str = "") -> None:
        """A decode leg has the KV of its first `tokens`, and gets no more."""
        if not request.awaits_transfer or request.cancelled:
            return
        request.awaits_transfer = False
        if tokens >= request.prompt_length:
            self.taken_over += 1
            return
        self.failed += 1
        missing = f"{tokens} of {request.prompt_length} tokens are there" + (f" ({why})" if why else "")
        log.warning("a prompt handed over could not be loaded", request_id=request.request.request_id, found=missing)
        if request.request.must_transfer:
            request.outcome = Outcome("error", f"the KV of the prompt could not be loaded: {missing}")

    def _look_up(self, request: Request, hits: int) -> None:
        wanted = self._reusable(request)[hits : hits + MAX_BATCH]
        if not wanted or self._source.status:
            request.sought = Lookup(hits if wanted == [] else 0)
            return
        request.seeking = True
        key = next(self._keys)
        self._seeks[key] = (request, hits)
        self._source.seek(Seek(key, tuple(wanted)))

    def _worth_loading(self, tiers: str) -> int:
        """How many of these blocks are loaded."""
        rates = Rates(self._source.rates(), self.prefill.value)
        blocks = choose(tiers, block_bytes=self._block_bytes, block_size=self._block_size, rates=rates).blocks
        if blocks < len(tiers):
            self._against += 1
            if self._against >= PROBE_AFTER:
                self._against = 0
                return len(tiers)
        return blocks

    def _reusable(self, request: Request) -> list[bytes]:
        """All full blocks but that of the last token, which is always computed: it samples."""
        return request.digest_blocks(self._block_size)[: (len(request.tokens) - 1) // self._block_size]

    def _give_back(self, request: Request) -> None:
        """Let go of what was found for it; it may be looked up again."""
        found, request.sought = request.sought, None
        if found is not None and found.lease:
            del self._leased[request.request.key]
            self._source.forgo(Forgo(found.lease))
