"""An engine that behaves as badly as the option `manner` says: `python -m stubborn_engine`."""

from __future__ import annotations

import asyncio
import threading

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineInfo, Output, ReportProgress, SequenceRequest, Sink
from engines.host import main


class StubbornEngine:
    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        self.sink, self.manner = sink, spec.options.get("manner")
        threading.Thread(target=threading.Event().wait).start()  # never ends, and the interpreter waits for it
        if self.manner == "raise in start":
            raise RuntimeError("out of luck")
        if self.manner == "chatter in start":
            threads = [threading.Thread(target=self._chatter, args=(progress, n)) for n in range(4)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                await asyncio.sleep(0.01)
        size = spec.model.block_size * (2 if self.manner == "other block size" else 1)
        return EngineInfo(size, kv_blocks_total=1, kv_dtype="none", context_length=100)

    @staticmethod
    def _chatter(progress: ReportProgress, n: int) -> None:
        for done in range(20_000):
            progress("first" if done < 10_000 else "second", done, None, f"thread {n}")

    def submit(self, sequence: SequenceRequest) -> None:
        if self.manner == "raise in submit":
            raise RuntimeError("no idea what this is")
        if self.manner == "fatal":
            self.sink.fatal("the device fell off the bus")
        if self.manner == "strange keys":
            self.sink.step([Output(4711, (1,)), Output(sequence.key, (5,)), Output(4712, finish="stop")])
            self.sink.step([Output(sequence.key, (6,), finish="stop"), Output(sequence.key, (7,))])

    def cancel(self, key: int) -> None:
        """Never mind."""

    def cached_blocks(self) -> list[bytes]:
        return []

    def figures(self) -> WorkerFigures:
        return WorkerFigures()

    def set_option(self, key: str, value: str) -> str:
        raise RuntimeError("options are beneath me")

    async def close(self) -> None:
        if self.manner == "block the loop in close":
            threading.Event().wait()
        if self.manner == "hang in close":
            await asyncio.Event().wait()


if __name__ == "__main__":
    main(StubbornEngine)
