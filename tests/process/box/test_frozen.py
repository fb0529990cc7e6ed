"""A process that is alive but frozen holds the requests that it was given: it is found, killed and replaced."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from box_under_test import Box, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("kind", ["worker", "router", "frontend"])
def test_a_frozen_process_is_replaced_and_clients_are_answered(mock_box: Box, kind: str) -> None:
    victim = next(each for each in mock_box.ps()["processes"] if each["kind"] == kind)
    client = mock_box.client(timeout=120)
    os.kill(victim["pid"], signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(client.completions.create, model="tiny", prompt=f"{number} hello", max_tokens=3)
            for number in range(8)
        ]

        def replaced() -> bool:
            now = mock_box.process(victim["name"])
            return bool(now["state"] == "ready" and now["pid"] != victim["pid"] and now["restarts"] == 1)

        eventually(replaced, f"{victim['name']} was replaced")
        for each in asked:
            if kind == "router":
                each.exception(timeout=120)
            else:
                assert each.result(timeout=120).usage is not None
    events = mock_box.ps()["events"]
    assert any("no sign of life" in event["text"] for event in events if event["process"] == victim["name"])
