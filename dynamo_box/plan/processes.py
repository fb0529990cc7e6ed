"""The processes of a plan: programs, what they are told, environments, cores and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynamo_box.plan.cores import CoreShare
from dynamo_box.plan.memory import (
    FRONTEND_BYTES,
    GMS_BYTES,
    ROUTER_BYTES,
    WorkerMemory,
    gms_name,
    host_item,
    items,
    sharer,
)
from dynamo_box.plan.placement import CPU, Placed
from dynamo_box.plan.tiers import KVSTORE, TierPlan
from dynamo_box.plan.types import ProcessPlan
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.protocol.spec import Disagg, FrontendSpec, GmsSpec, ModelSpec, Offload, RouterSpec, WorkerSpec

if TYPE_CHECKING:
    from dynamo_box.profile.disagg import DisaggSettings
    from dynamo_box.profile.schema import FrontendSettings, RouterSettings, ServedModel

ROUTER = "router"
FRONTEND = "frontend"
GMS_DEADLINE_S = 30.0
ROUTER_DEADLINE_S = 30.0
FRONTEND_DEADLINE_S = 60.0
ENGINE_DEADLINES_S = {"native": 120.0, "mock": 60.0}
GPU_ENGINE_DEADLINE_S = 600.0
PAST_THE_CACHES = "glibc.cpu.x86_non_temporal_threshold=0x40000"
"""For the native engine, whose blocks of KV are copied by memcpy: from so many bytes on it doesn't read first what it
writes over. By itself it does so from some hundred MB on; a block of 700 kB takes 1.6 times as long then (measured on a
Xeon with 260 MB of cache). Elsewhere than on x86 it means nothing.
"""


def model_spec(model: ServedModel, facts: ModelFacts, *, simulated: bool) -> ModelSpec:
    """Models that are simulated may borrow the same files; their KV is nobody else's all the same."""
    fingerprint = f"{facts.fingerprint}/{model.name}" if simulated else facts.fingerprint
    return ModelSpec(
        name=model.name,
        path=facts.path or "",
        fingerprint=fingerprint,
        context_length=model.context_length or facts.context_length,
        block_size=model.block_size,
    )


def gms_process(
    device: str, layouts: tuple[str, ...], capacity: int, host_capacity: int, snapshots: str, run_dir: str
) -> ProcessPlan:
    """The weight memory of one device, for the models called `layouts`. Its workers wait for it by themselves."""
    name = gms_name(device)
    return ProcessPlan(
        name=name,
        kind="gms",
        program=("python", "-m", "dynamo_box.gms"),
        spec=GmsSpec(
            name=name,
            run_dir=run_dir,
            device=device,
            capacity_bytes=capacity,
            host_capacity_bytes=host_capacity,
            snapshots=snapshots,
            layouts=layouts,
        ),
        device=device,
        start_deadline_s=GMS_DEADLINE_S,
        memory=(host_item("overhead", GMS_BYTES, "Python and manifests"),),
    )


def router_process(
    settings: RouterSettings,
    disagg: DisaggSettings,
    models: tuple[ModelSpec, ...],
    tiers: TierPlan | None,
    run_dir: str,
) -> ProcessPlan:
    return ProcessPlan(
        name=ROUTER,
        kind="router",
        program=("python", "-m", "dynamo_box.router"),
        spec=RouterSpec(
            name=ROUTER,
            run_dir=run_dir,
            models=models,
            mode=settings.mode,
            overlap_weight=settings.overlap_weight,
            temperature=settings.temperature,
            lease_ttl_s=settings.lease_ttl,
            seed=settings.seed,
            kvstore=KVSTORE if tiers else "",
            disagg=Disagg(
                policy=disagg.policy,
                min_uncached_tokens=disagg.min_uncached_tokens,
                min_uncached_share=disagg.min_uncached_share,
                max_prefill_tokens=disagg.max_prefill_tokens,
            ),
        ),
        start_deadline_s=ROUTER_DEADLINE_S,
        memory=(host_item("overhead", ROUTER_BYTES, "Python, index and leases"),),
    )


