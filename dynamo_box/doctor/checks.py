"""The checks, in the order in which they are shown."""

from __future__ import annotations

from functools import partial

from dynamo_box.doctor import box, disk, driver, gpus, interpreter, leftovers, limits, memory, models, service
from dynamo_box.doctor.examine import Check, Patience

DEEP_SILENCE_S = 20.0
"""Of a check that reads models whole: a disk that delivers nothing for so long is hanging."""


def all_checks(deep: models.Progress | None = None) -> list[Check]:
    """`deep` is told of the bytes read, and asks for checksums by being there."""
    checks = [
        Check("python", "python", interpreter.check),
        Check("gpu", "driver", driver.check),
        Check("gpu", "nvml", gpus.check),
        Check("limits", "limits", limits.check),
        Check("memory", "memory", memory.check),
        Check("disk", "disk space", disk.check_space),
        Check("disk", "disk speed", disk.check_speed, Patience(0.8), quiet=True),
        Check("box", "box", box.check),
        Check("box", "service", service.check),
        Check("leftovers", leftovers.RUN_DIR, leftovers.check_run_dir),
        Check("leftovers", leftovers.PROCESSES, leftovers.check_processes),
        Check("leftovers", leftovers.PULLS, leftovers.check_pulls),
        Check("leftovers", leftovers.SNAPSHOTS, leftovers.check_snapshots),
        Check("leftovers", leftovers.LOGS, leftovers.check_logs),
        Check("models", models.FILES, models.check_files),
    ]
    if deep is not None:
        checks.append(_checksums(deep))
    return checks


def _checksums(progress: models.Progress) -> Check:
    patience = Patience(DEEP_SILENCE_S)

    def renewing(model: str, done: int, total: int) -> None:
        patience.renew()
        progress(model, done, total)

    return Check("models", models.CHECKSUMS, partial(models.check_checksums, progress=renewing), patience)
