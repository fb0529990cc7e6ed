"""What the supervisor hands each child as the first message on its status socket. Frozen; made by the plan."""

from __future__ import annotations

from typing import Literal

import msgspec

DisaggPolicy = Literal["strict", "fallback", "conditional"]
DiskAdmission = Literal["always", "second_hit"]


class ModelSpec(msgspec.Struct, frozen=True):
    """A model as every process sees it.

    `path` is a Hugging Face directory in the store; `fingerprint` identifies its content (see the store manifest).
    """

    name: str
    path: str
    fingerprint: str
    context_length: int
    block_size: int


class Offload(msgspec.Struct, frozen=True):
    """What a worker gives to the KV tiers. A request's blocks with a priority below `min_priority` are kept out, and so
    is what follows the first of them, unless `continue_after_filter`; 0 keeps nothing out. At most `queue_blocks` wait
    to be copied; `pinned_blocks` may be held in the engine's pool for copies at once.
    """

    min_priority: int = 0
    continue_after_filter: bool = False
    queue_blocks: int = 4096
    pinned_blocks: int = 64
    sleep_deadline_s: float = 10.0
    """How long what is cached is offered to the tiers before the pool is given back."""


class WorkerSpec(msgspec.Struct, frozen=True, tag="worker"):
    """`options` are the engine's own, validated by the engine; `kv_bytes` is what the plan gives its KV pool."""

    name: str
    model: ModelSpec
    engine: str
    role: str
    run_dir: str
    threads: int
    device: str
    kv_bytes: int
    max_batch: int
    options: dict[str, bool | int | float | str] = {}
    gms: str = ""
    """The process that serves this worker's weight memory; its socket is `RunDir.worker_socket(gms)`. "" for none."""
    layout: str = ""
    """The name of its weights there."""
    kvstore: str = ""
    """The process that serves the KV tiers; its socket is `RunDir.worker_socket(kvstore)`. "" for none."""
    offload: Offload = Offload()

    @property
    def sleep_offload_s(self) -> float:
        """How much longer its sleep may take because the KV tiers get what is cached first."""
        return self.offload.sleep_deadline_s if self.kvstore else 0.0


class GmsSpec(msgspec.Struct, frozen=True, tag="gms"):
    """The weight memory of one device. `capacity_bytes` bounds what lies on the device, `host_capacity_bytes` what
    sleeps in host memory; `snapshots` is the directory for what sleeps on disk, and layouts beyond `layouts` are
    refused.
    """

    name: str
    run_dir: str
    device: str
    capacity_bytes: int
    host_capacity_bytes: int
    snapshots: str
    layouts: tuple[str, ...] = ()


class TierRehearsal(msgspec.Struct, frozen=True):
    """Tiers of blocks that count and have no bytes (`KvLayout.modelled`): host memory is not taken, and the disk is one
    that nobody writes to, with these rates. What is on it ends with the process.
    """

    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float


class KvStoreSpec(msgspec.Struct, frozen=True, tag="kvstore"):
    """The KV tiers of a box. `host_bytes` bounds all arenas together, `disk_bytes` the files below `directory`; 0 turns
    a tier off. `layouts` is the number of KV layouts that the plan's workers have: each gets an even part of
    `host_bytes`. `disk_admission`: every block, or one that was found a second time in host memory. At most
    `write_queue_blocks` wait for the disk. Workers connect to `RunDir.worker_socket(name)`, the router to
    `RunDir.worker_socket(name + EVENTS_SUFFIX)`.
    """

    name: str
    run_dir: str
    host_bytes: int
    disk_bytes: int = 0
    directory: str = ""
    layouts: int = 1
    disk_admission: DiskAdmission = "always"
    disk_threads: int = 4
    write_queue_blocks: int = 1024
    flush_s: float = 10.0
    """How long a Drain may go on writing to disk what waits."""
    rehearsal: TierRehearsal | None = None


EVENTS_SUFFIX = "-events"


class Disagg(msgspec.Struct, frozen=True):
    """When a request has its prompt computed on a prefill worker and goes on elsewhere.

    `strict`: always, and it fails where that can't be. `fallback`: always, and what can't be passed on is computed
    again. `conditional`: as fallback, but only prompts of which at least `min_uncached_tokens` and a share of
    `min_uncached_share` is cached for none that could take the whole request (in its pool or the box's tiers), and only
    on prefill workers that have at most `max_prefill_tokens` to compute.
    """

    policy: DisaggPolicy = "fallback"
    min_uncached_tokens: int = 2048
    min_uncached_share: float = 0.7
    max_prefill_tokens: int = 65_536


class RouterSpec(msgspec.Struct, frozen=True, tag="router"):
    """`mode` is kv, round-robin or random; knobs and defaults as in `dynamo_box.router.cost`."""

    name: str
    run_dir: str
    models: tuple[ModelSpec, ...]
    mode: str = "kv"
    overlap_weight: float = 1.0
    temperature: float = 0.0
    lease_ttl_s: float = 300.0
    seed: int | None = None
    kvstore: str = ""
    """The process whose blocks every worker can load; "" for none."""
    host_block_cost: float = 0.1
    disk_block_cost: float = 0.3
    """What loading a block from that tier costs, in blocks computed."""
    disagg: Disagg = Disagg()


class FrontendSpec(msgspec.Struct, frozen=True, tag="frontend"):
    """The frontend serves HTTP on the listening descriptor it inherits (`DYNBOX_LISTEN_FD`).

    `max_queue` requests may wait or run; one more gets a 503. `discovery_timeout_s` bounds the wait for a router or a
    worker when none is there. A request in which nothing moves for `stall_limit_s` is ended.
    """

    name: str
    run_dir: str
    models: tuple[ModelSpec, ...]
    host: str
    port: int
    max_queue: int = 1024
    max_body_bytes: int = 8 * 1024 * 1024
    discovery_timeout_s: float = 10.0
    stall_limit_s: float = 120.0
    max_waking: int = 256
    """Requests that may wait for a sleeping model, each model; one more gets a 503 with Retry-After."""
    wake_timeout_s: float = 120.0
    """How long one of them waits."""
    max_generation_s: float = 3600.0
    """The longest that a request may run, waiting included."""
    transfer_ttl_s: float = 30.0
    """How long the KV of a prompt is held for the worker that goes on."""
    simulated: bool = False
    """Its workers only act as if: nobody may take the box for a real one."""


ChildSpec = WorkerSpec | RouterSpec | FrontendSpec | GmsSpec | KvStoreSpec
