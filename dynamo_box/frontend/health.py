"""What `/health` says: can every model be answered for, by workers of which roles, and what works without some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFILL, DECODE, AGGREGATED = "prefill", "decode", "aggregated"


@dataclass(frozen=True)
class Health:
    """`reasons` is why not all requests can be served; `notes` is what is amiss without keeping one from being served.
    `roles` counts workers by role, by model.
    """

    reasons: list[str]
    models: tuple[str, ...]
    roles: dict[str, dict[str, int]]
    notes: list[str]
    sleeping: tuple[str, ...]
    simulated: bool = False

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "status": "unhealthy" if self.reasons else "healthy",
            "reasons": self.reasons,
            "models": self.models,
            "roles": self.roles,
        }
        if self.simulated:
            body["simulated"] = True
        if self.notes:
            body["notes"] = self.notes
        if self.sleeping:
            body["sleeping"] = self.sleeping
        return body


def what_still_works(roles: Mapping[str, int], policy: str) -> str:
    """`roles` counts a model's workers; "" where nothing is amiss: both legs have somebody, or nobody is there for one
    leg alone. `policy` is the disaggregation policy, "" while that is unknown.
    """
    if not roles or roles.get(AGGREGATED):
        return ""
    if not roles.get(PREFILL):
        missing, instead = PREFILL, "prompts are computed by decode workers"
    elif not roles.get(DECODE):
        missing, instead = DECODE, "prefill workers answer by themselves"
    else:
        return ""
    if policy == "strict":
        return f"no {missing} workers: requests fail (policy strict)"
    doubt = f"policy {policy}" if policy else "unless the policy is strict: then requests fail"
    return f"no {missing} workers: {instead} ({doubt})"
