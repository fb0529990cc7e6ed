"""The reference's variables for KV tiers: how they are read, and that nothing else is taken for something."""

from __future__ import annotations

import pytest

from dynamo_box.errors import ExitCode, UsageError
from dynamo_box.profile.aliases import DISK_DIRECTORY, DISK_GB, HOST_GB, MIN_PRIORITY, with_aliases
from dynamo_box.profile.load import load_text
from dynamo_box.profile.schema import Profile

TIERED = """
model: smollm2
memory: {tiers: {host: 1GiB, disk: 4GiB, directory: /tiers}}
kv: {offload: {min_priority: 10, continue_after_filter: true}}
"""


def tiered(**environ: str) -> tuple[Profile, dict[str, str]]:
    return with_aliases(load_text(TIERED, "p", {}), environ)


def test_without_variables_the_profile_counts() -> None:
    profile, origins = tiered(DYN_KVBM_SOMETHING_ELSE="7")
    assert (profile, origins) == (load_text(TIERED, "p", {}), {})


def test_variables_go_before_the_profile_and_are_named_as_the_origin() -> None:
    profile, origins = tiered(
        DYN_KVBM_CPU_CACHE_GB="2",
        DYN_KVBM_DISK_CACHE_GB="0.5",
        DYN_KVBM_DISK_CACHE_DIR="/mnt/kv",
        DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY="40",
    )
    tiers = profile.memory.tiers
    assert (tiers.host, tiers.disk, tiers.directory) == (2_000_000_000, 500_000_000, "/mnt/kv")
    assert (profile.kv.offload.min_priority, profile.kv.offload.continue_after_filter) == (40, True)
    assert origins == {
        "memory.tiers.host": HOST_GB,
        "memory.tiers.disk": DISK_GB,
        "memory.tiers.directory": DISK_DIRECTORY,
        "kv.offload.min_priority": MIN_PRIORITY,
    }


@pytest.mark.parametrize(("text", "size"), [("0.001", 10**6), ("1e-3", 10**6), (".5", 5 * 10**8), ("16.", 16 * 10**9)])
def test_gigabytes_are_any_number(text: str, size: int) -> None:
    assert tiered(DYN_KVBM_CPU_CACHE_GB=text)[0].memory.tiers.host == size


@pytest.mark.parametrize(("text", "priority"), [("0", 0), ("100", 100), ("007", 7)])
def test_a_threshold_is_a_whole_number_up_to_100(text: str, priority: int) -> None:
    profile, _ = tiered(DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY=text)
    assert profile.kv.offload.min_priority == priority


BAD_PRIORITIES = ["", "101", "-1", "40.0", "1e1", " 40", "+4", "1_0", "high", "٣", "9" * 40]
BAD_SIZES = ["", "-1", "4GB", "nan", "inf", "1e99", "four", "1_0", "1,5", "0x10"]


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        *((MIN_PRIORITY, text) for text in BAD_PRIORITIES),
        *((name, text) for name in (HOST_GB, DISK_GB) for text in BAD_SIZES),
        (HOST_GB, "0.000001"),
        (DISK_DIRECTORY, ""),
        (DISK_DIRECTORY, "kv"),
        (DISK_DIRECTORY, "~nobody-has-this-name/kv"),
    ],
)
def test_anything_else_refuses_and_names_variable_value_and_remedy(variable: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        tiered(**{variable: text})
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.what.startswith(f'the environment variable {variable} is "{text}", but must be ')
    assert caught.value.remedy is not None and f"unset {variable}" in caught.value.remedy


def test_a_disk_tier_alone_is_refused_whoever_said_it() -> None:
    with pytest.raises(UsageError, match=r"DYN_KVBM_CPU_CACHE_GB is 0 and memory\.tiers\.disk is 4\.00 GiB: a disk"):
        tiered(DYN_KVBM_CPU_CACHE_GB="0")
    profile, _ = tiered(DYN_KVBM_CPU_CACHE_GB="0", DYN_KVBM_DISK_CACHE_GB="0")
    assert (profile.memory.tiers.host, profile.memory.tiers.disk) == (0, 0)
