"""Bytes, with the arithmetic that a person can check.

What one process takes beside weights and KV was measured as resident bytes on x86_64 and rounded up; for
engines that run on GPUs it is an estimate until they report their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dynamo_box.hardware import Hardware
from dynamo_box.plan.placement import CPU, Placed
from dynamo_box.plan.types import ByteItem
from dynamo_box.profile.catalogue import DTYPE_BYTES
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.units import format_size

HOST = "host"
MIB = 1 << 20
GIB = 1 << 30

GUARD_BYTES = 8 * MIB
ROUTER_BYTES = 64 * MIB
FRONTEND_BYTES = 128 * MIB
GMS_BYTES = 32 * MIB
KVSTORE_BYTES = 48 * MIB
BLOCK_ENTRY_BYTES = 512
MOCK_BYTES = 48 * MIB
TORCH_BYTES = 240 * MIB
GPU_OVERHEAD_BYTES = 3 * GIB
GPU_ENGINE_HOST_BYTES = 4 * GIB
CPU_KV_BYTES = 512 * MIB
MOCK_KV_BYTES = 4 * GIB
NATIVE_STEP_TOKENS = 2048
MOCK_KV_TOKEN_BYTES = 131_072
ACTIVATIONS_PER_TOKEN = 16  # hidden-sized rows alive at once in a Llama layer: residual, q, k, v, gate, up, …


@dataclass(frozen=True)
class Weights:
    """Two workers on one device with the same `key` share them: it names their layout. None for a copy of one's own."""

    per_device: int
    arithmetic: str
    key: str | None = None


@dataclass(frozen=True)
class WorkerMemory:
    """One worker's bytes on each of its devices, and `host` beside them.

    `kv` is None where what is left of the device decides; `kv_least` holds one sequence of full length. `dtype` is
    that of KV, where it is known.
    """

    worker: Placed
    weights: Weights | None
    overhead: int
    overhead_arithmetic: str
    host: int
    host_arithmetic: str
    block: int
    block_arithmetic: str
    kv: int | None
    kv_least: int
    kv_counts: bool = True
    dtype: str = ""
    whole_block_arithmetic: str = ""

    @property
    def whole_block(self) -> int:
        """Bytes of a block on all of its devices."""
        return self.block * max(1, len(self.worker.devices))

    @property
    def kv_default(self) -> int:
        """What KV gets on the cpu, or as a model of KV, if there is room."""
        usual = MOCK_KV_BYTES if self.worker.model.engine == "mock" else CPU_KV_BYTES
        return max(usual, self.kv_least)


def context_length(worker: Placed) -> int:
    """A context beyond the model's is refused for itself; what else stands against a plan is reckoned with
    the model's own, so that no advice names one it can't have. The mock engine only borrows the model.
    """
    asked, limit = worker.model.context_length, worker.facts.context_length
    if asked is None:
        return limit
    return asked if worker.model.engine == "mock" else min(asked, limit)


