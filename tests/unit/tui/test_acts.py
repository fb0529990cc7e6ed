"""What an act means for the row under the cursor."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.errors import BoxError, NotRunning
from dynamo_box.paths import RunDir
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.tui.acts import Order, Refusal, carry_out, order, question, router_mode
from dynamo_box.tui.model import Act

BUSY = snapshots.busy()
RESTART = Act("r", "restart", "restart", "Drain and restart {row}?")
DRAIN = Act("d", "drain", "drain", "Drain {row}?")
CANCEL = Act("x", "cancel", "cancel", "Cancel {row}?")
MODE = Act("m", "mode", "router mode", needs_row=False)


def test_a_process_is_restarted_by_its_name() -> None:
    name = BUSY.processes[1].name
    assert order(RESTART, name, BUSY) == Order("restart", name, run_id=BUSY.box.run_id)


@pytest.mark.parametrize("row", [None, "GPU-0", "gone"])
def test_what_is_no_process_is_refused_in_words(row: str | None) -> None:
    refused = order(RESTART, row, BUSY)
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("restart: ")


def test_only_workers_are_drained_and_the_others_say_why_not() -> None:
    for process in BUSY.processes:
        found = order(DRAIN, process.name, BUSY)
        if process.kind == "worker":
            assert found == Order("drain", process.name, run_id=BUSY.box.run_id)
        else:
            assert isinstance(found, Refusal)
            assert found.reason.startswith(f"drain: {process.name} is no worker")


def test_only_a_live_request_is_cancelled() -> None:
    frontend = next(each.figures for each in BUSY.processes if isinstance(each.figures, FrontendFigures))
    request = frontend.live[0].request_id
    assert order(CANCEL, request, BUSY) == Order("cancel", request, run_id=BUSY.box.run_id)
    assert isinstance(order(CANCEL, "ended-long-ago", BUSY), Refusal)


def test_a_mode_is_the_routers_whatever_row_is_chosen() -> None:
    found = order(MODE, None, BUSY)
    assert isinstance(found, Order)
    assert found.process == "router"
    assert router_mode(BUSY) == "kv"
    assert isinstance(order(MODE, None, replace(BUSY, processes=())), Refusal)


def test_foreign_names_have_no_power_over_the_question() -> None:
    assert question(CANCEL, "a\x1b[2Jb {row}") == "Cancel a\\x1b[2Jb {row}?"
    assert question(CANCEL, "a\n\tb\u202e") == "Cancel a  b\\u202e?"


def test_without_a_box_it_fails_as_every_command_does(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        carry_out(RunDir(tmp_path / "none"), Order("restart", "router"))


def test_an_act_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BoxError):
        carry_out(RunDir(tmp_path / "none"), Order("fly", "router"))
