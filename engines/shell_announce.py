"""A worker's instance file: there while the worker can answer, and neither before nor while it sleeps or drains."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from dynamo_box.discovery.instances import Instance, announce, process_start_time, withdraw
from dynamo_box.protocol.spec import WorkerSpec
from engines.contract import EngineError, EngineInfo
from engines.log import get_logger

CHECK_INTERVAL_S = 1.0

log = get_logger()


class Announcement:
    """Keeps the file there: a worker that serves must be found, whoever removed its file."""

    def __init__(self, directory: Path, instance: Instance) -> None:
        self._directory = directory
        self._instance = instance
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        self.renew()

    @property
    def role(self) -> str:
        """What the worker serves as; another is said by the next `renew`."""
        return self._instance.role

    @role.setter
    def role(self, role: str) -> None:
        self._instance = msgspec.structs.replace(self._instance, role=role)

    def withdraw(self) -> None:
        """Remove the file, for good or until `renew`."""
        self._timer.cancel()
        try:
            withdraw(self._directory, self._instance.name)
        except OSError as error:
            log.error("the instance file can't be removed", error=str(error))

    def renew(self) -> None:
        """Write it again after `withdraw`.

        Raises:
            OSError: it can't be written now; that is tried again until `withdraw`.
        """
        self._timer.cancel()
        self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        announce(self._directory, self._instance)

    def _check(self) -> None:
        self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        if (self._directory / f"{self._instance.name}.json").exists():
            return
        log.warning("the instance file is gone; writing it again")
        try:
            announce(self._directory, self._instance)
        except OSError as error:
            log.error("the instance file can't be written", error=str(error))


def describe(spec: WorkerSpec, info: EngineInfo, socket_path: Path) -> Instance:
    """This process as an instance.

    Raises:
        EngineError: nobody could tell whether this process lives.
    """
    start_time = process_start_time(os.getpid())
    if start_time is None:
        raise EngineError("/proc can't be read: nobody could tell whether this worker lives", permanent=True)
    return Instance(
        name=spec.name,
        model=spec.model.name,
        role=spec.role,
        engine=spec.engine,
        socket=str(socket_path),
        pid=os.getpid(),
        start_time=start_time,
        fingerprint=spec.model.fingerprint,
        block_size=info.block_size,
        kv_blocks_total=info.kv_blocks_total,
        kv_dtype=info.kv_dtype,
        context_length=info.context_length,
        capabilities=info.capabilities,
    )
