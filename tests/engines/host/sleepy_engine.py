"""An engine that can sleep, as badly as the option `manner` says: `python -m sleepy_engine`.

A request with the annotation "hold" runs until it is cancelled; any other is answered at once. A prefill leg has been
handed over by the time it is cancelled. `transfers_failed` counts what was given up.
"""

from __future__ import annotations

import asyncio

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import Transfer
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import (
    DISAGG,
    SLEEP,
    ClearedBlocks,
    EngineError,
    EngineInfo,
    Output,
    ReportProgress,
    SequenceRequest,
    Sink,
    SleepReport,
    WakeReport,
)
from engines.host import main


class SleepyEngine:
    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        self.sink, self.manner = sink, spec.options.get("manner")
        self.asleep, self.wakes, self.requests, self.tokens = False, 0, 0, 0
        self.prefilled: set[int] = set()
        self.given_up: list[bytes] = []
        capabilities = (SLEEP,) if self.manner == "whole requests only" else (SLEEP, DISAGG)
        return EngineInfo(
            spec.model.block_size, kv_blocks_total=1, kv_dtype="none", context_length=100, capabilities=capabilities
        )

    def submit(self, sequence: SequenceRequest) -> None:
        assert not self.asleep
        self.requests += 1
        if "hold" in sequence.annotations:
            if sequence.leg == "prefill":
                self.prefilled.add(sequence.key)
            return
        if self.manner == "no first canary":
            self.sink.step([Output(sequence.key, finish="error", error="no numbers")])
            return
        if self.manner == "silent after wake" and self.wakes:
            return
        token = 1 + self.wakes if self.manner == "other answers after wake" else 1
        count = sequence.sampling.max_tokens
        self.tokens += count
        self.sink.step([Output(sequence.key, (token,) * count, finish="length")])

    def cancel(self, key: int) -> None:
        if key in self.prefilled:
            self.sink.step([Output(key, finish="prefilled", transfer=Transfer(b"%16d" % key, 1))])
        else:
            self.sink.step([Output(key, finish="cancelled")])

    def give_up(self, key: bytes) -> None:
        self.given_up.append(key)

    def cached_blocks(self) -> list[bytes]:
        return []

    def figures(self) -> WorkerFigures:
        return WorkerFigures(
            requests=self.requests,
            output_tokens=self.tokens,
            kv_bytes=0 if self.asleep else 10,
            transfers_failed=len(self.given_up),
        )

    def set_option(self, key: str, value: str) -> str:
        raise ValueError(key)

    async def sleep(self) -> SleepReport:
        if self.manner == "can't sleep now":
            raise EngineError("not tired")
        if self.manner == "breaks in sleep":
            raise EngineError("fell out of bed", permanent=True)
        self.asleep = True
        self.sink.step([], [ClearedBlocks()])
        return SleepReport(10, 20, {"unmap": 0.001})

    async def wake(self, deadline_s: float) -> WakeReport:
        if self.manner == "no room":
            raise EngineError("no memory now")
        if self.manner == "hang in wake":
            await asyncio.Event().wait()
        self.asleep = False
        self.wakes += 1
        return WakeReport({"attach": 0.001})

    async def close(self) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    main(SleepyEngine)
