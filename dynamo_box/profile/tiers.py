"""What a profile may say of the KV tiers: how much lies where (`memory.tiers`), and what goes in (`kv`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from dynamo_box.profile.units import format_size
from dynamo_box.profile.values import Impossible, Location, Section, Size
from dynamo_box.protocol.kv import HIGHEST_PRIORITY, LOWEST_PRIORITY, SLOT_ALIGNMENT
from dynamo_box.protocol.spec import DiskAdmission

SMALLEST_HOST = 2 * SLOT_ALIGNMENT
"""A block of the least size, and its header."""
MAX_QUEUE_BLOCKS = 1_000_000


def absolute_directory(value: str) -> str:
    """Without `~`.

    Raises:
        ValueError: it depends on where one stands.
    """
    path = Path(value)
    if value.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise ValueError(f'can\'t be "{value}": nobody has that home directory') from error
    if not path.is_absolute():
        raise ValueError(f'must be an absolute path, or begin with ~, not "{value}"')
    return str(path)


class SimulatedDisk(Section):
    """What the disk of a rehearsal does: one NVMe drive with PCIe 4.0 for servers, as Samsung announced its PM9A3 (U.2)
    in May 2020.
    """

    read_bytes_per_s: float = Field(default=6.5e9, gt=0, allow_inf_nan=False)
    write_bytes_per_s: float = Field(default=3.5e9, gt=0, allow_inf_nan=False)


class Tiers(Section):
    """KV tiers below the engine's own pool."""

    host: Size = Field(default=0, description="KV in shared host memory. 0: no tiers.")
    disk: Size = Field(default=0, description="KV in files, which outlive the box. 0: none.")
    directory: Annotated[str, AfterValidator(absolute_directory)] | None = Field(
        default=None, max_length=4096, description="Where the files lie. Default: `kv` in the box's cache directory."
    )
    simulated: SimulatedDisk = Field(
        default=SimulatedDisk(), description="The disk in a rehearsal, where nothing is written."
    )

    @model_validator(mode="after")
    def _possible(self) -> Tiers:
        problems: list[tuple[Location, str]] = []
        if self.disk and not self.host:
            text = "a disk tier needs a host tier: blocks pass through host memory; set memory.tiers.host"
            problems.append((("disk",), text))
        if 0 < self.host < SMALLEST_HOST:
            text = f"{self.host} B hold no block: the smallest takes {format_size(SMALLEST_HOST)} with its header"
            problems.append((("host",), text))
        if problems:
            raise Impossible(*problems)
        return self


class OffloadSettings(Section):
    """What workers give to the tiers."""

    min_priority: int = Field(
        default=LOWEST_PRIORITY,
        ge=LOWEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="Blocks of a lower priority are kept out, and so is what follows the first of them. 0: none.",
    )
    continue_after_filter: bool = Field(
        default=False, description="Go on after a block that was kept out: what is kept need be no whole prefix then."
    )
    queue_blocks: int = Field(
        default=4096, ge=1, le=MAX_QUEUE_BLOCKS, description="Blocks of a worker that may wait; more are dropped."
    )


class KvSettings(Section):
    """What goes into the KV tiers."""

    offload: OffloadSettings = Field(default=OffloadSettings(), description="What workers give to the tiers.")
    disk_admission: DiskAdmission = Field(
        default="always", description="What goes to disk: every block, or one that was found in host memory twice."
    )
