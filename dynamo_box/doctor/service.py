"""What systemd needs to run a box for this user, if a unit is there for it."""

from __future__ import annotations

import os

from dynamo_box.doctor.finding import Finding, passed, warned
from dynamo_box.doctor.machine import Machine, user_name
from dynamo_box.service.install import installed_names
from dynamo_box.service.unit import Scope


def check(machine: Machine) -> list[Finding]:
    """Nothing where no unit of a box is installed."""
    units = installed_names(Scope.USER.unit_directory())
    user = user_name(os.getuid())
    lingers = (machine.root / "var/lib/systemd/linger" / user).exists()
    return [judge_linger(units, user, lingers=lingers)] if units else []


def judge_linger(units: list[str], user: str, *, lingers: bool) -> Finding:
    listed = ", ".join(units)
    if lingers:
        return passed("service", f"{listed}; runs without a login")
    why = "systemd stops it when the last session of the user ends, and starts it only at a login"
    return warned("service", f"{listed}, but no lingering for {user}", why, f"loginctl enable-linger {user}")
