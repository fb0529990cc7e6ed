"""More and fewer workers of a running box, and what may not be done at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from supervised_box import DEADLINE_S, BoxUnderTest

from dynamo_box.errors import BoxError, NotRunning, UsageError
from dynamo_box.plan.types import ByteItem, DevicePlan, ModelPolicy, Plan

ROLE = "aggregated"


def scale(box: BoxUnderTest, count: int, role: str = ROLE, model: str = "tiny", drain_s: float = 5.0) -> str:
    with box.client() as client:
        return client.scale(model, role, count, drain_s, DEADLINE_S)


def names(box: BoxUnderTest) -> list[str]:
    return [process.name for process in box.snapshot().processes]


def roomy(box: BoxUnderTest, worker: str = "", workers: int = 1) -> Plan:
    """Workers take a byte each, of four that there are."""
    plan = box.plan(worker=worker, workers=workers)
    processes = tuple(
        msgspec.structs.replace(process, memory=(ByteItem("cpu", "KV", 1, ""),))
        if process.kind == "worker"
        else process
        for process in plan.processes
    )
    return msgspec.structs.replace(plan, processes=processes, devices=(DevicePlan("cpu", "cpu", "cpu", 8, 4),))


def test_up_down_to_none_and_back(box: BoxUnderTest) -> None:
    launched = box.up(roomy(box))
    assert scale(box, 3) == "tiny has 3 aggregated workers: tiny.aggregated.1, tiny.aggregated.2 ready"
    assert scale(box, 3) == "tiny has 3 aggregated workers already"
    assert names(box) == ["tiny.aggregated.0", "router", "tiny.aggregated.1", "tiny.aggregated.2", "frontend"]
    snapshot = box.snapshot()
    assert (snapshot.models[0].workers_ready, snapshot.models[0].workers_total) == (3, 3)
    assert snapshot.devices[0].planned_bytes == {"KV": 3}
    assert scale(box, 1, "prefill") == "tiny has 1 prefill worker: tiny.prefill.0 ready"
    assert box.process("tiny.prefill.0").role == "prefill"
    with pytest.raises(UsageError, match="no room for 1 more prefill worker of tiny") as caught:
        scale(box, 2, "prefill")
    assert caught.value.details == ("cpu: tiny.prefill.1 needs 1 B, 0 B of 4 B are free: 1 B missing",)
    assert scale(box, 0) == (
        "tiny has 0 aggregated workers: tiny.aggregated.2, tiny.aggregated.1, tiny.aggregated.0 gone"
    )
    assert scale(box, 0, "prefill") == (
        "tiny has 0 prefill workers: tiny.prefill.0 gone; "
        "nothing serves tiny until `dynbox scale` starts a worker of it"
    )
    snapshot = box.snapshot()
    assert [process.name for process in snapshot.processes] == ["router", "frontend"]
    assert (snapshot.box.state, snapshot.models[0].state) == ("ready", "unavailable")
    assert list(box.run_dir.instances.iterdir()) == []
    assert scale(box, 1) == "tiny has 1 aggregated worker: tiny.aggregated.0 ready"
    assert box.snapshot().models[0].state == "ready"
    with box.client() as client:
        stopped = client.down(5.0, DEADLINE_S)
    assert (stopped.processes, stopped.survivors) == (3, ())
    assert launched.exit_code() == 0


def test_new_workers_are_kept_up_like_others_and_stop_before_nobody_needs_them(box: BoxUnderTest) -> None:
    import os
    import signal

    box.up(roomy(box))
    scale(box, 2)
    pid = box.process("tiny.aggregated.1").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    box.until("tiny.aggregated.1", lambda process: process.state == "ready" and process.restarts == 1, "is back")
    with box.client() as client:
        client.drain("tiny.aggregated.0", 1.0, DEADLINE_S)
    assert scale(box, 1) == "tiny has 1 aggregated worker: tiny.aggregated.0 gone", "the one that was down"
    assert box.snapshot().box.state == "ready"
    with box.client() as client:
        client.down(30.0, DEADLINE_S)
    drained = (box.run_dir.root / "drained").read_text().split()
    assert drained[-3:] == ["frontend", "tiny.aggregated.1", "router"]


def test_a_worker_that_does_not_come_up_is_gone_again(box: BoxUnderTest) -> None:
    box.up(roomy(box, worker="fail-in:tiny.aggregated.1"))
    with pytest.raises(BoxError, match=r"tiny\.aggregated\.1: it was told to fail"):
        scale(box, 2)
    snapshot = box.snapshot()
    assert [process.name for process in snapshot.processes] == ["tiny.aggregated.0", "router", "frontend"]
    assert snapshot.box.state == "ready"


def test_one_change_at_a_time(box: BoxUnderTest) -> None:
    box.up(roomy(box, worker="busy", workers=2))
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(scale, box, 1, drain_s=600.0)
        box.until("tiny.aggregated.1", lambda process: process.phase == "3 in flight", "finishes its requests")
        with pytest.raises(BoxError, match="tiny is being scaled already"):
            scale(box, 3)
        with pytest.raises(BoxError, match="is being removed already"), box.client() as client:
            client.restart("tiny.aggregated.1", 1.0, DEADLINE_S)
        with box.client() as client:
            assert client.down(0.2, DEADLINE_S).survivors == ()
        assert isinstance(going.exception(DEADLINE_S), BoxError)


def test_who_sleeps_finds_no_room_where_a_pinned_model_has_grown(box: BoxUnderTest) -> None:
    plan = roomy(box, workers=2)
    twin = msgspec.structs.replace(plan.models[0], name="twin")
    processes = tuple(
        msgspec.structs.replace(process, name="twin.aggregated.0", model="twin")
        if process.name == "tiny.aggregated.1"
        else process
        for process in plan.processes
    )
    policies = {"tiny": ModelPolicy(pin=True)}
    box.up(msgspec.structs.replace(plan, models=(*plan.models, twin), processes=processes, policies=policies))
    with box.client() as client:
        client.sleep("twin", timeout_s=DEADLINE_S)
        scale(box, 4)
        with pytest.raises(UsageError, match=r"there is no room: twin needs 1 B .* 1 B missing beside tiny \(pinned\)"):
            client.wake("twin", timeout_s=DEADLINE_S)
        assert {model.name: model.state for model in box.snapshot().models} == {"tiny": "ready", "twin": "asleep"}
        scale(box, 3)
        assert client.wake("twin", timeout_s=DEADLINE_S).residency.state == "awake"


def test_what_can_not_be_scaled(box: BoxUnderTest) -> None:
    box.up(roomy(box))
    with pytest.raises(NotRunning, match="no model is called 'huge'"):
        scale(box, 1, model="huge")
    with pytest.raises(UsageError, match="there is no role 'both'"):
        scale(box, 1, "both")
    with pytest.raises(UsageError, match="0 to 256 workers, not -1"):
        scale(box, -1)
