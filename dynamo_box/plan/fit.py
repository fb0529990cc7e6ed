"""Which of several profiles a machine could carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dynamo_box.errors import PlanRefused
from dynamo_box.hardware import Hardware
from dynamo_box.profile.facts import ModelFacts

if TYPE_CHECKING:
    from dynamo_box.profile.schema import Profile


def fitting_profiles(hardware: Hardware, facts: Mapping[str, ModelFacts], profiles: Mapping[str, Profile]) -> list[str]:
    """Names of those that can be planned here, simulated ones last."""
    from dynamo_box.plan.make import make_plan

    fitting: list[str] = []
    for name, profile in profiles.items():
        try:
            make_plan(profile, hardware, facts, run_dir="")
        except PlanRefused:
            continue
        fitting.append(name)
    return sorted(fitting, key=lambda name: (profiles[name].simulate is not None, name))
