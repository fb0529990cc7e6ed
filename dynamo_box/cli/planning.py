"""What `up` and `profile` need before a box exists: the profile, this machine, the store, and the plan from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynamo_box.cli.progress import Display, pull_progress
from dynamo_box.errors import BoxError
from dynamo_box.paths import home, run_dir, snapshots_dir

if TYPE_CHECKING:
    from dynamo_box.plan.types import Plan
    from dynamo_box.profile.facts import ModelFacts
    from dynamo_box.profile.schema import Profile


def stored_facts() -> dict[str, ModelFacts]:
    """What the store's whole models say of themselves, by name."""
    from dynamo_box.profile.store import ModelStore, StoredModel

    entries = ModelStore(home().models).list()
    return {entry.name: entry.facts for entry in entries if isinstance(entry, StoredModel)}


def is_known(origin: str) -> bool:
    """Whether a model can be planned for without pulling it first."""
    from dynamo_box.profile.catalogue import facts_for

    return facts_for(origin, stored_facts()) is not None


class Planning:
    """A profile on this machine, or on one that `simulate` describes; `plan` may be asked again after a pull.

    Raises:
        UsageError: a variable for KV tiers in `environ` holds what can't be used.
    """

    def __init__(
        self,
        profile: Profile,
        port: int | None,
        environ: Mapping[str, str] = os.environ,
        simulate: Sequence[str] = (),
    ) -> None:
        from dynamo_box.hardware import detect
        from dynamo_box.profile.aliases import with_aliases

        self.profile, self._variables = with_aliases(profile, environ)
        if simulate:
            from dynamo_box.plan.simulate import simulated, simulated_devices

            self.profile = simulated(self.profile, simulated_devices(simulate), stored_facts())
        self._port = port
        self._hardware = detect()

    @classmethod
    def of_profile(cls, reference: str, port: int | None, simulate: Sequence[str] = ()) -> Planning:
        """`simulate` as `--simulate` has it: other GPUs than those that are here, and mock engines on them.

        Raises:
            ProfileError: there is no such profile, or it can't be used.
            UsageError: `simulate` can't be understood.
        """
        from dynamo_box.profile.load import load_profile

        return cls(load_profile(reference), port, simulate=simulate)

    @classmethod
    def of_model(cls, model: str, port: int | None) -> Planning:
        """With a profile written for this model and this machine; the model must be known.

        Raises:
            UsageError: nothing is known of it.
            PlanRefused: it doesn't fit.
        """
        from dynamo_box.hardware import detect
        from dynamo_box.plan.author import profile_for_model

        return cls(profile_for_model(model, detect(), stored_facts()), port)

    def plan(self) -> Plan:
        """Raises:
        PlanRefused: this machine can't carry the profile.
        """
        from dynamo_box.plan.make import make_plan
        from dynamo_box.profile.load import shipped_profiles

        return make_plan(
            self.profile,
            self._hardware,
            stored_facts(),
            run_dir=str(run_dir().root),
            snapshots=str(snapshots_dir(run_dir(), home())),
            tiers_directory=str(home().kv),
            variables=self._variables,
            port=self._port,
            shipped=shipped_profiles,
        )

    def unknown_origins(self) -> list[str]:
        """Models that can't be planned before they have been pulled: in neither the store nor the catalogue."""
        origins = dict.fromkeys(model.origin for model in self.profile.served)
        return [origin for origin in origins if not is_known(origin)]

    def missing_origins(self, plan: Plan) -> list[str]:
        """Models that were planned from the catalogue: not in the store yet."""
        absent = {spec.name for spec in plan.models if not spec.path}
        return list(dict.fromkeys(model.origin for model in self.profile.served if model.name in absent))


def pull_all(origins: list[str], display: Display, *, allowed: bool) -> None:
    """Bring models into the store.

    Raises:
        BoxError: one can't be had, or pulling is not allowed.
    """
    if origins and not allowed:
        raise BoxError(
            f"not in the store: {', '.join(origins)}",
            remedy=f"`dynbox pull {origins[0]}`, or leave out --no-pull",
        )
    for origin in origins:
        from dynamo_box.profile.pull import pull
        from dynamo_box.profile.store import ModelStore

        pull(origin, ModelStore(home().models), progress=pull_progress(display, origin))
