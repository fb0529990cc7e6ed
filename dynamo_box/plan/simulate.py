"""A profile rehearsed on hardware that isn't there (`--simulate gpu=8x80GiB`): the GPUs are simulated, and mock engines
take the time and the memory that its models would. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynamo_box.errors import UsageError
from dynamo_box.profile.catalogue import CATALOGUE, DTYPE_BYTES, facts_for
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.units import format_size, parse_size

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile, ServedModel, SimulatedDevices, Workers

EXAMPLE = "gpu=8x80GiB"
MAX_GPUS = 256
TOKENIZER_OF = "smollm2"
"""Whose tokenizer a model borrows that nobody wants to fetch for a rehearsal."""
BF16_FLOPS_PER_S = 989.5e12
"""Of a dense H100 or H200, half of what the mock engine takes for granted (FP8): NVIDIA's data sheet."""
HALF_PRECISION = frozenset({"bfloat16", "float16"})


def simulated_devices(texts: Sequence[str]) -> tuple[SimulatedDevices, ...]:
    """What `--simulate` asks for: `gpu=NxSIZE`, more than one with commas between or said again.

    Raises:
        UsageError: it can't be understood.
    """
    from dynamo_box.profile.schema import SimulatedDevices

    found = []
    for text in (part.strip() for each in texts for part in each.split(",")):
        match = re.fullmatch(r"gpu=(\d{1,6})[x×](.+)", text)
        try:
            if match is None:
                raise ValueError(f"must be like {EXAMPLE}")
            count, memory = int(match[1]), parse_size(match[2].strip())
            if not 1 <= count <= MAX_GPUS or not memory:
                raise ValueError(f"must have 1 to {MAX_GPUS} GPUs with memory")
        except ValueError as error:
            raise UsageError(f"--simulate {text!r}: {error}", remedy=f"for example --simulate {EXAMPLE}") from error
        found.append(SimulatedDevices(name=f"{format_size(memory)} GPU", count=count, memory=memory))
    return tuple(found)


def simulated(profile: Profile, devices: tuple[SimulatedDevices, ...], stored: Mapping[str, ModelFacts]) -> Profile:
    """`profile` with mock engines on these GPUs. `stored` are the store's models by name: what lies there is used for
    its tokenizer, other models of the catalogue borrow one.
    """
    from dynamo_box.profile.schema import Simulate

    changes: dict[str, object] = {
        "simulate": Simulate(devices=devices),
        "topologies": tuple(
            topology.model_copy(update={"workers": _on_gpus(topology.workers)}) for topology in profile.topologies
        ),
    }
    if profile.model:
        changes["model"] = _simulated(profile.model, stored)
    else:
        changes["models"] = tuple(_simulated(model, stored) for model in profile.models)
    return profile.model_copy(update=changes)


def _simulated(model: ServedModel, stored: Mapping[str, ModelFacts]) -> ServedModel:
    facts = facts_for(model.origin, stored)
    borrows = facts is not None and facts.path is None and facts.name in CATALOGUE
    changes: dict[str, object] = {"engine": "mock", "workers": _on_gpus(model.workers)}
    if model.engine == "mock":
        return model.model_copy(update=changes)
    changes["options"] = {}
    changes["simulated"] = {**(_timing(facts) if facts else {}), **model.simulated}
    if facts and borrows:
        changes["source"] = TOKENIZER_OF
        changes["context_length"] = model.context_length or facts.context_length
    return model.model_copy(update=changes)


def _timing(facts: ModelFacts) -> dict[str, bool | int | float | str]:
    """The mock engine's options for a model of this size, on GPUs as the mock engine has them where nothing is said."""
    item = DTYPE_BYTES.get(facts.dtype, 2)
    timing: dict[str, bool | int | float | str] = {
        "parameters": float(facts.weights_bytes // item),
        "weights_bytes": float(facts.weights_bytes),
        "width": facts.layers * facts.hidden_size,
        "kv_bytes_per_token": facts.layers * 2 * facts.kv_heads * facts.head_dim * item,
    }
    if facts.dtype in HALF_PRECISION:
        timing["flops_per_s"] = BF16_FLOPS_PER_S
    return timing


def _on_gpus(workers: Workers) -> Workers:
    """Workers of the cpu get a GPU each."""
    roles = {
        role: each.model_copy(update={"devices": None}) for role, each in workers.roles if each.devices in (None, "cpu")
    }
    return workers.model_copy(update=roles)
