"""The KV tiers on the screens: how full, what flows, what is wrong, and nothing at all in a box without them."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import snapshots
from fakes.panels import row, text, tone
from msgspec.structs import replace

from dynamo_box.protocol.figures import KvLayoutFigures, KvStoreFigures, TierFigures
from dynamo_box.snapshot import BoxSnapshot, DiskInfo
from dynamo_box.tui import bars, tiers
from dynamo_box.tui.feed import Feed
from dynamo_box.tui.filter import EVERYTHING, Filter
from dynamo_box.tui.history import History
from dynamo_box.tui.model import Frame, Table, Tone
from dynamo_box.tui.source import NewSnapshot
from dynamo_box.tui.stack import Stack
from dynamo_box.tui.views import fleet, memory, routing
from dynamo_box.tui.views.fleet import PROCESSES
from dynamo_box.tui.views.kv_layout_table import KV_LAYOUTS
from dynamo_box.tui.views.tier_table import TIERS

MIB = 1 << 20
GIB = 1 << 30
TIERED, SUSPENDED = snapshots.tiered(), snapshots.tier_suspended()


def watched(snapshot: BoxSnapshot, seconds: int = 12) -> Frame:
    """After so many seconds in which things flow."""
    history = History()
    for moment in snapshots.moments(snapshot, seconds):
        history.feed(moment)
    return snapshots.frame(moment, history)


def with_store(figures: KvStoreFigures | None, state: str = "ready") -> BoxSnapshot:
    return replace(
        TIERED,
        processes=tuple(
            replace(process, figures=figures, state=state) if process.kind == "kvstore" else process
            for process in TIERED.processes
        ),
    )


def table(frame: Frame, key: str, view: Any = memory.VIEW) -> Table:
    found = next(panel for panel in view.panels(frame, 200) if panel.key == key)
    assert isinstance(found, Table)
    return found


def screen(frame: Frame, width: int, height: int, view: Any = memory.VIEW) -> str:
    stack = Stack()
    stack.show(view.panels(frame, width), EVERYTHING)
    return "\n".join("".join(span.text for span in line.spans) for line in stack.lines(width, height - 3))


class TestMemory:
    def test_each_tier_says_how_full_it_is_and_what_flows(self) -> None:
        found = table(watched(TIERED), TIERS)
        assert row(found, "host") == {
            "tier": "host",
            "state": "on",
            "full": "████░░░░  50%",
            "used": "2.0/4.0 GiB",
            "blocks": "2,890",
            "in": "device→host 120 MiB/s",
            "out": "host→device 452 MiB/s",
            "hit": "52%",
            "evicted": "6,545",
            "dropped": "12",
            "failed": "-",
            "queued": "-",
        }
        disk = row(found, "disk")
        assert (disk["in"], disk["out"]) == ("host→disk 84.0 MiB/s", "disk→host 31.0 MiB/s")
        assert (disk["dropped"], disk["failed"], disk["queued"]) == ("310", "2", "64")
        assert tone(found, "disk", "failed") is Tone.BAD
        assert found.note == "2 leases"

    def test_at_first_sight_nothing_is_known_to_flow(self) -> None:
        keys = [column.key for column in table(snapshots.frame(TIERED), TIERS).columns]
        assert "in" not in keys
        assert "out" not in keys

    def test_a_suspended_tier_says_why(self) -> None:
        found = table(watched(SUSPENDED), TIERS)
        disk = row(found, "disk")
        assert disk["state"] == "suspended"
        assert disk["reason"] == "no space left on device: /home/u/.local/share/dynbox/kv"
        assert tone(found, "disk", "state") is tone(found, "disk", "reason") is Tone.WARN
        assert disk["in"] == "host→disk 0 B/s"

    def test_a_tier_that_nobody_asked_for_is_off_and_has_no_figures(self) -> None:
        found = table(snapshots.frame(with_store(snapshots.store(state="off", hits=0, lookups=0, used_bytes=0))), TIERS)
        disk = row(found, "disk")
        assert disk.pop("tier") == "disk"
        assert disk.pop("state") == "off"
        assert {disk[key] for key in ("used", "blocks", "hit", "evicted", "dropped")} == {"-"}

    def test_layouts_are_named_after_the_model_or_else_by_fingerprint(self) -> None:
        found = table(snapshots.frame(TIERED), KV_LAYOUTS)
        served, gone = (row(found, each.key) for each in found.rows)
        assert served["layout"] == "smollm2"
        assert (served["host"], served["disk"], served["leased"], served["dtype"]) == (
            "2,890/5,825",
            "21,300",
            "22",
            "float32",
        )
        assert (gone["layout"], gone["host"], gone["owners"]) == ("17f0a3bb2c5d9e61", "-", "0")

    @pytest.mark.parametrize(
        ("state", "empty"), [("starting", "kvstore is starting and"), ("backoff", "kvstore is backoff and")]
    )
    def test_a_store_that_says_nothing_is_said_to(self, state: str, empty: str) -> None:
        frame = snapshots.frame(with_store(None, state))
        found = table(frame, TIERS)
        assert found.rows == ()
        assert found.empty == f"{empty} has reported nothing yet."
        assert KV_LAYOUTS not in [panel.key for panel in memory.VIEW.panels(frame, 80)]

    def test_80_columns_show_both_tiers_what_flows_and_why_one_is_off(self) -> None:
        shown = screen(watched(TIERED), 80, 24)
        for said in ("50%", "51%", "device→host", "host→device", "host→disk", "disk→host", "KV LAYOUT", "21,300"):
            assert said in shown
        shown = screen(watched(SUSPENDED), 80, 24)
        for said in ("suspended", "no space left", "device→host", "host→device"):
            assert said in shown

    def test_the_filter_works_on_tiers_as_on_any_table(self) -> None:
        stack = Stack()
        stack.show(memory.VIEW.panels(watched(SUSPENDED), 120), Filter.parse("suspended"))
        found = {pane.key: len(pane.rows) for pane in stack.tables}
        assert found == {"places": 0, TIERS: 1, KV_LAYOUTS: 0, "layouts": 0}

    def test_details(self) -> None:
        frame = watched(SUSPENDED)
        disk = text(memory.VIEW.detail(frame, TIERS, "disk"))
        for said in ("no space left on device", "4,000", "queue full", "smollm2.aggregated.1", "/home/u/.local"):
            assert said in disk
        assert disk.index("4,000") < disk.index("310"), "the most frequent reason first"
        flowing = text(memory.VIEW.detail(watched(TIERED), TIERS, "host"))
        assert "device→host    120 MiB/s" in flowing
        assert flowing.count("█") > 8, "the last minutes are drawn"
        layout = text(memory.VIEW.detail(frame, KV_LAYOUTS, "5f" * 16))
        assert "720 KiB (737,280 B)" in layout
        assert memory.VIEW.detail(frame, TIERS, "tape") is None
        assert memory.VIEW.detail(frame, KV_LAYOUTS, "gone") is None
        assert memory.VIEW.detail(snapshots.frame(snapshots.busy()), TIERS, "host") is None

    def test_a_place_names_the_store_among_those_who_hold_it(self) -> None:
        host = text(memory.VIEW.detail(snapshots.frame(TIERED), "places", "host"))
        (store,) = [line for line in host.splitlines() if line.startswith("kvstore")]
        assert "2.0 GiB" in store
        assert "2,130,739,200" in host


class TestOthers:
    def test_the_row_of_a_store(self) -> None:
        found = row(table(snapshots.frame(TIERED), PROCESSES, fleet.VIEW), "kvstore")
        assert (found["state"], found["kv"], found["hit"], found["other"]) == (
            "ready",
            "2.0/4.0 GiB",
            "73%",
            "2.1 GiB",
        )

    def test_a_suspended_tier_is_seen_from_every_screen(self) -> None:
        found = table(snapshots.frame(SUSPENDED), PROCESSES, fleet.VIEW)
        assert row(found, "kvstore")["state"] == "disk suspended"
        assert "no space left" in row(found, "kvstore")["cause"]
        assert tone(found, "kvstore", "state") is Tone.WARN
        for snapshot, said in ((SUSPENDED, True), (TIERED, False)):
            feed = Feed(live=False)
            feed.take(NewSnapshot(snapshot), snapshots.NOW)
            line = "".join(span.text for span in bars.status(feed, snapshots.NOW, (), 80).spans)
            assert ("disk tier suspended" in line) is said

    def test_a_store_that_is_not_ready_says_that_first(self) -> None:
        down = with_store(snapshots.store(state="suspended"), "draining")
        assert row(table(snapshots.frame(down), PROCESSES, fleet.VIEW), "kvstore")["state"] == "draining"

    def test_the_detail_of_a_store(self) -> None:
        store = text(fleet.VIEW.detail(watched(SUSPENDED), PROCESSES, "kvstore"))
        for said in ("Host tier", "Disk tier", "suspended", "21,000 of 40,000  52%", "4,000 suspended, 310 queue full",
                     "reclaimed from the dead", "Flows now"):  # fmt: skip
            assert said in store
        off = text(fleet.VIEW.detail(snapshots.frame(with_store(snapshots.store(state="off"))), PROCESSES, "kvstore"))
        assert off.partition("Disk tier")[2].split()[:2] == ["state", "off"]
        assert "found of those asked for" not in off.partition("Disk tier")[2]

    def test_the_detail_of_a_worker(self) -> None:
        name = "smollm2.aggregated.0"
        worker = text(fleet.VIEW.detail(snapshots.frame(TIERED), PROCESSES, name))
        for said in (
            "KV offload",
            "31 evicted, 7 queue full",
            "9 priority",
            "lowest priority offloaded  20",
            "connected",
        ):
            assert said in worker
        (host,) = [line.split() for line in worker.splitlines() if line.startswith("host ")]
        assert host[1:5] == ["168,000", "163,200", "0", "4,800"]
        without = text(fleet.VIEW.detail(snapshots.frame(snapshots.busy()), PROCESSES, "llama.aggregated.0"))
        assert "KV offload" not in without
        assert "tiers" not in without

    @pytest.mark.parametrize(
        "kind", sorted(set(snapshots.all_kinds()) - {"tiered", "tier_suspended", "disaggregated", "hostile", "gaps"})
    )
    def test_a_box_without_tiers_shows_nothing_of_them(self, kind: str) -> None:
        frame = snapshots.frame(snapshots.all_kinds()[kind])
        for view in (memory.VIEW, routing.VIEW, fleet.VIEW):
            panels = view.panels(frame, 200)
            assert not {TIERS, KV_LAYOUTS} & {panel.key for panel in panels}
            for found in (panel for panel in panels if isinstance(panel, Table)):
                columns = {column.key for column in found.columns}
                assert not columns & {"host", "disk", "prompt"}
                assert "tier" not in columns or not found.rows
            assert "tiers" not in screen(frame, 200, 60, view)

    @pytest.mark.parametrize("kind", ["tiered", "tier_suspended", "hostile", "gaps"])
    def test_no_name_has_power_over_the_terminal(self, kind: str) -> None:
        frame = watched(snapshots.all_kinds()[kind])
        texts = []
        for view in (memory.VIEW, fleet.VIEW):
            for found in view.panels(frame, 120):
                if isinstance(found, Table):
                    texts += [cell.text for each in found.rows for cell in each.cells]
                    texts += [text(view.detail(frame, found.key, each.key)) for each in found.rows]
        assert texts
        assert not [each for each in texts if "\x1b" in each or "\u202e" in each or "\r" in each]


class TestWords:
    def test_the_disk_of_a_directory_is_the_innermost_that_holds_it(self) -> None:
        root, home, scratch = (DiskInfo(path, purpose, 1, 1) for path, purpose in
                               (("/", "logs"), ("/home", "models"), ("/scratch", "KV tier")))  # fmt: skip
        disks = (root, home, scratch)
        assert tiers.disk_of(disks, "/home/u/kv") is home
        assert tiers.disk_of(disks, "/homes/kv") is root
        assert tiers.disk_of((home, scratch), "/var/kv") is scratch, "a link: its purpose tells"
        assert tiers.disk_of((home,), "") is home
        assert tiers.disk_of((root, home), "") is None
        assert tiers.disk_of((), "/x") is None

    def test_a_hit_rate_of_both_tiers(self) -> None:
        def rate(host: tuple[int, int], disk: tuple[int, int]) -> float | None:
            one, other = (TierFigures("on", lookups=lookups, hits=hits) for hits, lookups in (host, disk))
            return tiers.hit_rate(KvStoreFigures(one, other))

        assert rate((0, 0), (0, 0)) is None
        assert rate((5, 10), (2, 5)) == 0.7
        assert rate((5, 5), (5, 5)) == 1.0

    def test_layouts_of_many_workers_name_their_models_once(self) -> None:
        layout = KvLayoutFigures("a", "f", "float32", 16, 1, ("smollm2.aggregated.1", "smollm2.aggregated.0", "gone"))
        assert tiers.models_of(TIERED, layout.owners) == ["smollm2"]
