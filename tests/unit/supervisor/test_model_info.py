"""When a model whose workers have roles is served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dynamo_box.plan.types import ProcessPlan
from dynamo_box.protocol.figures import RouterFigures
from dynamo_box.protocol.spec import Disagg, DisaggPolicy, ModelSpec, RouterSpec, WorkerSpec
from dynamo_box.snapshot import Targets
from dynamo_box.supervisor.child import Child
from dynamo_box.supervisor.snapshot_builder import model_info

MODEL = ModelSpec("m", "/nowhere", "f", 64, 16)


def child(process: ProcessPlan, ready: bool = True, figures: Any = None) -> Child:
    return cast(Child, SimpleNamespace(plan=process, is_ready=ready, figures=figures))


def router(policy: DisaggPolicy, *, now: DisaggPolicy | None = None) -> Child:
    """Planned with one policy; `now` is what it says is in force."""
    spec = RouterSpec("router", "/run", (MODEL,), disagg=Disagg(policy=policy))
    figures = RouterFigures(disagg=now, disagg_settings=Disagg(policy=now)) if now else None
    return child(ProcessPlan("router", "router", ("python",), spec), figures=figures)


def worker(role: str, *, ready: bool = True) -> Child:
    spec = WorkerSpec(f"m.{role}.0", MODEL, "mock", role, "/run", 1, "cpu", 0, 1)
    return child(ProcessPlan(spec.name, "worker", ("python",), spec, model="m", role=role), ready)


def state(*children: Child) -> str:
    return model_info(MODEL, "ready", children, None, 0.0).state


@pytest.mark.parametrize("policy", ["fallback", "conditional"])
@pytest.mark.parametrize("left", ["prefill", "decode", "aggregated"])
def test_any_worker_will_do_unless_the_policy_is_strict(policy: DisaggPolicy, left: str) -> None:
    gone = worker("decode" if left == "prefill" else "prefill", ready=False)
    assert state(router(policy), gone, worker(left)) == "ready"
    assert state(router(policy), gone) == "unavailable"


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("prefill", "decode"), "ready"),
        (("prefill",), "unavailable"),
        (("decode",), "unavailable"),
        (("decode", "decode"), "unavailable"),
        (("prefill", "aggregated"), "ready"),
        (("decode", "aggregated"), "ready"),
        (("aggregated",), "ready"),
        ((), "unavailable"),
    ],
)
def test_under_strict_both_legs_need_somebody(roles: tuple[str, ...], expected: str) -> None:
    assert state(router("strict"), *(worker(role) for role in roles)) == expected


def test_the_policy_in_force_counts_and_not_the_planned_one() -> None:
    assert state(router("fallback", now="strict"), worker("decode")) == "unavailable"
    assert state(router("strict", now="fallback"), worker("decode")) == "ready"


def test_a_router_that_is_down_serves_nobody_and_targets_are_passed_on() -> None:
    down = child(router("fallback").plan, ready=False)
    info = model_info(MODEL, "ready", (down, worker("decode")), None, 0.0, None, Targets(ttft_s=1.0))
    assert (info.state, info.targets.ttft_s) == ("unavailable", 1.0)
