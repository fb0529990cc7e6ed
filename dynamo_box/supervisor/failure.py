"""Why a child ended without being asked to. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_box.errors import BoxError, TimedOut
from dynamo_box.protocol import status
from dynamo_box.supervisor.life import Ending


@dataclass(frozen=True)
class Failure:
    """`lines` are the last ones that it wrote. `permanent`: it would fail again in the same way."""

    cause: str
    remedy: str = ""
    lines: tuple[str, ...] = ()
    permanent: bool = False
    timed_out: bool = False

    def error(self, name: str) -> BoxError:
        """For people."""
        kind = TimedOut if self.timed_out else BoxError
        return kind(f"{name}: {self.cause}", remedy=self.remedy or None, details=self.lines)


def why_it_ended(
    ending: Ending,
    said: status.Failed | None,
    broken: str,
    lines: tuple[str, ...],
    *,
    start_timed_out: bool,
    ever_ready: bool,
) -> Failure:
    """What it `said` itself counts most, then why it was ended (`broken`), then how it did."""
    if said is not None:
        return Failure(said.cause, said.remedy, lines, said.permanent)
    remedy = ""
    if ending.signal == 9 and not broken:
        remedy = "if nobody killed it, the kernel did for want of memory: see `dmesg`"
    permanent = bool(ending.no_exec) or (start_timed_out and not ever_ready)
    return Failure(broken or ending.text, remedy, lines, permanent, timed_out=start_timed_out)
