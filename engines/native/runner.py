"""The compute thread's state, and one step of it. Nothing here is touched by another thread."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import msgspec
import torch

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import FinishReason, Sampling
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import (
    KV_EVENTS,
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
from engines.native.attention import KvCache, make_batch
from engines.native.blocks import BlockPool
from engines.native.config import LlamaConfig, read_config, read_options
from engines.native.model import Llama
from engines.native.sampler import sample
from engines.native.scheduler import Scheduler, Work
from engines.native.sequence import Sequence
from engines.native.shared import SharedWeights, kept_dtype, private_weights

_WARM_UP_PROMPT = 32


class StepResult(msgspec.Struct, frozen=True):
    """What one step did, as it crosses to the event loop."""

    outputs: tuple[Output, ...]
    events: tuple[BlockEvent, ...]
    figures: WorkerFigures


class Runner:
    """A loaded model with its pool of blocks and the sequences in it.

    Raises:
        EngineError: the model can't be loaded, or not with this memory.
    """

    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        self._options = read_options(spec.options, spec.max_batch)
        config = read_config(Path(spec.model.path))
        torch.set_num_threads(spec.threads)
        model = Path(spec.model.path)
        dtype = _compute_dtype(self._options.dtype, kept_dtype(model))
        self._spec = spec
        self._block_size = spec.model.block_size
        self._dtype = dtype
        self._config = config
        self._cache = _make_cache(config, spec, dtype)
        self._start_with_no_blocks_used()
        self._context = min(spec.model.context_length, config.context_length, self._pool.total * self._block_size)
        self._sequences: dict[int, Sequence] = {}
        self._arrivals = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = self._errors = self._steps = 0
        self._asleep = False
        self._shared = SharedWeights(spec, config, dtype) if spec.gms else None
        try:
            weights = self._shared.open(progress) if self._shared else private_weights(model, config, dtype, progress)
            self._model = Llama(config, weights, dtype)
            progress("warm-up", None, None, "")
            self._warm_up()
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
            kv_dtype=str(self._dtype).removeprefix("torch."),
            context_length=self._context,
            capabilities=(KV_EVENTS, PRIORITIES, *((SLEEP,) if self._shared else ())),
            versions={"torch": str(torch.__version__)},
        )

    @property
    def idle(self) -> bool:
        return not self._sequences

    def add(self, request: SequenceRequest) -> None:
        sequence = Sequence.of(request, self._arrivals, self._config.eos_ids)
        self._arrivals += 1
        self._sequences[request.key] = sequence
        self._scheduler.add(sequence)

    def cancel(self, key: int) -> None:
        """Takes effect in the next step; keys that have ended are ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            sequence.cancelled = True

    @torch.inference_mode()
    def step(self) -> StepResult:
        """End what was cancelled, then compute one token of each sequence that decodes, and pieces of
        prompts.
        """
        outputs = [self._end(one, "cancelled") for one in list(self._sequences.values()) if one.cancelled]
        works = self._scheduler.schedule()
        if works:
            outputs += self._compute(works)
        if self.idle:
            self._pool.check_idle()
        self._steps += 1
        return StepResult(tuple(outputs), tuple(self._pool.take_events()), self.figures)

    def sleep(self) -> SleepReport:
        """Give back the KV pool and unmap the weights; nothing may be computed until `wake`.

        Raises:
            EngineError: something runs, the weights are the process's own, or they can't be unmapped.
        """
        if self._shared is None:
            raise EngineError("these weights are the process's own: they can't be given back")
        if self._asleep:
            return SleepReport(0, 0)
        if not self.idle:
            raise EngineError(f"{len(self._sequences)} sequences still run")
        began = time.perf_counter()
        kv_bytes = self._cache.resident_bytes
        weights_bytes = self._shared.unmap()
        self._asleep = True
        unmapped = time.perf_counter()
        self._cache.close()
        self._start_with_no_blocks_used()
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
            self._cache = _make_cache(self._config, self._spec, self._dtype)
        except OSError as error:
            self._shared.unmap()
            raise EngineError(f"no memory for KV: {error}") from error
        self._asleep = False
        return WakeReport({**phases, "kv": time.perf_counter() - began})

    def close(self) -> None:
        """Let go of the weights, which must not be touched again."""
        if self._shared is not None:
            self._shared.close()

    def _start_with_no_blocks_used(self) -> None:
        self._pool = BlockPool(self._cache.blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=self._block_size,
            max_batch=self._spec.max_batch,
            max_batch_tokens=self._options.max_batch_tokens,
        )

    def _compute(self, works: list[Work]) -> list[Output]:
        batch, sampling = make_batch(works, self._block_size, self._dtype)
        logits = self._model.forward(batch, self._cache)
        sequences = [work.sequence for work in sampling]
        chosen = sample(_precise(logits), sequences) if sequences else []
        for work in works:
            self._scheduler.computed(work)
        return [self._advance(one, token) for one, token in zip(sequences, chosen, strict=True)]

    def _advance(self, sequence: Sequence, token: int | None) -> Output:
        """Append what was sampled. Logits that are no numbers end their own sequence only."""
        if token is None:
            self._errors += 1
            return self._end(sequence, "error", "the model computed logits that are not finite numbers")
        first = not sequence.generated
        sequence.tokens.append(token)
        self._output_tokens += 1
        if first:
            self._prompt_tokens += len(sequence.request.tokens)
            self._cached_tokens += sequence.cached_tokens
        finish = sequence.finish_after(token, self._context)
        if finish is not None:
            self._end(sequence, finish)
        return Output(
            key=sequence.request.key,
            tokens=(token,),
            finish=finish,
            cached_tokens=sequence.cached_tokens if first else 0,
        )

    def _end(self, sequence: Sequence, finish: FinishReason, error: str = "") -> Output:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.key]
        return Output(key=sequence.request.key, finish=finish, error=error)

    @property
    def figures(self) -> WorkerFigures:
        return WorkerFigures(
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
        )

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


def _make_cache(config: LlamaConfig, spec: WorkerSpec, dtype: torch.dtype) -> KvCache:
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * spec.model.block_size
    blocks = spec.kv_bytes // block_bytes
    if blocks < 1:
        raise EngineError(
            f"{spec.kv_bytes} bytes for KV hold no block of {spec.model.block_size} tokens ({block_bytes})",
            remedy="give the worker more memory for KV",
            permanent=True,
        )
    return KvCache(
        layers=config.layers,
        blocks=blocks,
        block_size=spec.model.block_size,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in bfloat16 would not even add up to one."""
    return logits.float() if logits.dtype is torch.bfloat16 else logits


def _compute_dtype(wanted: str | None, kept: torch.dtype) -> torch.dtype:
    if wanted is not None:
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[wanted]
    return torch.float64 if kept == torch.float64 else torch.float32
