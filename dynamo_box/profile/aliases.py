"""The reference's environment variables for KV tiers (`DYN_KVBM_…`), laid over a profile. They are read once, when a
box is planned, and go before what the profile says.

A value that can't be used refuses: where the reference takes 0 for it, offload would be off, or on, without a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from dynamo_box.errors import UsageError
from dynamo_box.profile.schema import Profile
from dynamo_box.profile.tiers import SMALLEST_HOST, absolute_directory
from dynamo_box.profile.units import LARGEST_SIZE, format_size
from dynamo_box.profile.wording import escaped
from dynamo_box.protocol.kv import HIGHEST_PRIORITY, LOWEST_PRIORITY

HOST_GB = "DYN_KVBM_CPU_CACHE_GB"
DISK_GB = "DYN_KVBM_DISK_CACHE_GB"
DISK_DIRECTORY = "DYN_KVBM_DISK_CACHE_DIR"
MIN_PRIORITY = "DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY"

GB = 1_000_000_000
"""As the reference counts."""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?")


def with_aliases(profile: Profile, environ: Mapping[str, str]) -> tuple[Profile, dict[str, str]]:
    """The profile as it counts here, and which variable gave which setting ("memory.tiers.host", …).

    Raises:
        UsageError: a variable holds what can't be used; it names variable, value and remedy.
    """
    found: dict[str, object] = {}
    origins: dict[str, str] = {}
    for key, (variable, read) in _ALIASES.items():
        if variable in environ:
            found[key] = read(variable, environ[variable])
            origins[key] = variable
    tiers = profile.memory.tiers.model_copy(update=_of(found, "memory.tiers."))
    offload = profile.kv.offload.model_copy(update=_of(found, "kv.offload."))
    if tiers.disk and not tiers.host:
        raise UsageError(
            f"{_said(origins, 'host', tiers.host)} and {_said(origins, 'disk', tiers.disk)}: "
            "a disk tier needs a host tier, since blocks pass through host memory",
            remedy=f"set {HOST_GB} above 0, or {DISK_GB}=0 for no tiers at all",
        )
    memory = profile.memory.model_copy(update={"tiers": tiers})
    kv = profile.kv.model_copy(update={"offload": offload})
    return (profile.model_copy(update={"memory": memory, "kv": kv}) if origins else profile), origins


def _of(found: Mapping[str, object], section: str) -> dict[str, object]:
    return {key.removeprefix(section): value for key, value in found.items() if key.startswith(section)}


def _said(origins: Mapping[str, str], tier: str, size: int) -> str:
    variable = origins.get(f"memory.tiers.{tier}")
    return f"{variable} is {size / GB:g}" if variable else f"memory.tiers.{tier} is {format_size(size)}"


def _gigabytes(variable: str, text: str) -> int:
    size = float(text) * GB if _NUMBER.fullmatch(text) else math.nan
    if not 0 <= size <= LARGEST_SIZE:
        raise _refusal(variable, text, "a number of GB (10⁹ bytes) from 0 to 1125899", "4")
    return int(size)


def _host_gigabytes(variable: str, text: str) -> int:
    size = _gigabytes(variable, text)
    if 0 < size < SMALLEST_HOST:
        raise _refusal(
            variable, text, f"0, or at least {SMALLEST_HOST} bytes, which a block with its header takes", "4"
        )
    return size


def _directory(variable: str, text: str) -> str:
    try:
        return absolute_directory(text)
    except ValueError:
        raise _refusal(variable, text, "the absolute path of a directory", "/var/cache/dynbox-kv") from None


def _priority(variable: str, text: str) -> int:
    priority = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
    if not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise _refusal(variable, text, f"a whole number from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}", "40")
    return priority


def _refusal(variable: str, text: str, wanted: str, example: str) -> UsageError:
    return UsageError(
        f'the environment variable {variable} is "{escaped(text)}", but must be {wanted}',
        remedy=f"export {variable}={example}, or unset {variable}: then the profile counts",
    )


_ALIASES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "memory.tiers.host": (HOST_GB, _host_gigabytes),
    "memory.tiers.disk": (DISK_GB, _gigabytes),
    "memory.tiers.directory": (DISK_DIRECTORY, _directory),
    "kv.offload.min_priority": (MIN_PRIORITY, _priority),
}
"""Setting → variable and how it is read."""
