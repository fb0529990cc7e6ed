"""The compute thread's state, and one step of it. Nothing here is touched by another thread."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from dynamo_box.kv.client.jobs import Result
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.kv import KvLayout
from dynamo_box.protocol.request import FinishReason, Sampling
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import (
    DISAGG,
    KV_EVENTS,
    KV_TIERS,
    PRIORITIES,
    SLEEP,
    BlockEvent,
    EngineError,
    EngineInfo,
    Output,
    ReportProgress,
    SequenceRequest,
    SleepReport,
    WakeReport,
)
from engines.native.attention import make_batch
from engines.native.blocks import BlockPool
from engines.native.config import read_config, read_options
from engines.native.kv_cache import PoolCopier, make_cache
from engines.native.model import Llama
from engines.native.sampler import sample
from engines.native.scheduler import Scheduler, Work
from engines.native.sequence import Sequence
from engines.native.shared import SharedWeights, kept_dtype, private_weights
from engines.native.tiering import Tiering, connect

_WARM_UP_PROMPT = 32


class StepResult(msgspec.Struct, frozen=True):
    """What one step did, as it crosses to the event loop."""

    outputs: tuple[Output, ...]
    events: tuple[BlockEvent, ...]
    figures: WorkerFigures


class Runner:
    """A loaded model with its pool of blocks and the sequences in it. `deliver` is called on other threads with what
    belongs to `take`.

    Raises:
        EngineError: the model can't be loaded, or not with this memory.
    """

    def __init__(self, spec: WorkerSpec, progress: ReportProgress, deliver: Callable[[Result], None]) -> None:
        self._options = read_options(spec.options, spec.max_batch)
        config = read_config(Path(spec.model.path))
        torch.set_num_threads(spec.threads)
        model = Path(spec.model.path)
        dtype = _compute_dtype(self._options.dtype, kept_dtype(model))
        self._spec = spec
        self._block_size = spec.model.block_size
        self._dtype = dtype
        self._config = config
        self._cache = make_cache(config, spec, dtype)
        self._copier = PoolCopier(self._cache)
        self._pool = BlockPool(self._cache.blocks)
        self.tiering = self._tier(deliver) if spec.kvstore else None
        self._scheduler = self._make_scheduler()
        self._context = min(spec.model.context_length, config.context_length, self._pool.total * self._block_size)
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = self._errors = self._steps = 0
        self._computed_prompt_tokens = 0
        self._busy_s = 0.0
        self._asleep = self._waits_for_tiers = False
        self._shared = SharedWeights(spec, config, dtype) if spec.gms else None
        try:
            weights = self._shared.open(progress) if self._shared else private_weights(model, config, dtype, progress)
            self._model = Llama(config, weights, dtype)
            progress("warm-up", None, None, "")
            self._warm_up()
            if self.tiering is not None:
                self.tiering.store.start()
        except BaseException:
            self.close()
            raise

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            block_size=self._block_size,
            kv_blocks_total=self._pool.total,
            kv_dtype=_word(self._dtype),
            context_length=self._context,
            capabilities=(
                KV_EVENTS,
                PRIORITIES,
                *((SLEEP,) if self._shared else ()),
                *((KV_TIERS, DISAGG) if self.tiering else ()),
            ),
            versions={"torch": str(torch.__version__)},
        )

    @property
    def idle(self) -> bool:
        """Nothing can be computed before the next command."""
        return not self._sequences or self._waits_for_tiers

    def add(self, request: SequenceRequest) -> None:
        sequence = Sequence.of(request, self._arrivals, self._config.eos_ids)
        self._arrivals += 1
        self._sequences[request.key] = sequence
        self._scheduler.add(sequence)
        if self.tiering is not None:
            self.tiering.added(sequence)
        self._waits_for_tiers = False

    def cancel(self, key: int) -> None:
        """Takes effect in the next step that doesn't find its blocks being copied; keys that have ended are ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            sequence.cancelled = True
            if self.tiering is not None:
                self.tiering.cancelled(sequence)
            self._waits_for_tiers = False

    def give_up(self, key: bytes) -> None:
        """Nobody claims what is held by this key."""
        if self.tiering is not None:
            self.tiering.onboarding.discard(key)

    def take(self, result: Result) -> None:
        """What the tiers have delivered."""
        if self.tiering is not None:
            self.tiering.take(result, self._scheduler)
            self._waits_for_tiers = False

    @torch.inference_mode()
    def step(self) -> StepResult:
        """End what is over, then compute one token of each sequence that decodes, and pieces of prompts."""
        outputs = self._end_what_is_over()
        works = self._scheduler.schedule()
        outputs += self._end_what_is_over()
        if works:
            outputs += self._compute(works)
        elif self._sequences and not outputs:
            if self.tiering is None or not self.tiering.awaited:
                raise AssertionError(f"none of {len(self._sequences)} sequences moves")
            self._waits_for_tiers = True
        if not self._sequences:
            self._pool.check_idle()
        self._steps += 1
        events = tuple(self._pool.take_events())
        if self.tiering is not None:
            self.tiering.changed(events)
        return StepResult(tuple(outputs), events, self.figures)

    def sleep(self) -> SleepReport:
        """Give back the KV pool and unmap the weights; nothing may be computed until `wake`.

        Raises:
            EngineError: something runs or is copied, the weights are the process's own, or they can't be unmapped.
        """
        if self._shared is None:
            raise EngineError("these weights are the process's own: they can't be given back")
        if self._asleep:
            return SleepReport(0, 0)
        if self._sequences:
            raise EngineError(f"{len(self._sequences)} sequences still run")
        if self.tiering is not None and self.tiering.copying:
            raise EngineError("blocks are still being copied to the KV tiers")
        began = time.perf_counter()
        kv_bytes = self._cache.resident_bytes
        weights_bytes = self._shared.unmap()
        self._asleep = True
        unmapped = time.perf_counter()
        self._cache.close()
        self._pool = BlockPool(self._cache.blocks)
        if self.tiering is not None:
            self.tiering.use(self._pool)
        self._scheduler = self._make_scheduler()
        ctypes.CDLL(None).malloc_trim(0)  # what torch left in malloc's arenas
        return SleepReport(kv_bytes, weights_bytes, {"unmap": unmapped - began, "kv": time.perf_counter() - unmapped})

    def wake(self, deadline_s: float) -> WakeReport:
        """The same weights at the same addresses, and an empty pool.

        Raises:
            EngineError: still asleep; for good if the weights have changed.
        """
        if self._shared is None or not self._asleep:
            return WakeReport({})
        phases = self._shared.remap(deadline_s)
        began = time.perf_counter()
        try:
            self._cache = make_cache(self._config, self._spec, self._dtype)
        except OSError as error:
            self._shared.unmap()
            raise EngineError(f"no memory for KV: {error}") from error
        self._copier.cache = self._cache
        self._asleep = False
        return WakeReport({**phases, "kv": time.perf_counter() - began})

    def close(self) -> None:
        """End the copies, and let go of the weights, which must not be touched again."""
        if self.tiering is not None:
            self.tiering.store.close()
        if self._shared is not None:
            self._shared.close()

    def _tier(self, deliver: Callable[[Result], None]) -> Tiering:
        config, size = self._config, self._block_size
        layout = KvLayout(
            fingerprint=self._spec.model.fingerprint,
            kv_dtype=_word(self._dtype),
            block_size=size,
            block_bytes=self._cache.bytes // self._cache.blocks,
            shape=f"layers={config.layers},kv=2,tokens={size},heads={config.kv_heads},dim={config.head_dim}",
        )
        store = connect(self._spec, layout, self._copier, deliver)
        return Tiering(self._spec, layout, self._copier, self._pool, store)

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(
            self._pool,
            block_size=self._block_size,
            max_batch=self._spec.max_batch,
            max_batch_tokens=self._options.max_batch_tokens,
            onboarding=self.tiering.onboarding if self.tiering is not None else None,
        )

    def _compute(self, works: list[Work]) -> list[Output]:
        began = time.perf_counter()
        for work in works:
            computed = work.sequence.computed
            self._computed_prompt_tokens += max(0, min(work.count, work.sequence.prompt_length - computed))
        batch, sampling = make_batch(works, self._block_size, self._dtype)
        logits = self._model.forward(batch, self._cache)
        sequences = [work.sequence for work in sampling]
        chosen = sample(_precise(logits), sequences) if sequences else []
        for work in works:
            self._scheduler.computed(work)
        if self.tiering is not None:
            tokens = [work.count for work in works]
            prompts = sum(count for count in tokens if count > 1)
            self.tiering.measured(prompts, sum(tokens) - prompts, time.perf_counter() - began)
            for work in works:
                self.tiering.computed(work.sequence)
        outputs = [self._advance(one, token) for one, token in zip(sequences, chosen, strict=True)]
        self._busy_s += time.perf_counter() - began
        return outputs

    def _advance(self, sequence: Sequence, token: int | None) -> Output:
        """Append what was sampled. Logits that are no numbers end their own sequence only."""
        if token is None:
            self._errors += 1
            return self._end(sequence, "error", "the model computed logits that are not finite numbers")
        first = not sequence.generated
        sequence.tokens.append(token)
        self._output_tokens += 1
        if first and sequence.request.leg != "decode":
            self._prompt_tokens += sequence.prompt_length
            self._cached_tokens += sequence.cached_tokens
        finish = sequence.finish_after(token, self._context)
        if finish is not None:
            self._end(sequence, finish)
        elif self.tiering is not None and sequence.request.leg == "prefill":
            self.tiering.handovers.begin(sequence)
        return Output(
            key=sequence.request.key,
            tokens=(token,),
            finish=finish,
            cached_tokens=sequence.cached_tokens if first else 0,
        )

    def _end_what_is_over(self) -> list[Output]:
        """Those that were cancelled, and those that a leg ends."""
        return [self._end_early(one) for one in list(self._sequences.values()) if one.is_over]

    def _end_early(self, sequence: Sequence) -> Output:
        outcome = sequence.outcome
        if sequence.cancelled or outcome is None:
            return self._end(sequence, "cancelled")
        self._errors += outcome.finish == "error"
        output = self._end(sequence, outcome.finish, outcome.error)
        output.transfer = outcome.transfer
        return output

    def _end(self, sequence: Sequence, finish: FinishReason, error: str = "") -> Output:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.key]
        if self.tiering is not None:
            self.tiering.ended(sequence)
        return Output(key=sequence.request.key, finish=finish, error=error)

    @property
    def figures(self) -> WorkerFigures:
        figures = WorkerFigures(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_total=self._pool.total,
            kv_blocks_used=self._pool.held,
            kv_blocks_cached=self._pool.idle,
            weights_bytes=0 if self._asleep else self._model.bytes,
            kv_bytes=0 if self._asleep else self._cache.bytes,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            requests=self._arrivals,
            errors=self._errors,
            steps=self._steps,
            busy_s=self._busy_s,
            computed_prompt_tokens=self._computed_prompt_tokens,
        )
        return figures if self.tiering is None else self.tiering.add_to(figures)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """One prompt chunk and one sampled token through block 0, which holds nothing yet."""
        sampling = Sampling(max_tokens=1, temperature=1.0, top_p=0.9, seed=0)
        length = min(_WARM_UP_PROMPT, self._block_size)
        request = SequenceRequest(0, "warm-up", [0] * length, sampling, b"")
        sequence = Sequence.of(request, 0, self._config.eos_ids)
        sequence.blocks = [0]
        for computed, count in ((0, length - 1), (length - 1, 1)):
            sequence.computed = computed
            batch, works = make_batch([Work(sequence, count)], self._block_size, self._dtype)
            logits = self._model.forward(batch, self._cache)
            if works:
                sample(_precise(logits), [sequence])


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in bfloat16 would not even add up to one."""
    return logits.float() if logits.dtype is torch.bfloat16 else logits


def _compute_dtype(wanted: str | None, kept: torch.dtype) -> torch.dtype:
    if wanted is not None:
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[wanted]
    return torch.float64 if kept == torch.float64 else torch.float32


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