def worker_memory(worker: Placed, kv_per_worker: int | None) -> WorkerMemory:
    """What a worker needs; `kv_per_worker` is the profile's for models that don't say."""
    engine = worker.model.engine
    kv = worker.model.kv_memory or kv_per_worker
    sized = {"native": _native, "mock": _mock}.get(engine, _gpu_engine)(worker)
    span = len(worker.devices)
    blocks = -(-context_length(worker) // worker.model.block_size)
    return replace(sized, kv=None if kv is None else kv // span, kv_least=blocks * sized.block)


def gms_name(device: str) -> str:
    """The process that owns the weight memory of a device."""
    return f"gms@{device}"


def host_item(purpose: str, program: int, what: str) -> ByteItem:
    arithmetic = f"{what} {format_size(program)} + guard {format_size(GUARD_BYTES)}"
    return ByteItem(HOST, purpose, program + GUARD_BYTES, arithmetic)


def gpu_least_bytes(worker: WorkerMemory) -> int:
    """The least that one GPU must give this worker."""
    weights = worker.weights.per_device if worker.weights else 0
    return weights + worker.overhead + (worker.kv or worker.kv_least)


def items(memory: WorkerMemory, kv: int, shared_with: str | None) -> tuple[ByteItem, ...]:
    """The worker's bytes; `shared_with` names the worker whose weights on the same device are these."""
    found: list[ByteItem] = []
    blocks = kv // memory.block
    for device in memory.worker.devices:
        if memory.weights:
            size, arithmetic = memory.weights.per_device, memory.weights.arithmetic
            if shared_with:
                size, arithmetic = 0, f"the same layout as {shared_with}: counted there"
            found.append(ByteItem(device, "weights", size, arithmetic))
        if memory.kv_counts:
            text = f"{blocks} blocks × ({memory.block_arithmetic})"
            found.append(ByteItem(device, "KV", blocks * memory.block, text))
        if memory.overhead:
            found.append(ByteItem(device, "overhead", memory.overhead, memory.overhead_arithmetic))
    found.append(host_item("overhead", memory.host, memory.host_arithmetic))
    return tuple(found)


def sharer(memory: WorkerMemory, before: Iterable[WorkerMemory]) -> str | None:
    """Who already holds the same weights on the same devices."""
    key = memory.weights.key if memory.weights else None
    if key is None:
        return None
    for other in before:
        if other.weights and other.weights.key == key and other.worker.devices == memory.worker.devices:
            return other.worker.name
    return None


def device_memory(hardware: Hardware, device: str) -> int | None:
    if device in (CPU, HOST):
        return hardware.cpu.memory_total
    return next(gpu.memory_total for gpu in hardware.gpus if gpu.uuid == device)


def _native(worker: Placed) -> WorkerMemory:
    facts, model = worker.facts, worker.model
    kept = DTYPE_BYTES.get(facts.dtype, 4)
    dtype = str(model.options.get("dtype", "float64" if facts.dtype == "float64" else "float32"))
    item = DTYPE_BYTES.get(dtype, 4)
    parameters = facts.weights_bytes // kept
    stored = "" if dtype == facts.dtype else f" from {facts.dtype}"
    arithmetic = f"{parameters:,} × {item} B ({dtype}{stored}), shared through {gms_name(worker.device)}"
    weights = Weights(parameters * item, arithmetic, key=model.name)
    tokens = model.options.get("max_batch_tokens", NATIVE_STEP_TOKENS)
    tokens = tokens if isinstance(tokens, int) else NATIVE_STEP_TOKENS
    logits = 2 * model.max_batch * facts.vocab_size * 4
    activations = tokens * facts.hidden_size * ACTIVATIONS_PER_TOKEN * item
    arithmetic = (
        f"logits 2 × {model.max_batch} × {facts.vocab_size} × 4 B"
        f" + activations {tokens} tokens × {facts.hidden_size} × {ACTIVATIONS_PER_TOKEN} × {item} B"
    )
    block, block_arithmetic = _block(facts, model.block_size, item)
    return WorkerMemory(
        worker=worker,
        weights=weights,
        overhead=logits + activations,
        overhead_arithmetic=arithmetic,
        host=TORCH_BYTES,
        host_arithmetic="Python and torch",
        block=block,
        block_arithmetic=block_arithmetic,
        kv=None,
        kv_least=block,
        dtype=dtype,
        whole_block_arithmetic=block_arithmetic,
    )


def _mock(worker: Placed) -> WorkerMemory:
    """The mock's memory is a model: it counts on simulated devices, with the weights of the model that it stands in for
    where it is told of one.
    """
    span = len(worker.devices)
    weights = _mock_weights(worker) if worker.simulated else 0
    token = worker.model.options.get("kv_bytes_per_token", MOCK_KV_TOKEN_BYTES)
    token = token if isinstance(token, int) and token > 0 else MOCK_KV_TOKEN_BYTES
    return WorkerMemory(
        worker=worker,
        weights=Weights(-(-weights // span), f"{weights:,} B{_each(worker)}, modelled") if weights else None,
        overhead=GPU_OVERHEAD_BYTES if weights else 0,
        overhead_arithmetic="CUDA context, graphs and activations, modelled" if weights else "",
        host=MOCK_BYTES,
        host_arithmetic="Python, no weights: the mock engine computes nothing",
        block=-(-worker.model.block_size * token // span),
        block_arithmetic=f"{worker.model.block_size} tokens × {token} B{_each(worker)}, modelled",
        kv=None,
        kv_least=0,
        kv_counts=worker.simulated,
        whole_block_arithmetic=f"{worker.model.block_size} tokens × {token} B, modelled",
    )


def _mock_weights(worker: Placed) -> int:
    """Bytes; without a size two a parameter, as the engine has it."""
    for option, each in (("weights_bytes", 1), ("parameters", 2)):
        value = worker.model.options.get(option)
        if isinstance(value, int | float):
            return int(value * each)
    return 0


def _gpu_engine(worker: Placed) -> WorkerMemory:
    facts, span = worker.facts, max(1, len(worker.gpus))
    per_device = -(-facts.weights_bytes // span)
    each = _each(worker)
    block, arithmetic = _block(facts, worker.model.block_size, DTYPE_BYTES.get(facts.dtype, 2))
    return WorkerMemory(
        worker=worker,
        weights=Weights(per_device, f"{facts.weights_bytes:,} B ({facts.dtype}){each}"),
        overhead=GPU_OVERHEAD_BYTES,
        overhead_arithmetic="CUDA context, graphs and activations, estimated",
        host=GPU_ENGINE_HOST_BYTES * span,
        host_arithmetic=f"{worker.model.engine}, {span} × {format_size(GPU_ENGINE_HOST_BYTES)}, estimated:",
        block=-(-block // span),
        block_arithmetic=arithmetic + each,
        kv=None,
        kv_least=block,
    )


def _each(worker: Placed) -> str:
    return f" / {len(worker.gpus)} GPUs" if len(worker.gpus) > 1 else ""


def _block(facts: ModelFacts, block_size: int, item: int) -> tuple[int, str]:
    size = block_size * facts.layers * 2 * facts.kv_heads * facts.head_dim * item
    heads = f"{facts.kv_heads} heads × {facts.head_dim}"
    text = f"{block_size} tokens × {facts.layers} layers × 2 × {heads} × {item} B"
    return size, text
