"""The canary: a fixed short prompt whose greedy answer must be the same whenever the worker is about to serve.

It goes to the engine as any sequence does, but from the shell, while nothing else is in flight: first before the
worker is announced at all, and again each time it wakes. What it asks of the engine is no client's business, so the
counters that it moves are taken out of the figures again. Its isolation key is its own, and prompt and answer fit in
one block where blocks are of a usual size: it neither finds a client's blocks nor leaves any.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import msgspec

from dynamo_box.kv.hashing import isolation_key
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import Sampling
from engines.contract import Engine, EngineError, Output, RequestRejected, SequenceRequest

ANSWER_TOKENS = 2
_PROMPT = (3, 7, 11, 5, 13, 9, 4, 6)
"""Ids that any vocabulary has; what they mean is of no account."""
_COUNTERS = (
    "prompt_tokens", "computed_prompt_tokens", "cached_tokens", "output_tokens", "requests", "errors", "steps",
)  # fmt: skip


class Canary:
    """Asks; whoever takes the engine's outputs passes them through `take`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._keys = itertools.count(-1, -1)  # the sequences of clients count upwards from 1
        self._key: int | None = None
        self._tokens: list[int] = []
        self._ended: asyncio.Future[tuple[int, ...]] | None = None
        self._frozen: WorkerFigures | None = None
        self._own = dict.fromkeys(_COUNTERS, 0)

    def figures(self) -> WorkerFigures:
        """The engine's, as if there were no canary."""
        return self._frozen or self._without_own(self._engine.figures())

    async def ask(self, block_size: int, timeout_s: float) -> tuple[int, ...]:
        """The answer. Nothing else may be in flight.

        Raises:
            EngineError: there is none in time, or the engine failed.
        """
        self._key, self._tokens = next(self._keys), []
        self._ended = asyncio.get_running_loop().create_future()
        before = self._engine.figures()
        self._frozen = self._without_own(before)
        try:
            self._engine.submit(_request(self._key, block_size))
            async with asyncio.timeout(timeout_s):
                return await self._ended
        except TimeoutError:
            self._engine.cancel(self._key)
            raise EngineError(f"the canary prompt had no answer within {timeout_s:.1f} s") from None
        except RequestRejected as error:
            raise EngineError(f"the canary prompt was refused: {error}") from error
        finally:
            after = self._engine.figures()
            for name in _COUNTERS:
                self._own[name] += getattr(after, name) - getattr(before, name)
            self._key = self._ended = self._frozen = None

    def take(self, outputs: Sequence[Output]) -> Sequence[Output]:
        """Outputs of clients' sequences; the canary's own stay here."""
        if self._key is None:
            return outputs
        others = []
        for output in outputs:
            if output.key == self._key:
                self._advance(output)
            else:
                others.append(output)
        return others

    def _advance(self, output: Output) -> None:
        self._tokens += output.tokens
        if output.finish is None or self._ended is None or self._ended.done():
            return
        if output.finish in ("stop", "length"):
            self._ended.set_result(tuple(self._tokens))
        else:
            self._ended.set_exception(EngineError(f"the canary prompt failed: {output.error or output.finish}"))

    def _without_own(self, figures: WorkerFigures) -> WorkerFigures:
        changes = {name: max(0, getattr(figures, name) - own) for name, own in self._own.items()}
        return msgspec.structs.replace(figures, **changes)


def _request(key: int, block_size: int) -> SequenceRequest:
    length = min(len(_PROMPT), max(1, block_size - ANSWER_TOKENS))
    return SequenceRequest(
        key=key,
        request_id="canary",
        tokens=list(_PROMPT[:length]),
        sampling=Sampling(ANSWER_TOKENS, temperature=0.0, min_tokens=ANSWER_TOKENS, ignore_eos=True),
        isolation=isolation_key("canary", block_size=block_size, kv_dtype="canary"),
    )
