"""Which box a process belongs to: `DYNBOX_RUN_ID=<run dir key>.<supervisor pid>.<its start time>` in its
environment.

The start time makes the id unique across reuse of the pid, so "is that box alive?" has one answer, and the
key lets two boxes with run dirs of their own ignore each other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dynamo_box.discovery.instances import process_start_time
from dynamo_box.paths import RunDir

RUN_ID_VARIABLE = "DYNBOX_RUN_ID"
PROCESS_VARIABLE = "DYNBOX_PROCESS"


@dataclass(frozen=True)
class RunId:
    directory: str
    pid: int
    start_time: int

    @classmethod
    def of_this_process(cls, run_dir: RunDir) -> RunId:
        pid = os.getpid()
        return cls(run_dir.key, pid, process_start_time(pid) or 0)

    @classmethod
    def parse(cls, text: str) -> RunId | None:
        """None when the text is no run id."""
        directory, _, rest = text.partition(".")
        pid, _, start_time = rest.partition(".")
        if not (directory and pid.isdecimal() and start_time.isdecimal()):
            return None
        return cls(directory, int(pid), int(start_time))

    @property
    def is_alive(self) -> bool:
        """The box's supervisor still runs."""
        return process_start_time(self.pid) == self.start_time

    def __str__(self) -> str:
        return f"{self.directory}.{self.pid}.{self.start_time}"
