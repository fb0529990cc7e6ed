"""The models screen, from snapshots."""

from __future__ import annotations

import pytest
from fakes import snapshots
from msgspec.structs import replace

from dynamo_box.snapshot import BoxSnapshot, ModelInfo
from dynamo_box.tui.model import Lines, Table, Tone
from dynamo_box.tui.text import one_line
from dynamo_box.tui.views import models
from dynamo_box.tui.views.models import MODELS

VIEW = models.VIEW


def table(snapshot: BoxSnapshot) -> Table:
    (found,) = VIEW.panels(snapshots.frame(snapshot), 120)
    assert isinstance(found, Table)
    return found


def row(snapshot: BoxSnapshot, model: str) -> dict[str, str]:
    shown = table(snapshot)
    found = next(row for row in shown.rows if row.key == model)
    return {column.key: cell.text for column, cell in zip(shown.columns, found.cells, strict=True)}


def text(lines: Lines | None) -> str:
    assert lines is not None
    return "\n".join("".join(span.text for span in line) for line in lines.lines)


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
    assert shown.rows[0].cells[index] == ("4/8", Tone.WARN, 4)


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


@pytest.mark.parametrize("kind", snapshots.all_kinds())
def test_no_snapshot_breaks_it(kind: str) -> None:
    snapshot = snapshots.all_kinds()[kind]
    shown = table(snapshot)
    for row in shown.rows:
        assert len(row.cells) == len(shown.columns)
        assert all(cell.text == one_line(cell.text) for cell in row.cells)
        assert "\x1b" not in text(VIEW.detail(snapshots.frame(snapshot), MODELS, row.key))
