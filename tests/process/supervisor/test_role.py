"""Another role for a worker of a running box, and what may not be done at the same time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from supervised_box import DEADLINE_S, BoxUnderTest, eventually

from dynamo_box.errors import BoxError, NotRunning, UsageError

WORKER, OTHER = "tiny.aggregated.0", "tiny.aggregated.1"


def set_role(box: BoxUnderTest, role: str, name: str = WORKER, drain_s: float = 5.0) -> str:
    with box.client() as client:
        return client.set_role(name, role, drain_s, DEADLINE_S)


def announced_role(box: BoxUnderTest, name: str = WORKER) -> str:
    role: str = json.loads((box.run_dir.instances / f"{name}.json").read_text())["role"]
    return role


def test_a_worker_takes_another_role_without_a_restart_and_keeps_it_through_one(box: BoxUnderTest) -> None:
    box.up(box.plan(workers=2))
    before = box.process(WORKER)
    assert set_role(box, "prefill") == f"{WORKER} serves as prefill, was aggregated"
    after = box.process(WORKER)
    assert (after.state, after.phase, after.role, after.pid) == ("ready", "", "prefill", before.pid)
    assert set_role(box, "prefill") == f"{WORKER} serves as prefill already"
    with box.client() as client:
        client.restart(WORKER, 5.0, DEADLINE_S)
    again = box.process(WORKER)
    assert (again.role, again.restarts) == ("prefill", 0) and again.pid != before.pid
    assert announced_role(box) == "prefill", "it was started as that"
    about = [event.text for event in box.snapshot().events if event.process == WORKER]
    assert about[1:3] == ["is to serve as prefill (running requests get 5 s)", "serves as prefill, was aggregated"]
    (model,) = box.snapshot().models
    assert (model.state, model.workers_ready) == ("ready", 2)


def test_what_has_no_role_and_roles_that_are_none(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="no-legs"))
    with pytest.raises(UsageError, match="router has no role: only workers have"):
        set_role(box, "prefill", "router")
    with pytest.raises(UsageError, match="there is no role 'both'"):
        set_role(box, "both")
    with pytest.raises(NotRunning):
        set_role(box, "prefill", "nobody")
    with pytest.raises(BoxError, match=f"{WORKER} goes on as aggregated: its engine has no legs"):
        set_role(box, "decode")
    worker = box.process(WORKER)
    assert (worker.state, worker.role) == ("ready", "aggregated")
    assert box.answers()


def test_a_worker_that_dies_of_it_comes_back_in_its_old_role(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="dies-of:decode", workers=2))
    with pytest.raises(NotRunning, match="ended before it answered"):
        set_role(box, "decode")
    worker = box.until(WORKER, lambda process: process.state == "ready" and process.restarts == 1, "is back")
    assert worker.role == "aggregated"
    assert set_role(box, "prefill").endswith("serves as prefill, was aggregated")


def test_one_act_at_a_time_and_an_end_in_between(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(worker="busy", workers=2))
    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(set_role, box, "decode", WORKER, 600.0)
        box.until(WORKER, lambda process: process.phase == "3 in flight", "finishes its requests")
        for act in (lambda: set_role(box, "prefill"), lambda: _drain(box)):
            with pytest.raises(BoxError, match="is being given another role already"):
                act()
        with box.client() as client:
            assert client.down(0.2, DEADLINE_S).survivors == ()
        assert isinstance(changing.exception(DEADLINE_S), BoxError)
    assert launched.exit_code() == 0
    assert eventually(lambda: box.processes() == [], "nothing is left")


def _drain(box: BoxUnderTest) -> str:
    with box.client() as client:
        return client.drain(WORKER, 1.0, DEADLINE_S)


def test_what_was_set_of_the_router_outlives_it(box: BoxUnderTest) -> None:
    box.up()
    with box.client() as client:
        assert client.set_option("router", "mode", "random") == "random"
        with pytest.raises(BoxError, match="no setting colour"):
            client.set_option("router", "colour", "red")
        client.restart("router", 1.0, DEADLINE_S)
    settings = box.run_dir.root / "router.settings"
    assert eventually(lambda: settings.exists() and settings.read_text() == "mode random\n" * 2, "it is told again")
