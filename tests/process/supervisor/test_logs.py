"""What children write ends up in files, bounded, and nobody starves meanwhile."""

from __future__ import annotations

import contextlib
import json

from supervised_box import DEADLINE_S, BoxUnderTest, eventually

from dynamo_box.paths import home, logs_dir
from dynamo_box.supervisor.logs import ROTATE_BYTES


def test_raw_lines_are_wrapped_and_structured_ones_pass_through(box: BoxUnderTest) -> None:
    box.up(box.plan(router="log:plain-words"))
    assert box.answers()
    line = json.loads(box.log("router").splitlines()[0])
    assert (line["level"], line["process"], line["event"]) == ("info", "router", "plain-words")
    requests = [json.loads(line) for line in box.log("frontend").splitlines()]
    assert requests[0] == {"ts": "2026-01-01T00:00:00Z", "level": "info", "process": "frontend", "event": "request"}


def test_the_supervisor_logs_what_happens(box: BoxUnderTest) -> None:
    box.up()
    lines = [json.loads(line) for line in box.log("supervisor").splitlines()]
    assert {line["process"] for line in lines} == {"supervisor"}
    assert [line["event"] for line in lines if line.get("about") == "router"] == ["ready"]
    said = [line["event"] for line in lines if line["level"] == "info"]  # the machine may be short of something
    assert said[-1] == "box ready"


def test_logs_outlive_the_box_and_the_next_one_appends(box: BoxUnderTest) -> None:
    for life in (1, 2):
        launched = box.up(box.plan(router="log:again"))
        with box.client() as client:
            client.down(30.0, DEADLINE_S)
        launched.exit_code()
        assert box.log("router").count("again") == life


def test_a_flood_neither_starves_the_box_nor_fills_the_disk(box: BoxUnderTest) -> None:
    box.up(box.plan(worker="flood"))
    directory = logs_dir(box.run_dir, home())
    eventually(lambda: (directory / "tiny.aggregated.0.log.1").exists(), "the log was rotated")
    with box.client() as client:
        for _ in range(50):
            client.snapshot(DEADLINE_S)
    assert box.answers()
    sizes = []
    for path in directory.glob("tiny.aggregated.0.log*"):
        with contextlib.suppress(FileNotFoundError):  # just being rotated
            sizes.append(path.stat().st_size)
    assert len(sizes) <= 3
    assert max(sizes) <= ROTATE_BYTES
