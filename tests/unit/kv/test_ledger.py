"""What a worker's side of the tiers says it has done."""

from __future__ import annotations

import pytest

from dynamo_box.kv.client.jobs import Fetched, Offered
from dynamo_box.kv.client.ledger import RATE_WINDOW_BYTES, Ledger, Rate, Totals


def test_a_rate_is_that_of_the_last_bytes() -> None:
    rate = Rate()
    assert rate.value is None
    rate.add(1000, 0.5)
    assert rate.value == pytest.approx(2000)
    rate.add(3000, 0.5)
    assert rate.value == pytest.approx(4000, rel=1e-3), "weighted by bytes: 4000 in one second"
    for _ in range(40):
        rate.add(RATE_WINDOW_BYTES // 4, 1.0)
    assert rate.value == pytest.approx(RATE_WINDOW_BYTES / 4, rel=1e-3), "what was before has faded out"
    rate.add(10, 1e-9)
    assert rate.value == pytest.approx(RATE_WINDOW_BYTES / 4, rel=1e-3), "a few bytes say little"


def test_bytes_that_took_no_time_are_no_rate() -> None:
    rate = Rate()
    rate.add(1000, 0.0)
    assert rate.value is None


def test_totals() -> None:
    ledger = Ledger()
    assert ledger.totals(0) == Totals()
    ledger.offered(Offered(1, 3, 2, {"store_full": 1}, 300, 0.5))
    ledger.offered(Offered(2, 1, 0, {"store_full": 2, "store_gone": 1}, 100, 0.25))
    ledger.matched("2233")
    ledger.used("22", "3", "3")
    ledger.fetched(Fetched(3, 2, "3", {"2": 200}, {"2": 0.1}))
    ledger.fetched(Fetched(4, 0, "3", {}, {"3": 0.3}))
    assert ledger.totals(7) == Totals(
        stored=4,
        stored_bytes=400,
        store_seconds=0.75,
        known=2,
        queued=7,
        dropped={"store_full": 3, "store_gone": 1},
        matched={"2": 2, "3": 2},
        loaded={"2": 2},
        failed={"3": 1},
        wasted={"3": 1},
        bytes={"2": 200},
        seconds={"2": 0.1, "3": 0.3},
    )
    assert ledger.rates() == {"2": pytest.approx(2000), "3": 0.0}
