"""What to think of what NVML says. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from dynamo_box import wording
from dynamo_box.doctor.finding import Finding, failed, passed, skipped, warned
from dynamo_box.hardware import Gpu

UNSEEN_BYTES = 1 << 30
"""In use beyond what processes are known to hold; less is the driver's own."""

_SHOWN_USERS = 4
_PEER_OK = 0
_EXCLUSIVE = {1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_PATHS = {0: "one board", 10: "one PCIe switch", 20: "PCIe switches", 30: "one host bridge", 40: "one NUMA node"}
"""By NVML's level of the closest common ancestor; beyond them is the link between sockets."""


class GpuUser(msgspec.Struct, frozen=True):
    """A process with memory on a GPU; `bytes` and `name` are None where they can't be read, `uid` for one that isn't to
    be seen from here: it lives in another pid namespace.
    """

    pid: int
    bytes: int | None = None
    name: str | None = None
    uid: int | None = None
    is_box: bool = False


class GpuState(msgspec.Struct, frozen=True):
    """`compute_mode` is NVML's number. `users` is None where the driver doesn't list them."""

    index: int
    mig: bool | None = None
    compute_mode: int | None = None
    lanes: int | None = None
    lanes_possible: int | None = None
    used_bytes: int | None = None
    users: tuple[GpuUser, ...] | None = None


class Pair(msgspec.Struct, frozen=True):
    """Two GPUs: NVML's status of reading from one another's memory, and the level of their common ancestor."""

    first: int
    second: int
    peer_read: int | None = None
    ancestor: int | None = None


def judge_nvml(gpus: Sequence[Gpu], problem: str) -> Finding:
    kinds = Counter(gpu.name or "unnamed GPU" for gpu in gpus)
    seen = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in kinds.items())
    if not problem and gpus:
        return passed("nvml", seen)
    mismatch = "version mismatch" in problem.lower()
    return failed(
        "nvml",
        f"{problem or 'no GPU'}{f'; it shows {seen}' if seen else ''}",
        "a GPU that NVML can't read can't be planned for",
        "sudo reboot" if mismatch or gpus else "nvidia-smi",
    )


def judge_modes(states: Sequence[GpuState]) -> list[Finding]:
    """Modes in which a GPU can't be shared by the processes of a box."""
    findings = []
    if split := [state.index for state in states if state.mig]:
        findings.append(
            failed(
                "mig",
                f"{_named(split)} split into MIG instances",
                "the box runs on whole GPUs",
                f"sudo nvidia-smi -i {_list(split)} -mig 0",
            )
        )
    modes = {state.index: _EXCLUSIVE[state.compute_mode] for state in states if state.compute_mode in _EXCLUSIVE}
    if modes:
        findings.append(
            failed(
                "compute mode",
                f"{_named(list(modes))} in mode {', '.join(sorted(set(modes.values())))}",
                "several processes of a box share a GPU",
                f"sudo nvidia-smi -i {_list(list(modes))} -c DEFAULT",
            )
        )
    return findings or [passed("modes", "no MIG, no exclusive mode")]


def judge_links(gpus: Sequence[Gpu], states: Sequence[GpuState], pairs: Sequence[Pair]) -> list[Finding]:
    findings = []
    narrow = [each for each in states if each.lanes and each.lanes_possible and each.lanes < each.lanes_possible]
    if narrow:
        listed = ", ".join(f"GPU {each.index} ×{each.lanes} of ×{each.lanes_possible}" for each in narrow)
        why = "copies between host and GPU are slower; the card may sit badly, or in a slot of fewer lanes"
        findings.append(warned("pcie", listed, why, f"nvidia-smi -q -i {_list([each.index for each in narrow])}"))
    refused = [pair for pair in pairs if pair.peer_read not in (None, _PEER_OK)]
    if refused:
        listed = ", ".join(f"{pair.first}-{pair.second}" for pair in refused)
        findings.append(
            warned(
                "links",
                f"{_topology(gpus, pairs)}; no peer access between {listed}",
                "what these exchange goes through host memory; an IOMMU or PCIe access control often is the cause",
                "nvidia-smi topo -p2p r",
            )
        )
    elif len(gpus) > 1:
        findings.append(passed("links", _topology(gpus, pairs)))
    return findings


def judge_users(states: Sequence[GpuState], uid: int) -> Finding:
    """Memory that others hold; `uid` is this user's."""
    name = "gpu users"
    if all(state.users is None for state in states):
        return skipped(name, "the driver doesn't list who uses the GPUs")
    foreign = {user.pid: user for state in states for user in state.users or () if not user.is_box}
    unseen = {state.index: held for state in states if (held := _unseen(state)) is not None and held > UNSEEN_BYTES}
    if not foreign and not unseen:
        return passed(name, "nobody but the box")
    parts = [
        f"{user.name or '?'} (pid {user.pid}) on GPU {_list(_held_by(user.pid, states))}, "
        f"{wording.size(_held_bytes(user.pid, states))}"
        for user in list(foreign.values())[:_SHOWN_USERS]
    ]
    if len(foreign) > _SHOWN_USERS:
        parts.append(f"{len(foreign) - _SHOWN_USERS} more")
    parts += [f"{wording.size(held)} on GPU {index} of processes not seen from here" for index, held in unseen.items()]
    command = ""
    if seen := [user for user in foreign.values() if user.uid is not None]:
        sudo = "" if all(user.uid == uid for user in seen) else "sudo "
        command = f"{sudo}kill {' '.join(str(user.pid) for user in seen)}"
    return warned(name, "; ".join(parts), "their memory is missing from the box's plan", command)


def _unseen(state: GpuState) -> int | None:
    """Memory in use that no listed process holds; None where that can't be told."""
    if state.users is None or state.used_bytes is None or any(user.bytes is None for user in state.users):
        return None
    return state.used_bytes - sum(user.bytes or 0 for user in state.users)


def _held_by(pid: int, states: Sequence[GpuState]) -> list[int]:
    return [state.index for state in states if any(user.pid == pid for user in state.users or ())]


def _held_bytes(pid: int, states: Sequence[GpuState]) -> int | None:
    sizes = [user.bytes for state in states for user in state.users or () if user.pid == pid]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _topology(gpus: Sequence[Gpu], pairs: Sequence[Pair]) -> str:
    linked = sum(len(gpu.links or ()) for gpu in gpus) // 2
    if linked:
        return f"NVLink joins {linked} of {len(pairs)} pairs"
    ways = Counter(_PATHS.get(pair.ancestor, "the link between sockets") for pair in pairs if pair.ancestor is not None)
    if not ways:
        return f"{len(gpus)} GPUs without NVLink"
    return "no NVLink; pairs meet at " + ", ".join(f"{way} ({count})" for way, count in ways.items())


def _named(indexes: Sequence[int]) -> str:
    return f"GPU {indexes[0]} is" if len(indexes) == 1 else f"GPUs {_list(indexes)} are"


def _list(indexes: Sequence[int]) -> str:
    return ",".join(map(str, indexes))
