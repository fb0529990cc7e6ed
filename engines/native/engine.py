"""The native engine's side of the event loop.

Everything of torch, importing it included, belongs to one compute thread. Commands go to it through a queue
that it empties between steps; each step comes back as one callback on the loop. What `cached_blocks` and
`figures` answer is kept here, brought up to date by those callbacks, so that the two threads share nothing
else.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo_box.kv.client.jobs import Fetched, Kept, Offered, Result, Sought
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import (
    BlockEvent,
    ClearedBlocks,
    EngineError,
    EngineInfo,
    RemovedBlocks,
    ReportProgress,
    RequestRejected,
    SequenceRequest,
    Sink,
    SleepReport,
    StoredBlocks,
    WakeReport,
)
from engines.log import get_logger
from engines.native.requests import check
from engines.native.tiering import Store
from engines.tier_figures import told

if TYPE_CHECKING:
    from engines.native.runner import Runner, StepResult

log = get_logger()

STOP_FLUSH_S = 2.0
"""How long the KV tiers may take what waits for them when the engine ends."""
COPIES_END_S = 5.0
"""How long copies to them may take to end once no more are begun."""
_RATE_SAMPLES = 8


class _Cancel(msgspec.Struct, frozen=True):
    key: int


class _GiveUp(msgspec.Struct, frozen=True):
    key: bytes


class _Stop(msgspec.Struct, frozen=True):
    pass


@dataclass(frozen=True)
class _Sleep:
    done: asyncio.Future[SleepReport]


@dataclass(frozen=True)
class _Wake:
    done: asyncio.Future[WakeReport]
    deadline_s: float


_STOP = _Stop()
_Command = SequenceRequest | _Cancel | _GiveUp | _Stop | _Sleep | _Wake | Result


class NativeEngine:
    """Implements `engines.contract.Engine`, `Sleeper` and `HandsOver`."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._put_off: deque[_Command] = deque()
        self._thread: threading.Thread | None = None
        self._tiers: Store | None = None
        self._info: EngineInfo | None = None
        self._vocab_size = 0
        self._asleep = False
        self._cached: dict[bytes, None] = {}
        self._figures = WorkerFigures()
        self._requests = 0
        self._rate = _Rate()

    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        if spec.device != "cpu":
            raise EngineError(
                f"the native engine computes on the CPU, not on {spec.device}",
                remedy="set the worker's device to cpu",
                permanent=True,
            )
        loop = asyncio.get_running_loop()
        self._sleep_deadline_s = spec.offload.sleep_deadline_s
        self._sink = sink
        self._loop = loop
        started: asyncio.Future[Runner] = loop.create_future()
        self._thread = threading.Thread(
            target=self._compute, args=(spec, progress, started), name="compute", daemon=True
        )
        self._thread.start()
        runner = await started
        self._vocab_size = runner.vocab_size
        self._figures = runner.figures
        self._info = runner.info
        self._tiers = runner.tiering.store if runner.tiering is not None else None
        return self._info

    def submit(self, sequence: SequenceRequest) -> None:
        if self._info is None:
            raise RequestRejected("the engine has not started")
        if self._asleep:
            raise EngineError("the engine is asleep")
        check(sequence, self._info, self._vocab_size)
        self._requests += 1
        self._commands.put(sequence)

    def cancel(self, key: int) -> None:
        self._commands.put(_Cancel(key))

    def give_up(self, key: bytes) -> None:
        self._commands.put(_GiveUp(key))

    def cached_blocks(self) -> list[bytes]:
        return list(self._cached)

    def figures(self) -> WorkerFigures:
        """`requests` counts what was submitted, `waiting` includes what the compute thread has not looked at
        yet.
        """
        figures = self._figures
        waiting = figures.waiting + self._requests - figures.requests
        rate = self._rate.sample(figures.output_tokens)
        tiers = figures.tiers
        if tiers is not None and self._tiers is not None and self._info is not None:
            tiers = told(tiers, self._tiers, self._info.block_size)
        return msgspec.structs.replace(
            figures, requests=self._requests, waiting=waiting, tokens_per_s=rate, tiers=tiers
        )

    def set_option(self, key: str, value: str) -> str:
        raise ValueError(f"the native engine has no option {key!r} that could be set while it runs")

    async def sleep(self) -> SleepReport:
        done: asyncio.Future[SleepReport] = self._loop.create_future()
        self._commands.put(_Sleep(done))
        report = await done
        self._asleep = True
        return report

    async def wake(self, deadline_s: float) -> WakeReport:
        done: asyncio.Future[WakeReport] = self._loop.create_future()
        self._commands.put(_Wake(done, deadline_s))
        report = await done
        self._asleep = False
        return report

    async def close(self) -> None:
        """End the compute thread after the step it is in."""
        if self._thread is not None:
            self._commands.put(_STOP)
            await asyncio.to_thread(self._thread.join)

    # On the compute thread

    def _compute(self, spec: WorkerSpec, progress: ReportProgress, started: asyncio.Future[Runner]) -> None:
        try:
            progress("import torch", None, None, "")
            from engines.native.runner import Runner

            runner = Runner(spec, progress, self._commands.put)
        except Exception as error:  # noqa: BLE001  it is the starter's to handle
            self._tell(_settle, started, error)
            return
        self._tell(_settle, started, runner)
        try:
            while self._obey(runner):
                self._tell(self._deliver, runner.step())
                self._offload(runner)
        except Exception as error:
            log.exception("the compute thread failed")
            self._tell(self._sink.fatal, f"{type(error).__name__}: {error}")
        finally:
            runner.close()

    def _obey(self, runner: Runner) -> bool:
        """Carry out the commands that wait; with nothing to compute wait for the next. False to stop."""
        while runner.idle or self._put_off or not self._commands.empty():
            match self._put_off.popleft() if self._put_off else self._next_command(runner):
                case None:
                    self._offload(runner)
                case SequenceRequest() as request:
                    runner.add(request)
                case _Cancel(key):
                    runner.cancel(key)
                case _GiveUp(key):
                    runner.give_up(key)
                case Offered() | Kept() | Sought() | Fetched() as result:
                    self._take(runner, result)
                case _Sleep(done):
                    self._save(runner)
                    self._rest(runner, done, runner.sleep, (ClearedBlocks(),))
                case _Wake(done, deadline_s):
                    self._rest(runner, done, partial(runner.wake, deadline_s), ())
                case _Stop():
                    self._await_offload(runner, STOP_FLUSH_S)
                    return False
        return True

    def _next_command(self, runner: Runner) -> _Command | None:
        """None: nothing has come, and there is something to send to the tiers."""
        try:
            return self._commands.get(timeout=None if runner.tiering is None else runner.tiering.handovers.next_s)
        except queue.Empty:
            return None

    def _offload(self, runner: Runner) -> None:
        if runner.tiering is not None:
            runner.tiering.offload()

    def _take(self, runner: Runner, result: Result) -> None:
        """Between steps the tiers get their blocks after the step: what a copy has let go of is first for sequences."""
        runner.take(result)
        if runner.idle:
            self._offload(runner)
            self._tell_figures(runner, ())

    def _save(self, runner: Runner) -> None:
        """Before the pool is given up."""
        if runner.tiering is not None:
            runner.tiering.queue_everything()
            self._await_offload(runner, self._sleep_deadline_s)
            runner.tiering.clear_queue()
            self._await_offload(runner, COPIES_END_S)

    def _await_offload(self, runner: Runner, limit_s: float) -> None:
        """Until nothing waits for the tiers any more. Other commands than their results are put off; a stop ends it."""
        ends = time.monotonic() + limit_s
        self._offload(runner)
        while runner.tiering is not None and runner.tiering.offloading and _STOP not in self._put_off:
            try:
                command = self._commands.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(command, Offered | Kept | Sought | Fetched):
                runner.take(command)
                self._offload(runner)
            else:
                self._put_off.append(command)

    def _rest(
        self, runner: Runner, done: asyncio.Future[Any], act: Callable[[], Any], events: tuple[BlockEvent, ...]
    ) -> None:
        try:
            report = act()
        except EngineError as error:
            self._tell(_settle, done, error)
            return
        self._tell_figures(runner, events)
        self._tell(_settle, done, report)

    def _tell_figures(self, runner: Runner, events: tuple[BlockEvent, ...]) -> None:
        from engines.native.runner import StepResult

        self._tell(self._deliver, StepResult((), events, runner.figures))

    # On the event loop

    def _deliver(self, result: StepResult) -> None:
        for event in result.events:
            self._remember(event)
        self._figures = result.figures
        self._sink.step(result.outputs, result.events)

    def _remember(self, event: BlockEvent) -> None:
        match event:
            case StoredBlocks(digests):
                self._cached.update(dict.fromkeys(digests))
            case RemovedBlocks(digests):
                for digest in digests:
                    del self._cached[digest]
            case ClearedBlocks():
                self._cached.clear()

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        """From the compute thread to the loop; once that is closed nobody is left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)


class _Rate:
    """Tokens a second over the last few samples of a counter."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)

    def sample(self, count: int) -> float:
        now = time.monotonic()
        self._samples.append((now, count))
        since, before = self._samples[0]
        return (count - before) / (now - since) if now > since else 0.0


def _settle(waiting: asyncio.Future[Any], outcome: Any) -> None:
    if waiting.done():
        return
    if isinstance(outcome, Exception):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)