def frontend_process(
    settings: FrontendSettings,
    disagg: DisaggSettings,
    models: tuple[ModelSpec, ...],
    run_dir: str,
    port: int | None,
    *,
    simulated: bool,
) -> ProcessPlan:
    return ProcessPlan(
        name=FRONTEND,
        kind="frontend",
        program=("python", "-m", "dynamo_box.frontend"),
        spec=FrontendSpec(
            name=FRONTEND,
            run_dir=run_dir,
            models=models,
            host=settings.host,
            port=settings.port if port is None else port,
            max_queue=settings.max_queue,
            max_body_bytes=settings.max_body,
            discovery_timeout_s=settings.discovery_timeout,
            max_waking=settings.max_waking,
            wake_timeout_s=settings.wake_timeout,
            max_generation_s=settings.max_generation,
            transfer_ttl_s=disagg.transfer_lease,
            simulated=simulated,
        ),
        start_deadline_s=FRONTEND_DEADLINE_S,
        memory=(host_item("overhead", FRONTEND_BYTES, "Python, HTTP and tokenizers"),),
    )


def worker_processes(
    memories: list[WorkerMemory],
    kv: Mapping[str, int],
    shares: Mapping[str, CoreShare],
    specs: Mapping[str, ModelSpec],
    tiers: TierPlan | None,
    run_dir: str,
) -> list[ProcessPlan]:
    return [
        _worker(
            memory,
            kv[memory.worker.name],
            shares.get(memory.worker.name, CoreShare(1)),
            sharer(memory, memories[:index]),
            specs[memory.worker.model.name],
            tiers if tiers and memory.worker.model.engine in tiers.engines else None,
            run_dir,
        )
        for index, memory in enumerate(memories)
    ]


def _worker(
    memory: WorkerMemory,
    kv: int,
    share: CoreShare,
    shared_with: str | None,
    model: ModelSpec,
    tiers: TierPlan | None,
    run_dir: str,
) -> ProcessPlan:
    worker = memory.worker
    engine = worker.model.engine
    startup = worker.model.options.get("startup_s", 0) if engine == "mock" else 0
    return ProcessPlan(
        name=worker.name,
        kind="worker",
        program=("python", "-m", f"engines.{engine}"),
        spec=WorkerSpec(
            name=worker.name,
            model=model,
            engine=engine,
            role=worker.role,
            run_dir=run_dir,
            threads=share.threads,
            device=worker.device,
            kv_bytes=kv * len(worker.devices),
            max_batch=worker.model.max_batch,
            options=_options(worker),
            gms=gms_name(worker.device) if uses_gms(worker) else "",
            layout=worker.model.name if uses_gms(worker) else "",
            kvstore=KVSTORE if tiers else "",
            offload=tiers.offload if tiers else Offload(),
        ),
        model=worker.model.name,
        role=worker.role,
        device=worker.device,
        env=_environment(worker, share.threads),
        cores=share.cores,
        threads=share.threads,
        start_deadline_s=ENGINE_DEADLINES_S.get(engine, GPU_ENGINE_DEADLINE_S)
        + (float(startup) if isinstance(startup, int | float) else 0.0),
        memory=items(memory, kv, shared_with),
    )


def _options(worker: Placed) -> dict[str, bool | int | float | str]:
    """A mock engine that reckons with a model's size also has to know over how many GPUs it is spread."""
    options = dict(worker.model.options)
    if worker.model.engine == "mock" and "parameters" in options:
        options.setdefault("tensor_parallel", len(worker.devices))
    return options


def _environment(worker: Placed, threads: int) -> dict[str, str]:
    """A worker sees its own GPUs only, a cpu worker none; idle threads sleep, so that they don't slow the
    others.
    """
    copies = {"GLIBC_TUNABLES": PAST_THE_CACHES} if worker.model.engine == "native" else {}
    visible = ",".join(gpu.uuid for gpu in worker.gpus if not gpu.simulated)
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": visible,
        **copies,
    }


def computes_on_cpu(worker: Placed) -> bool:
    """Whether it needs cores of its own; the mock engine hardly computes."""
    return worker.devices == (CPU,) and worker.model.engine != "mock"


def uses_gms(worker: Placed) -> bool:
    """Whether its weights are shared, and can sleep."""
    return worker.devices == (CPU,) and worker.model.engine == "native"
