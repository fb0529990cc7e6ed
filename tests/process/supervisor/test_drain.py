"""Draining one worker of a running box, and what may not be done at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from supervised_box import DEADLINE_S, BoxUnderTest

from dynamo_box.errors import BoxError, NotRunning, UsageError

WORKER, OTHER = "tiny.aggregated.0", "tiny.aggregated.1"


def drain(box: BoxUnderTest, name: str = WORKER, drain_s: float = 5.0) -> str:
    with box.client() as client:
        return client.drain(name, drain_s, DEADLINE_S)


def restart(box: BoxUnderTest, name: str = WORKER, drain_s: float = 5.0) -> str:
    with box.client() as client:
        return client.restart(name, drain_s, DEADLINE_S)


def test_a_drained_worker_stays_stopped_until_it_is_restarted(box: BoxUnderTest) -> None:
    box.up(box.plan(workers=2))
    back = f"`dynbox restart {WORKER}` brings it back"
    assert drain(box) == f"{WORKER} is drained; {back}"
    snapshot = box.snapshot()
    worker = next(process for process in snapshot.processes if process.name == WORKER)
    assert (worker.state, worker.pid, worker.phase, worker.cause) == ("stopped", None, "", "")
    assert (snapshot.box.state, snapshot.box.cause) == ("degraded", f"drained by request: {WORKER}; {back}")
    assert [(model.state, model.workers_ready, model.workers_total) for model in snapshot.models] == [("ready", 1, 2)]
    assert (box.run_dir.root / "drained").read_text().split() == [WORKER]
    assert [path.name for path in box.run_dir.instances.iterdir()] == [f"{OTHER}.json"]

    assert drain(box) == f"{WORKER} was drained already; {back}"
    assert restart(box) == f"{WORKER} is ready"
    snapshot = box.snapshot()
    assert (snapshot.box.state, snapshot.box.cause, snapshot.models[0].workers_ready) == ("ready", "", 2)
    about = [(event.level, event.text) for event in snapshot.events if event.process == WORKER]
    assert about == [
        ("info", "ready"),
        ("info", "drain was asked for (running requests get 5 s)"),
        ("info", f"drained; {back}"),
        ("info", "restart was asked for"),
        ("info", "ready"),
    ]


def test_a_model_without_its_last_worker_is_unavailable(box: BoxUnderTest) -> None:
    box.up()
    drain(box)
    (model,) = box.snapshot().models
    assert (model.state, model.workers_ready) == ("unavailable", 0)


@pytest.mark.parametrize("name", ["router", "frontend"])
def test_only_workers_can_be_drained(box: BoxUnderTest, name: str) -> None:
    box.up()
    with pytest.raises(UsageError, match="only workers can") as caught:
        drain(box, name)
    assert (caught.value.remedy or "").startswith(f"`dynbox restart {name}` replaces it")
    with pytest.raises(NotRunning):
        drain(box, "nobody")
    assert box.snapshot().box.state == "ready"


def test_a_drain_that_runs_out_of_time_says_what_it_cut(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="busy running:3", workers=2))
    box.until(WORKER, lambda process: process.figures, "has reported what it may not get round to say again")
    words = f"stopped with 3 requests unfinished; `dynbox restart {WORKER}` brings it back"
    assert drain(box, WORKER, 0.3) == f"{WORKER} is {words}"
    snapshot = box.snapshot()
    last = [event for event in snapshot.events if event.process == WORKER][-1]
    assert (last.level, last.text) == ("warning", words)
    assert snapshot.box.state == "degraded"


def test_one_act_on_a_process_at_a_time(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="busy", workers=2))
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(drain, box, WORKER, 600.0)
        box.until(WORKER, lambda process: process.phase == "3 in flight", "drains")
        for act in (restart, drain):
            with pytest.raises(BoxError, match="is being drained already"):
                act(box, WORKER)
        drain(box, WORKER, 0.0)
        draining.result(DEADLINE_S)
        restart(box)
        restarting = pool.submit(restart, box, WORKER, 600.0)
        box.until(WORKER, lambda process: process.phase == "3 in flight", "drains for its restart")
        with pytest.raises(BoxError, match="is being restarted already"):
            drain(box)
        with box.client() as client:
            client.down(0.0, DEADLINE_S)
        assert isinstance(restarting.exception(DEADLINE_S), BoxError), "the box has gone meanwhile"


def test_a_worker_that_does_not_answer_the_drain_loses_what_it_last_reported(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="stubborn running:2", workers=2))
    box.until(WORKER, lambda process: process.figures, "has reported")
    assert drain(box, WORKER, 0.1).startswith(f"{WORKER} is stopped with 2 requests unfinished")
    restart(box)
    levels = [event.level for event in box.snapshot().events if "unfinished" in event.text]
    assert levels == ["warning"], "once"


def test_a_long_drain_can_be_cut_short(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="busy", workers=2))
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(drain, box, WORKER, 600.0)
        box.until(WORKER, lambda process: process.phase == "3 in flight", "drains")
        with pytest.raises(BoxError) as caught:
            drain(box)
        assert f"`dynbox drain {WORKER} --drain 0` cuts it short" in (caught.value.remedy or "")
        words = drain(box, WORKER, 0.0)
        assert words == draining.result(DEADLINE_S)
    assert words.startswith(f"{WORKER} is stopped with 3 requests unfinished")
    assert restart(box) == f"{WORKER} is ready"


def test_a_box_goes_down_with_drained_workers(box: BoxUnderTest) -> None:
    launched = box.up(box.plan(workers=2))
    drain(box, OTHER)
    drain(box)
    cause = box.snapshot().box.cause
    assert cause == f"drained by request: {OTHER}, {WORKER}; `dynbox restart NAME` brings one back"
    with box.client() as client:
        stopped = client.down(5.0, DEADLINE_S)
    assert (stopped.processes, stopped.survivors) == (2, ())
    assert launched.exit_code() == 0
    assert box.processes() == []
