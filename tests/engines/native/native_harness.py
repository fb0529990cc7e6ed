"""An engine in this process, with a sink that collects: the shell's part in tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dynamo_box.kv.hashing import isolation_key
from dynamo_box.protocol.figures import WorkerTiers
from dynamo_box.protocol.kv import LONGEST_HOLD_S
from dynamo_box.protocol.request import FinishReason, Leg, PriorityRange, Sampling, Transfer
from dynamo_box.protocol.spec import ModelSpec, WorkerSpec
from engines.contract import BlockEvent, EngineInfo, Output, RemovedBlocks, SequenceRequest, StoredBlocks
from engines.native.engine import NativeEngine
from engines.native.kv_cache import PoolCopier

MIB = 1024 * 1024
DEADLINE_S = 90.0
ISOLATION = isolation_key("test", block_size=16, kv_dtype="any")


def worker_spec(path: Path, **changes: Any) -> WorkerSpec:
    """A worker for the model at `path`; `context_length` and `block_size` go to its model."""
    model = ModelSpec(
        name="model",
        path=str(path),
        fingerprint="test",
        context_length=changes.pop("context_length", 2048),
        block_size=changes.pop("block_size", 16),
    )
    fields: dict[str, Any] = {
        "name": "worker",
        "engine": "native",
        "role": "aggregated",
        "run_dir": "",
        "threads": 2,
        "device": "cpu",
        "kv_bytes": 4 * MIB,
        "max_batch": 32,
    }
    return WorkerSpec(model=model, **{**fields, **changes})


class Answer:
    """One sequence's outputs, as they came."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.ended = asyncio.Event()

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.tokens]

    @property
    def finish(self) -> FinishReason | None:
        return self.outputs[-1].finish

    @property
    def cached_tokens(self) -> int:
        return self.outputs[0].cached_tokens


class Held:
    """Copies into the pool, or calls of another method, stop before they begin until `go`."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        what: str = "copy_in",
        whose: type = PoolCopier,
        when: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        original = getattr(whose, what)

        def held(one: Any, *arguments: Any) -> Any:
            if when(one):
                self.reached.set()
                assert self._go.wait(DEADLINE_S)
            return original(one, *arguments)

        monkeypatch.setattr(whose, what, held)

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, DEADLINE_S)

    def go(self) -> None:
        self._go.set()


class RunningEngine:
    """`async with RunningEngine(spec) as engine:`; every wait has a deadline."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.engine = NativeEngine()
        self.progress: list[tuple[str, int | None, int | None, str]] = []
        self.steps: list[list[Output]] = []
        self.told: set[bytes] = set()
        self.stored: list[StoredBlocks] = []
        self.removed: list[RemovedBlocks] = []
        self.fatal_cause: asyncio.Future[str]
        self.info: EngineInfo
        self._spec = spec
        self._answers: dict[int, Answer] = {}
        self._next_key = 0

    async def __aenter__(self) -> RunningEngine:
        self.fatal_cause = asyncio.get_running_loop().create_future()
        start = self.engine.start(self._spec, self, lambda *report: self.progress.append(report))
        self.info = await asyncio.wait_for(start, DEADLINE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.wait_for(self.engine.close(), DEADLINE_S)

    def step(self, outputs: Sequence[Output], events: Sequence[BlockEvent] = ()) -> None:
        for event in events:
            if isinstance(event, StoredBlocks):
                assert not self.told.intersection(event.digests)
                self.stored.append(event)
                self.told.update(event.digests)
            elif isinstance(event, RemovedBlocks):
                assert self.told.issuperset(event.digests)
                self.removed.append(event)
                self.told.difference_update(event.digests)
            else:
                self.told.clear()
        assert set(self.engine.cached_blocks()) == self.told
        self.steps.append(list(outputs))
        for output in outputs:
            answer = self._answers[output.key]
            assert not answer.ended.is_set(), "an output after the end"
            answer.outputs.append(output)
            if output.finish is not None:
                answer.ended.set()

    def fatal(self, cause: str) -> None:
        self.fatal_cause.set_result(cause)

    def submit(
        self,
        tokens: list[int],
        *,
        isolation: bytes = ISOLATION,
        priority: int = 0,
        kv_priority: int | None = None,
        kv_priorities: tuple[PriorityRange, ...] = (),
        leg: Leg = "whole",
        transfer: Transfer | None = None,
        transfer_ttl_s: float = LONGEST_HOLD_S,
        must_transfer: bool = False,
        **sampling: Any,
    ) -> tuple[int, Answer]:
        settings = Sampling(**{"max_tokens": 16, "temperature": 0.0, **sampling})
        key, self._next_key = self._next_key, self._next_key + 1
        request = SequenceRequest(
            key,
            f"request-{key}",
            tokens,
            settings,
            isolation,
            priority,
            kv_priority=kv_priority,
            kv_priorities=kv_priorities,
            leg=leg,
            transfer=transfer,
            transfer_ttl_s=transfer_ttl_s,
            must_transfer=must_transfer,
        )
        answer = Answer()
        self._answers[key] = answer
        self.engine.submit(request)
        return key, answer

    async def generate(self, tokens: list[int], **settings: Any) -> Answer:
        _, answer = self.submit(tokens, **settings)
        await asyncio.wait_for(answer.ended.wait(), DEADLINE_S)
        return answer

    @property
    def tiers(self) -> WorkerTiers:
        tiers = self.engine.figures().tiers
        assert tiers is not None
        return tiers

    async def until(self, holds: Callable[[WorkerTiers], bool], what: str) -> WorkerTiers:
        """The figures of its tiers once they are so; nobody announces their changes."""
        async with asyncio.timeout(DEADLINE_S):
            while not holds(self.tiers):
                await asyncio.sleep(0.005)
        return self.tiers

    async def settled(self) -> WorkerTiers:
        """Nothing waits for the tiers any more."""
        return await self.until(lambda tiers: not tiers.queued and not tiers.pinned, "offload is done")

    async def generate_all(self, prompts: Sequence[list[int]], **settings: Any) -> list[Answer]:
        return list(await asyncio.gather(*(self.generate(prompt, **settings) for prompt in prompts)))
