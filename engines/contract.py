"""The whole interface between an engine and the box.

An engine is a class with this shape; `engines/host.py` is the shell that gives it sockets, events, readiness, drain
and cancellation, the same for every engine. Everything here runs on the worker's event loop; an engine that computes
does so in a thread of its own and comes back with `loop.call_soon_threadsafe`, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.request import FinishReason, Leg, PriorityRange, Sampling, Transfer
from dynamo_box.protocol.spec import WorkerSpec

KV_EVENTS = "kv_events"
PRIORITIES = "priorities"
KV_TIERS = "kv_tiers"
"""The engine stores blocks in the box's KV tiers and loads them from there."""
DISAGG = "disagg"
"""The engine serves prefill and decode legs (`SequenceRequest.leg`)."""
LATE_CANCEL = "late_cancel"
"""A decode leg must not be cancelled before its first token: KV may still be arriving in its blocks, and an engine that
is told to let go of them hangs, or loses them. The shell keeps a Cancel back until then.
"""
SLEEP = "sleep"
"""The engine is a `Sleeper`."""


class EngineError(Exception):
    """The engine can't serve. `permanent`: starting it again would fail in the same way."""

    def __init__(self, cause: str, *, remedy: str = "", permanent: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.permanent = permanent


class RequestRejected(Exception):
    """The request itself can't be served (too long for the context, say); the worker is fine."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What a started engine says of itself. `kv_dtype` goes into the block hash, e.g. "float32"."""

    block_size: int
    kv_blocks_total: int
    kv_dtype: str
    context_length: int
    capabilities: tuple[str, ...] = ()
    versions: dict[str, str] = {}


class SequenceRequest(msgspec.Struct, frozen=True):
    """One request as the engine sees it. `key` is chosen by the shell and unique in the life of the worker."""

    key: int
    request_id: str
    tokens: list[int]
    sampling: Sampling
    isolation: bytes
    priority: int = 0
    annotations: tuple[str, ...] = ()
    kv_priority: int | None = None
    kv_priorities: tuple[PriorityRange, ...] = ()
    leg: Leg = "whole"
    transfer: Transfer | None = None
    transfer_ttl_s: float = 30.0
    must_transfer: bool = False


class Output(msgspec.Struct):
    """What one step added to one sequence; `finish` ends it. Fields as in `protocol.request.Delta`."""

    key: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0
    error: str = ""
    transfer: Transfer | None = None


class StoredBlocks(msgspec.Struct, frozen=True):
    """Consecutive blocks of one chain that can now be reused; digests of 16 bytes, `parent` b"" at the start."""

    digests: tuple[bytes, ...]
    parent: bytes


class RemovedBlocks(msgspec.Struct, frozen=True):
    digests: tuple[bytes, ...]


class ClearedBlocks(msgspec.Struct, frozen=True):
    pass


BlockEvent = StoredBlocks | RemovedBlocks | ClearedBlocks


class Sink(Protocol):
    """Where an engine's results go. Called on the event loop, in the order in which things happened."""

    def step(self, outputs: Sequence[Output], events: Sequence[BlockEvent] = ()) -> None:
        """One engine step: events first reach the router, then the tokens the client."""

    def fatal(self, cause: str) -> None:
        """The engine is broken; the shell fails what runs and ends the process, so that the supervisor restarts it."""


ReportProgress = Callable[[str, "int | None", "int | None", str], None]
"""(phase, done, total, unit), as in `protocol.status.Starting`; may be called from any thread."""


class Engine(Protocol):
    """What an adapter implements."""

    async def start(self, spec: WorkerSpec, sink: Sink, progress: ReportProgress) -> EngineInfo:
        """Load the model and warm up: on return the first request is as fast as the hundredth.

        Raises:
            EngineError: it can't.
        """

    def submit(self, sequence: SequenceRequest) -> None:
        """Take a sequence; its outputs arrive at the sink, the last one with `finish`.

        Raises:
            RequestRejected: the request can't be served.
        """

    def cancel(self, key: int) -> None:
        """End a sequence soon, with finish "cancelled". Keys that have ended are ignored."""

    def cached_blocks(self) -> list[bytes]:
        """Digests of all blocks that could be reused now, as the events told so far add up to."""

    def figures(self) -> WorkerFigures:
        """Cheap: called four times a second."""

    def set_option(self, key: str, value: str) -> str:
        """Change a setting at run time and say what it is now.

        Raises:
            ValueError: no such key, or no such value.
        """

    async def close(self) -> None:
        """Release everything; the process exits next."""


@runtime_checkable
class HandsOver(Protocol):
    """An engine whose prefill legs leave something held until it is claimed."""

    def give_up(self, key: bytes) -> None:
        """Nobody will claim the transfer of this key, whichever worker made it: let go of what it holds. One who is
        loading it just now may finish. Keys that are held no more are ignored.
        """


class SleepReport(msgspec.Struct, frozen=True):
    """What was given back: resident bytes of the KV pool, and mapped bytes of weights. `phases` are seconds."""

    kv_bytes: int
    weights_bytes: int
    phases: dict[str, float] = {}


class WakeReport(msgspec.Struct, frozen=True):
    """Seconds by phase, in order: attach, remap, populate, kv."""

    phases: dict[str, float]


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give back its memory and take it again, with the process alive."""

    async def sleep(self) -> SleepReport:
        """Give back the KV pool (its cache is told as cleared) and unmap the weights. Nothing is in flight, and
        nothing comes until `wake`.

        Raises:
            EngineError: it can't; it serves on as before, unless that is `permanent`.
        """

    async def wake(self, deadline_s: float) -> WakeReport:
        """Be as after `start`: the same weights at the same addresses, an empty cache.

        Raises:
            EngineError: it can't now and is still asleep, or, if `permanent`, must be started anew (the weights have
                changed meanwhile, say).
        """
