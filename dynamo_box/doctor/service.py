"""What systemd needs to run a box for this user, if a unit is there for it."""

from __future__ import annotations

import os

from dynamo_box.doctor.finding import Finding, passed, warned
from dynamo_box.doctor.machine import Machine, user_name
from dynamo_box.service.install import installed_names
from dynamo_box.service.systemctl import ends_with_session
from dynamo_box.service.unit import Scope


def check(machine: Machine) -> list[Finding]:
    """Nothing where no unit of a box is installed, and the run dir doesn't depend on anybody's sessions."""
    units = installed_names(Scope.USER.unit_directory())
    user = user_name(os.getuid())
    linger = machine.root / "var/lib/systemd/linger"
    findings = [judge_linger(units, user, lingers=(linger / user).exists())] if units else []
    if ends_with_session(machine.run.root, linger):
        findings.append(
            warned(
                "session",
                f"systemd removes {machine.run.root} with the last session of {user}",
                "a box stops then: nobody could reach it any more",
                f"loginctl enable-linger {user}",
            )
        )
    return findings


def judge_linger(units: list[str], user: str, *, lingers: bool) -> Finding:
    listed = ", ".join(units)
    if lingers:
        return passed("service", f"{listed}; runs without a login")
    why = "systemd stops it when the last session of the user ends, and starts it only at a login"
    return warned("service", f"{listed}, but no lingering for {user}", why, f"loginctl enable-linger {user}")
