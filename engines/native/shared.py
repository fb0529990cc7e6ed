"""The model's tensors in the memory of a GPU Memory Service: written by whoever comes first, mapped by all."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from dynamo_box.gms.client import GmsFailure, MappedTensor, StaleLayout, TensorSpec, Weights
from dynamo_box.paths import RunDir
from dynamo_box.protocol.gms import Queued
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError, ReportProgress
from engines.log import get_logger
from engines.native.config import LlamaConfig
from engines.native.tensors import Planned, tensor_plan
from engines.native.weights import Checkpoint

LAYOUT_VERSION = 1
"""Of what `tensor_plan` makes of a checkpoint: a layout of another version is not mapped but replaced."""
OPEN_DEADLINE_S = 600.0

log = get_logger()


class SharedWeights:
    """Raises EngineError from each of its methods when the service can't help."""

    def __init__(self, spec: WorkerSpec, config: LlamaConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._model = Path(spec.model.path)
        self._plan = tensor_plan(config)
        self._weights = Weights(
            RunDir(Path(spec.run_dir)).worker_socket(spec.gms),
            spec.layout,
            owner=spec.name,
            content=f"{spec.model.fingerprint}/{_word(dtype)}/{LAYOUT_VERSION}",
        )

    def open(self, progress: ReportProgress) -> dict[str, torch.Tensor]:
        """Map the tensors, having written them if nobody had."""

        began = time.monotonic()

        def waiting(queued: Queued) -> None:
            seconds = round(time.monotonic() - began)  # grows, so that this counts as progress of the start
            progress(f"waiting for weights: {queued.holder}", seconds, None, "s")

        try:
            opened = self._weights.open(
                lambda: [self._spec_of(one) for one in self._plan],
                lambda views: self._fill(views, progress),
                timeout_s=OPEN_DEADLINE_S,
                waiting=waiting,
                make_room=True,  # an epoch of other content that nobody reads is of no use to anybody
            )
            log.info("weights", wrote=opened.wrote, bytes=opened.bytes, phases=opened.phases)
            return self._bind(self._weights.tensors())
        except GmsFailure as error:
            raise EngineError(f"no weights from the memory service: {error}") from error

    def unmap(self) -> int:
        """Bytes that are unmapped; the tensors' addresses stay theirs, and must not be touched until `remap`."""
        try:
            return self._weights.unmap()
        except GmsFailure as error:
            raise EngineError(f"weights can't be unmapped: {error}") from error

    def remap(self, deadline_s: float) -> dict[str, float]:
        """Seconds by phase."""
        try:
            return self._weights.remap(timeout_s=deadline_s)
        except StaleLayout as error:
            raise EngineError(f"the weights changed meanwhile: {error}", permanent=True) from error
        except GmsFailure as error:
            raise EngineError(f"weights can't be mapped: {error}") from error

    def close(self) -> None:
        self._weights.close()

    def _spec_of(self, planned: Planned) -> TensorSpec:
        shape = planned.shape
        count = torch.Size(shape).numel()
        stride = tuple(torch.empty(shape, device="meta").stride())
        return TensorSpec(planned.name, _word(self._dtype), shape, stride, count * self._dtype.itemsize)

    def _fill(self, views: Mapping[str, memoryview], progress: ReportProgress) -> None:
        total = sum(view.nbytes for view in views.values())
        done = 0
        progress("weights", 0, total, "bytes")
        checkpoint = Checkpoint(self._model)
        try:
            for planned in self._plan:
                self._copy(checkpoint, planned, views[planned.name])
                done += views[planned.name].nbytes
                progress("weights", done, total, "bytes")
        finally:
            checkpoint.close()

    def _copy(self, checkpoint: Checkpoint, planned: Planned, view: memoryview) -> None:
        whole = torch.frombuffer(view, dtype=self._dtype).view(planned.shape)
        row = 0
        for name, shape in planned.sources:
            whole[row : row + shape[0]].copy_(checkpoint.source(name, shape))
            row += shape[0]

    def _bind(self, mapped: Mapping[str, MappedTensor]) -> dict[str, torch.Tensor]:
        wanted = {one.name for one in self._plan}
        if wanted != set(mapped):
            odd = sorted(wanted ^ set(mapped))
            raise EngineError(f"the layout and the model disagree about {', '.join(odd[:5])}", permanent=True)
        return {one.name: self._tensor(one, mapped[one.name]) for one in self._plan}

    def _tensor(self, planned: Planned, mapped: MappedTensor) -> torch.Tensor:
        if (mapped.dtype, tuple(mapped.shape)) != (_word(self._dtype), planned.shape):
            raise EngineError(f"{planned.name} is {mapped.dtype} {list(mapped.shape)} in the layout", permanent=True)
        memory = (ctypes.c_char * mapped.nbytes).from_address(mapped.address)
        return torch.frombuffer(memory, dtype=self._dtype).view(planned.shape)


def private_weights(
    model: Path, config: LlamaConfig, dtype: torch.dtype, progress: ReportProgress
) -> dict[str, torch.Tensor]:
    """The tensors without a service: views of the file where it has them in this dtype, else copies."""
    checkpoint = Checkpoint(model)
    checkpoint.page_in(progress)
    return {
        one.name: checkpoint.stacked([name for name, _ in one.sources], [shape for _, shape in one.sources], dtype)
        for one in tensor_plan(config)
    }


def kept_dtype(model: Path) -> torch.dtype:
    """What the checkpoint is kept in."""
    checkpoint = Checkpoint(model)
    try:
        return checkpoint.dtype
    finally:
        checkpoint.close()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
