"""The ways in which a profile may be laid out on this hardware, and what to say when none of them fits. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynamo_box.hardware import Hardware
from dynamo_box.profile.units import format_size

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile, ServedModel


@dataclass(frozen=True)
class Layout:
    """`profile` says all there is to plan; `name` is that of its topology, "" for a profile without any."""

    name: str
    profile: Profile
    gpu_memory: int = 0

    def too_small(self, hardware: Hardware) -> list[str]:
        """GPUs that are there and aren't meant for this."""
        small = [gpu for gpu in hardware.gpus if (gpu.memory_total or 0) < self.gpu_memory]
        if not small:
            return []
        largest = format_size(max(gpu.memory_total or 0 for gpu in small))
        whose = "they have" if len(small) == len(hardware.gpus) else f"{len(small)} of them have at most"
        return [f"for GPUs with at least {format_size(self.gpu_memory)}; {whose} {largest}"]


def layouts(profile: Profile) -> Iterator[Layout]:
    """In the order in which they are to be tried."""
    for topology in profile.topologies:
        model = _as_planned(topology.of(_the_model(profile)), profile)
        changes = {"model": model, "topologies": ()}
        yield Layout(topology.name, profile.model_copy(update=changes), topology.gpu_memory or 0)
    if not profile.topologies:
        changes = {"models": tuple(_as_planned(model, profile) for model in profile.models)}
        if profile.model:
            changes = {"model": _as_planned(profile.model, profile)}
        yield Layout("", profile.model_copy(update=changes))


def reasons_of(tried: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    """Reasons against each topology, headed by its name; those against all of them once, at the end."""
    if len(tried) == 1:
        return tuple(tried[0][1])
    common = [reason for reason in tried[0][1] if all(reason in reasons for _, reasons in tried)]
    own = [f"{name}: {reason}" for name, reasons in tried for reason in reasons if reason not in common]
    return (*own, *common)


def passed_over(tried: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A line for each topology that didn't fit."""
    return tuple(f"{name}: {_first(reasons)}" for name, reasons in tried.items())


def _first(reasons: Sequence[str]) -> str:
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}"


def _the_model(profile: Profile) -> ServedModel:
    assert profile.model is not None, "loading refuses topologies without it"
    return profile.model


def _as_planned(model: ServedModel, profile: Profile) -> ServedModel:
    """On simulated hardware the mock engine is told what it stands in for."""
    if profile.simulate is None or not model.simulated:
        return model
    return model.model_copy(update={"options": {**model.options, **model.simulated}})
