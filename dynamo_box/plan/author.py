"""A profile written for this machine: `dynbox profile new MODEL`, and `dynbox up --model MODEL`.

The longest context that fits is taken, by trying: what is written has been planned, so it is never refused
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product

from dynamo_box.errors import PlanRefused, UsageError
from dynamo_box.hardware import Hardware
from dynamo_box.plan.make import make_plan
from dynamo_box.profile.catalogue import CATALOGUE, facts_for
from dynamo_box.profile.directories import shipped_directory
from dynamo_box.profile.facts import ModelFacts
from dynamo_box.profile.load import load_text
from dynamo_box.profile.schema import Profile
from dynamo_box.profile.wording import nearest

LONGEST_CONTEXT = 32_768
SHORTEST_CONTEXT = 512
DEFAULT_PORT = 8000
MIB = 1 << 20
HOST_TIERS = (1024 * MIB, 512 * MIB, 256 * MIB)
HOST_TIER_SHARE = 8
"""A host tier of KV may take one part in so many of the memory that is free."""

TIERS = """
memory:
  tiers: # of KV, below the worker's own pool: see `dynbox help kv`
    host: {host}
    disk: {disk}
"""


def write_profile(
    model: str,
    hardware: Hardware,
    facts: Mapping[str, ModelFacts],
    *,
    name: str | None = None,
    port: int = DEFAULT_PORT,
) -> str:
    """The text of a profile that serves `model` (a name of the catalogue or the store, or a source) on this
    machine.

    `name` is what clients ask for; by default the model's own.

    Raises:
        UsageError: nothing is known of the model, so that nothing can be planned.
        PlanRefused: it doesn't fit, not even with a short context.
    """
    return _fitting(model, hardware, facts, name, port)[0]


def profile_for_model(
    model: str, hardware: Hardware, facts: Mapping[str, ModelFacts], *, port: int = DEFAULT_PORT
) -> Profile:
    """The same, loaded; the profile is called after the model.

    Raises:
        UsageError, PlanRefused: as `write_profile`.
    """
    return _fitting(model, hardware, facts, None, port)[1]


def _fitting(
    model: str, hardware: Hardware, facts: Mapping[str, ModelFacts], name: str | None, port: int
) -> tuple[str, Profile]:
    found = facts_for(model, facts)
    if found is None:
        known = sorted({*CATALOGUE, *facts})
        raise UsageError(
            f"nothing is known of model {model!r} yet; {nearest(model, known)}",
            remedy=f"run `dynbox pull {model}` first",
        )
    served = name or _served_name(found.name)
    details: tuple[str, ...] = ()
    shapes = product(_contexts(found.context_length), _host_tiers(hardware))
    for context, host_tier in shapes:
        text = _text(model, served, found, hardware, context, host_tier, port)
        profile = load_text(text, served, {})
        try:
            make_plan(profile, hardware, facts, run_dir="")
        except PlanRefused as error:
            details = error.details
            continue
        return text, profile
    raise PlanRefused(
        f"this machine can't carry {model}", remedy="see `dynbox models` for smaller ones", details=details
    )


def _contexts(longest: int) -> Iterator[int]:
    context = min(longest, LONGEST_CONTEXT)
    yield context
    while context > SHORTEST_CONTEXT:
        context = max(SHORTEST_CONTEXT, context // 2)
        yield context


def _host_tiers(hardware: Hardware) -> list[int]:
    """Bytes of the host tier, the largest first; the last is none, since a context is worth more than that."""
    most = (hardware.cpu.memory_available or hardware.cpu.memory_total or 0) // HOST_TIER_SHARE
    return [*(size for size in HOST_TIERS if size <= most), 0]


def _served_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:64] or "model"


def _text(
    model: str, served: str, facts: ModelFacts, hardware: Hardware, context: int, host_tier: int, port: int
) -> str:
    source = "" if served == model else f"  source: {_quoted(model)}\n"
    tiers = TIERS.format(host=f"{host_tier // MIB}MiB", disk=f"{4 * host_tier // MIB}MiB") if host_tier else ""
    return f"""\
# yaml-language-server: $schema={shipped_directory() / "schema.json"}
description: {_quoted(f"{facts.name} on the CPU, one worker.")}

model:
  name: {_quoted(served)}
{source}  engine: native # on the {len(hardware.cpu.cores)} cores of this machine
  block_size: 16 # tokens in a KV block
  max_batch: 32 # sequences at once
  context_length: {context} # the model can take {facts.context_length}
  workers: 1 # more share the weights, but also the cores
{tiers}
frontend:
  port: {port}
"""


def _quoted(text: str) -> str:
    """As YAML text that is taken as it stands; `$` is the profile's own sign."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return '"' + "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in escaped) + '"'
