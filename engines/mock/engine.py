"""The mock engine: the contract over scheduler and timing, and the faults carried out."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path

import msgspec

from dynamo_box import __version__
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import KvEvent
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import (
    DISAGG,
    KV_EVENTS,
    KV_TIERS,
    LATE_CANCEL,
    EngineError,
    EngineInfo,
    Output,
    ReportProgress,
    RequestRejected,
    SequenceRequest,
    Sink,
)
from engines.log import get_logger
from engines.mock.cache import BlockPool
from engines.mock.faults import EventFault, Fault, RequestFault, StartFault, parse_annotations, parse_fault
from engines.mock.handing import Direct, Way
from engines.mock.harm import after_flush, die, with_wrong_hashes
from engines.mock.legs import Legs
from engines.mock.onboarding import Loaded
from engines.mock.options import MockOptions, parse_options, pool_blocks
from engines.mock.scheduler import Scheduler
from engines.mock.sequence import MockSequence, Work
from engines.mock.tiering import Tiering
from engines.mock.timing import Pace, step_seconds
from engines.mock.tokens import ordinary_tokens

KV_DTYPE = "float16"
START_STEPS = 20
RATE_WINDOW_S = 1.0

log = get_logger()


class MockEngine:
    """See `engines.contract.Engine` and `HandsOver`, and `tamper` in `engines.shell_events.TampersWithEvents`."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._request_fault: RequestFault | None = None
        self._event_faults: list[EventFault] = []
        self._dying: dict[int, RequestFault] = {}
        self._prompt_tokens = self._cached_tokens = self._output_tokens = self._computed_prompt_tokens = 0
        self._busy_s = 0.0
        self._requests = self._steps = 0
        self._tiering: Tiering | None = None
        self._way: Way
        self._rate, self._rate_at, self._rate_tokens = 0.0, 0.0, 0

    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        options = parse_options(spec.options)
        blocks = pool_blocks(options, spec)
        fault = _option_fault(options)
        if isinstance(fault, StartFault):
            await self._fail_start(fault)
        elif fault is not None:
            self._put_in_force(fault)
        try:
            ordinary = ordinary_tokens(Path(spec.model.path), options.vocab_size)
        except (OSError, msgspec.MsgspecError) as error:
            raise EngineError(
                f"the model directory {spec.model.path} can't be read: {error}", permanent=True
            ) from error
        for done in range(1, START_STEPS + 1 if options.startup_s else 1):
            await asyncio.sleep(options.startup_s / START_STEPS)
            progress("pretending to load", done, START_STEPS, "steps")
        self._options, self._sink, self._block_size = options, sink, spec.model.block_size
        self._pool = BlockPool(blocks)
        if spec.kvstore:
            self._tiering = Tiering(spec, options, KV_DTYPE, self._pool, self._loaded, self._wake.set)
        self._scheduler = Scheduler(
            self._pool,
            block_size=spec.model.block_size,
            context_length=spec.model.context_length,
            max_batch=spec.max_batch,
            chunk_tokens=options.chunk_tokens,
            ordinary=ordinary,
            stop_after=options.stop_after,
            tiers=self._tiering,
        )
        self._way = Direct(options, spec.model.block_size) if self._tiering is None else self._tiering.way
        self._legs = Legs(self._way, self._scheduler, sink, self._wake.set, spec.model.block_size)
        self._loop = asyncio.get_running_loop()
        self._loop_task = self._loop.create_task(self._run())
        self._loop_task.add_done_callback(self._loop_ended)
        if self._tiering is not None:
            self._tiering.start()
        return EngineInfo(
            block_size=spec.model.block_size,
            kv_blocks_total=blocks,
            kv_dtype=KV_DTYPE,
            context_length=spec.model.context_length,
            capabilities=(
                KV_EVENTS,
                DISAGG,
                *((KV_TIERS,) if self._tiering is not None else ()),
                *((LATE_CANCEL,) if options.late_cancel else ()),
            ),
            versions={"mock": __version__},
        )

    def submit(self, sequence: SequenceRequest) -> None:
        prompt, longest = len(sequence.tokens), self._scheduler.longest
        if prompt >= longest:
            raise RequestRejected(f"the prompt has {prompt} tokens; this worker takes fewer than {longest}")
        try:
            faults = parse_annotations(sequence.annotations)
        except ValueError as error:
            raise RequestRejected(str(error)) from error
        taken = self._legs.add(sequence)
        self._requests += 1
        if sequence.leg != "decode":
            self._prompt_tokens += taken.prompt_tokens
        if self._request_fault is not None:
            self._afflict(taken, self._request_fault)
        for fault in faults:
            if isinstance(fault, RequestFault):
                self._afflict(taken, fault)
            else:
                self._put_in_force(fault)
        self._wake.set()

    def cancel(self, key: int) -> None:
        if self._options.late_cancel and self._scheduler.awaits_first_token(key):
            self._sink.fatal("a decode leg was cancelled before its first token")
            return
        self._scheduler.cancel(key)
        self._wake.set()

    def give_up(self, key: bytes) -> None:
        self._way.give_up(key)

    def cached_blocks(self) -> list[bytes]:
        return self._pool.cached()

    def figures(self) -> WorkerFigures:
        return WorkerFigures(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            kv_blocks_total=self._pool.total,
            kv_blocks_used=self._pool.used,
            kv_blocks_cached=self._pool.idle,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            requests=self._requests,
            steps=self._steps,
            tokens_per_s=self._token_rate(),
            busy_s=self._busy_s,
            computed_prompt_tokens=self._computed_prompt_tokens,
            handed_over=self._legs.handed_over,
            taken_over=self._legs.taken_over,
            handover_seconds=self._legs.handover_seconds,
            transfers_failed=self._legs.failed,
            tiers=self._tiering.figures if self._tiering is not None else None,
        )

    def set_option(self, key: str, value: str) -> str:
        if key != "fault":
            raise ValueError(f"no option {key!r}; there is fault")
        fault = parse_fault(value)
        if isinstance(fault, StartFault):
            raise ValueError(f"{fault.kind} is a fault of the start; set it in the profile")
        if fault is None:
            self._request_fault = None
            self._event_faults.clear()
        else:
            self._put_in_force(fault)
        return value or "none"

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
            self._way.close()
            if self._tiering is not None:
                await self._tiering.close()

    def tamper(self, event: KvEvent) -> object | None:
        """The event as the faults in force would have it sent."""
        if not self._event_faults:
            return event
        fault = self._event_faults[0]
        self._event_faults[0:1] = [EventFault(fault.kind, fault.count - 1)] if fault.count > 1 else []
        if fault.kind == "drop_events":
            return None
        return ["no", "message"] if fault.kind == "garble_events" else with_wrong_hashes(event)

    # the step loop

    async def _run(self) -> None:
        pace = Pace()
        while True:
            work = self._scheduler.plan()
            if self._tiering is not None:
                self._tiering.evicted(work.evicted)
            if work.ended or work.evicted:
                self._sink.step(work.ended, work.removed)
                for output in work.ended:
                    self._dying.pop(output.key, None)
            for sequence in work.arriving:
                self._legs.take_over(sequence)
            if not work.shares:
                self._wake.clear()
                await self._wake.wait()
                pace.restart()
                continue
            seconds = step_seconds(self._options, work.step)
            await pace.step(seconds)
            self._harm_prefill(work)
            self._legs.computed(work)
            self._count(work, seconds)
            outputs, stored = self._scheduler.commit(work)
            self._count_outputs(work, outputs)
            self._sink.step(outputs, stored)
            for sequence in work.prefilled:
                self._legs.hand_over(sequence)
            if self._dying:
                self._carry_out(outputs)

    def _loaded(self, loaded: Loaded) -> None:
        """The KV of the first blocks of a prompt has come from the tiers, or as much of it as was to be had."""
        if stored := self._scheduler.arrived(loaded.sequence, loaded.blocks * self._block_size):
            self._sink.step((), stored)
        self._wake.set()

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the step loop failed", error=repr(error))
            self._sink.fatal(f"the mock's step loop failed: {error!r}")

    def _count(self, work: Work, seconds: float) -> None:
        self._steps += 1
        self._busy_s += seconds
        self._computed_prompt_tokens += work.prompt_tokens

    def _count_outputs(self, work: Work, outputs: list[Output]) -> None:
        self._output_tokens += len(outputs)
        decode_legs = {sequence.request.key for sequence, _ in work.shares if sequence.request.leg == "decode"}
        self._cached_tokens += sum(output.cached_tokens for output in outputs if output.key not in decode_legs)

    def _token_rate(self) -> float:
        """Output tokens a second over the last second or so."""
        now = self._loop.time()
        if now - self._rate_at >= RATE_WINDOW_S:
            self._rate = round((self._output_tokens - self._rate_tokens) / (now - self._rate_at), 1)
            self._rate_at, self._rate_tokens = now, self._output_tokens
        return self._rate

    # faults

    async def _fail_start(self, fault: StartFault) -> None:
        if fault.kind == "refuse_start":
            raise EngineError(fault.cause, remedy="take the fault out of the profile", permanent=True)
        if fault.kind == "fail_start":
            raise EngineError("told to fail the start")
        if fault.kind == "crash_start":
            die("crash")
        await asyncio.sleep(fault.seconds)

    def _put_in_force(self, fault: Fault) -> None:
        log.warning("fault in force", fault=str(fault))
        if isinstance(fault, EventFault):
            self._event_faults.append(fault)
        elif isinstance(fault, RequestFault):
            if fault.kind != "stall" and fault.after is None and fault.at is None:
                after_flush(partial(die, fault.kind))
            else:
                self._request_fault = fault

    def _afflict(self, sequence: MockSequence, fault: RequestFault) -> None:
        if fault.at is not None:
            if fault.leg == sequence.request.leg:
                sequence.points[fault.at] = fault.kind
        elif fault.kind == "stall":
            sequence.silent_after = fault.after or 0
        elif not fault.after:
            after_flush(partial(die, fault.kind))
        else:
            self._dying[sequence.request.key] = fault

    def _harm_prefill(self, work: Work) -> None:
        """Prefill legs that are to come to harm before they have a token, and have computed something."""
        for sequence, _ in work.shares:
            harm = sequence.points.get("prefill")
            if harm == "stall":
                sequence.silent_after = 0
            elif harm is not None:
                del sequence.points["prefill"]
                die(harm)

    def _carry_out(self, outputs: list[Output]) -> None:
        """Crash or freeze once a sequence that is to bring this about has got its tokens, and they have
        left.
        """
        for output in outputs:
            fault = self._dying.get(output.key)
            if fault is None:
                continue
            left = (fault.after or 0) - len(output.tokens)
            self._dying[output.key] = RequestFault(fault.kind, left)
            if left <= 0:
                del self._dying[output.key]
                after_flush(partial(die, fault.kind))
            elif output.finish is not None:
                del self._dying[output.key]


def _option_fault(options: MockOptions) -> Fault | None:
    try:
        return parse_fault(options.fault)
    except ValueError as error:
        raise EngineError(f"the mock engine's option fault: {error}", permanent=True) from error
