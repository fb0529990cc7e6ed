"""The models screen, from snapshots."""

from __future__ import annotations

import pytest
from fakes import snapshots
from fakes.panels import text
from msgspec.structs import replace

from dynamo_box.protocol.residency import Residency
from dynamo_box.snapshot import BoxSnapshot, ModelInfo
from dynamo_box.tui.filter import EVERYTHING
from dynamo_box.tui.model import Cell, Table, Tone
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import models
from dynamo_box.tui.views.models import MODELS

VIEW = models.VIEW


def table(snapshot: BoxSnapshot) -> Table:
    found, *_ = VIEW.panels(snapshots.frame(snapshot), 120)
    assert isinstance(found, Table)
    return found


def row(snapshot: BoxSnapshot, model: str) -> dict[str, str]:
    shown = table(snapshot)
    found = next(row for row in shown.rows if row.key == model)
    return {column.key: cell.text for column, cell in zip(shown.columns, found.cells, strict=True)}


def test_a_model_is_the_sum_of_its_workers() -> None:
    assert row(snapshots.busy(2), "llama") == {
        "model": "llama",
        "state": "ready",
        "workers": "2/2",
        "devices": "GPU-4f1c2b3d, GPU-501d2c3e",
        "weights": "32.0 GiB",
        "requests": "41/1",
        "rate": "2,410",
        "hit": "60%",
        "idle": "in use",
        "path": "/models/llama",
    }


def test_idle_is_the_time_since_the_last_request_and_absent_before_the_first() -> None:
    assert row(snapshots.tiny(), "smollm2")["idle"] == "1m01s"
    unused = replace(snapshots.tiny(), models=(ModelInfo("smollm2", "ready", "", 1, 1),))
    assert "idle" not in row(unused, "smollm2")


def test_missing_workers_are_marked() -> None:
    shown = table(snapshots.degraded())
    index = [column.key for column in shown.columns].index("workers")
    assert shown.rows[0].cells[index] == Cell("4/8", Tone.WARN, 4)


def test_a_model_without_figures_shows_what_is_known() -> None:
    assert row(snapshots.gaps(), "llama") == {"model": "llama", "state": "starting"}


def test_weights_are_where_workers_say_that_they_hold_them() -> None:
    assert row(snapshots.degraded(), "llama")["devices"] == "GPU-4f1c2b3d, GPU-501d2c3e, GPU-54213042, GPU-56233244"


def test_the_detail_lists_the_workers() -> None:
    detail = text(VIEW.detail(snapshots.frame(snapshots.degraded()), MODELS, "llama"))
    for said in ("KV pools", "160 GiB", "last request", "/models/llama", "llama.aggregated.4  aggregated  fatal"):
        assert said in detail
    assert "weights 16.0 GiB" in detail


def test_a_model_that_is_gone_has_no_detail() -> None:
    assert VIEW.detail(snapshots.frame(snapshots.busy()), MODELS, "nothing") is None


def test_a_box_without_models_says_so() -> None:
    assert table(snapshots.empty()).empty


def test_80_columns_show_which_models_sleep_and_where_their_weights_are() -> None:
    stack = Stack()
    stack.show(VIEW.panels(snapshots.frame(snapshots.shared()), 80), EVERYTHING)
    text = "\n".join("".join(span.text for span in line.spans) for line in stack.lines(80, 21))
    for said in (
        "2 of 5 asleep",
        "asleep 12m03s",
        "asleep, held 1d00h",
        "waking populate 2s",
        "falling asleep drain 4s",
        "disk",
        "3.44 s cold",
        "WAITING",
    ):
        assert said in text


def test_a_model_whose_weights_are_shared_has_them_once() -> None:
    shared = row(snapshots.shared(), "smollm2")
    assert (shared["workers"], shared["weights"], shared["place"], shared["devices"]) == (
        "2/2",
        "513 MiB",
        "device",
        "cpu",
    )
    assert shared["state"] == "awake"
    assert shared["policy"] == "host pin"


def test_a_sleeping_model_says_where_since_when_and_what_its_last_wake_took() -> None:
    asleep = row(snapshots.shared(), "coder")
    assert asleep["state"] == "asleep 12m03s"
    assert (asleep["place"], asleep["weights"], asleep["policy"]) == ("host", "257 MiB", "host 5m")
    assert (asleep["woke"], asleep["turns"], asleep["slept"]) == ("231 ms", "3/2", "1h18m")
    assert tone(snapshots.shared(), "coder", "workers") is Tone.PLAIN, "no worker serves, and none should"


def test_a_cold_wake_is_marked_and_says_why() -> None:
    waking = row(snapshots.shared(), "guard")
    assert (waking["waiting"], waking["woke"], waking["turns"]) == ("2", "3.44 s cold", "12/11 1 cold")
    assert waking["note"] == "cold start: the snapshot of guard is damaged (shard 2)"
    assert tone(snapshots.shared(), "guard", "woke") is Tone.WARN


def test_the_detail_has_every_phase_of_the_last_wake_and_sleep_and_who_maps_the_weights() -> None:
    frame = snapshots.frame(snapshots.shared())
    detail = text(VIEW.detail(frame, MODELS, "coder"))
    wake, _, sleep = detail.partition("Last wake, by phase")[2].partition("Last sleep, by phase")
    assert [line.split()[0] for line in wake.splitlines() if line] == [
        "attach", "remap", "populate", "kv", "canary", "register", "total",
    ]  # fmt: skip
    assert "remap     0.4 ms" in wake
    assert "move   110 ms" in sleep
    assert "mapped by nobody" in sleep
    assert "mapped by smollm2.aggregated.{0,1}" in text(VIEW.detail(frame, MODELS, "smollm2"))
    assert "dynbox wake" in text(VIEW.detail(frame, MODELS, "judge"))


def test_an_engine_that_cannot_sleep_says_that_its_workers_stop() -> None:
    box = snapshots.tiny()
    stopped = replace(box.models[0], state="asleep", residency=Residency("smollm2", "asleep", "", engine_sleeps=False))
    box = replace(box, models=(stopped,))
    assert row(box, "smollm2")["policy"] == "stop"
    assert "place" not in row(box, "smollm2")
    detail = text(VIEW.detail(snapshots.frame(box), MODELS, "smollm2"))
    assert "its workers are stopped: its engine can't sleep" in detail
    assert "nowhere" in detail


def test_a_box_that_says_nothing_of_sleep_looks_as_it_did() -> None:
    keys = [column.key for column in table(snapshots.busy()).columns]
    assert keys == ["model", "state", "workers", "devices", "weights", "requests", "rate", "hit", "idle", "path"]
    assert table(snapshots.busy()).note == ""
    assert "Sleep" not in text(VIEW.detail(snapshots.frame(snapshots.busy()), MODELS, "llama"))


def test_64_models_have_a_row_each() -> None:
    shown = table(snapshots.sleepers(64))
    assert len(shown.rows) == 64
    assert shown.note == "48 of 64 asleep"


def tone(snapshot: BoxSnapshot, model: str, column: str) -> Tone:
    shown = table(snapshot)
    index = [each.key for each in shown.columns].index(column)
    return next(row for row in shown.rows if row.key == model).cells[index].tone


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_no_snapshot_breaks_it(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    shown = table(snapshot)
    for row in shown.rows:
        assert len(row.cells) == len(shown.columns)
        assert all(cell.text == one_line(cell.text) for cell in row.cells)
        assert "\x1b" not in text(VIEW.detail(snapshots.frame(snapshot), MODELS, row.key))
