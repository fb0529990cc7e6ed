"""Sleep and wake over HTTP: what is asked of the supervisor, and what becomes of its word."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from frontend_peers import MODEL, Connection, FrontendUnderTest, scenario

from dynamo_box.protocol import status
from dynamo_box.protocol.residency import Residency

SLEEP, WAKE = f"/v1/models/{MODEL}/sleep", f"/v1/models/{MODEL}/wake"


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_an_act_is_relayed_and_its_end_is_the_answer(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            answer = box.post(raw({"to": "disk", "force": True, "hold": True, "drain_s": 2}), SLEEP)
            asked = await box.asked()
            assert asked == status.Asked(asked.id, "sleep", MODEL, "disk", force=True, hold=True, drain_s=2.0)
            residency = Residency(MODEL, "asleep", "disk", held=True, sleep_phases={"total": 0.5})
            box.supervisor.send(status.Told(asked.id, 0, "tiny sleeps", residency=residency))
            body = (await answer).json()
            assert (body["model"], body["state"], body["place"], body["text"]) == (
                MODEL,
                "asleep",
                "disk",
                "tiny sleeps",
            )
            assert body["sleep_phases"] == {"total": 0.5}
            # The supervisor's word in the answer counts: no second news is needed.
            assert (await box.get(f"/v1/models/{MODEL}")).json()["state"] == "asleep"

            for nothing in (b"", b"{}", b" \n"):
                answer = box.post(nothing, WAKE)
                asked = await box.asked()
                assert (asked.act, asked.on_demand) == ("wake", False)
                box.supervisor.send(status.Told(asked.id, 0, "awake", residency=Residency(MODEL, "awake", "device")))
                box.says("falling_asleep")  # comes with the answer, and is newer than what that says
                assert ((await answer).status, (await answer).json()["state"]) == (200, "awake")
                assert (await box.get(f"/v1/models/{MODEL}")).json()["state"] == "falling_asleep"
            answer = box.post(b"", SLEEP)
            asked = await box.asked()
            assert (asked.to, asked.force, asked.hold, asked.drain_s) == (None, False, False, 30.0)
            box.supervisor.send(status.Told(asked.id, 0, "tiny sleeps"))
            assert (await answer).json() == {"model": MODEL, "text": "tiny sleeps"}

    scenario(work)


def test_what_is_asked_wrongly_is_refused_by_name(tmp_path: Path, tiny_model: Path) -> None:
    wrong: list[tuple[bytes, str | None]] = [
        (raw({"to": "moon"}), "to"),
        (raw({"to": 3}), "to"),
        (raw({"force": "yes"}), "force"),
        (raw({"hold": 1}), "hold"),
        (raw({"drain_s": -1}), "drain_s"),
        (raw({"drain_s": 1e9}), "drain_s"),
        (raw({"drain": 3}), "drain"),
        (raw([]), None),
        (raw("disk"), None),
        (b"null", None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b'{"drain_s": NaN}', None),
        (b"[" * 100_000, None),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for body, field in wrong:
                answer = await box.post(body, SLEEP)
                assert (answer.status, answer.error["param"]) == (400, field), (body[:40], answer.body)
                if field is not None:
                    assert "'to' (device, host or disk)" in answer.error["message"]
            answer = await box.post(raw({"to": "disk"}), WAKE)
            assert (answer.status, answer.error["param"]) == (400, "to")
            assert "leave the body out" in answer.error["message"]
            answer = await box.post(b"", "/v1/models/tyni/sleep")
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            assert "did you mean tiny?" in answer.error["message"]
            assert (await box.post(b"", "/v1/models/a/b/sleep")).status in (404, 405)
            assert (await box.post(b" " * (9 * 1024 * 1024), SLEEP)).status == 413
            for path in (SLEEP, WAKE):
                answer = await box.get(path)
                assert (answer.status, answer.headers["allow"]) == (405, "post")
                assert "use POST" in answer.error["message"]
            for headers in ({"host": "example.com"}, {"origin": "https://example.com"}):
                assert (await box.post(b"", SLEEP, **headers)).status == 403
            assert not box.heard(status.Asked)

    scenario(work)


def test_failures_have_the_status_that_fits(tmp_path: Path, tiny_model: Path) -> None:
    cases = [
        (SLEEP, 4, "awake", 504, "timeout"),
        (SLEEP, 3, "awake", 503, "unavailable"),
        (SLEEP, 2, "awake", 409, "conflict"),
        (SLEEP, 1, "awake", 409, "conflict"),
        (SLEEP, 1, "asleep", 500, "failed"),
        (WAKE, 1, "asleep", 500, "failed"),
        (WAKE, 2, "asleep", 409, "conflict"),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for path, code, state, http, kind in cases:
                answer = box.post(b"", path)
                asked = await box.asked()
                residency = Residency(MODEL, state)  # type: ignore[arg-type]
                box.supervisor.send(status.Told(asked.id, code, "it went wrong", "try force", residency=residency))
                got = await answer
                assert (got.status, got.error["code"]) == (http, kind), (path, code)
                assert got.error["message"] == "it went wrong; try force"

    scenario(work)


def test_several_at_once_and_one_too_many(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            answers = [box.post(b"", SLEEP) for _ in range(64)]
            asked = [await box.asked() for _ in answers]
            answer = await box.post(b"", WAKE)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            box.supervisor.send(status.Told(10_000, 0, "nobody asked"))
            for each in reversed(asked):
                box.supervisor.send(status.Told(each.id, 0, f"number {each.id}"))
            texts = {(await answer).json()["text"] for answer in answers}
            assert texts == {f"number {each.id}" for each in asked}

    scenario(work)


def test_a_supervisor_that_says_nothing_or_goes_away(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, wake_timeout_s=0.3) as box:
            await box.ready()
            answer = await box.post(b"", WAKE)
            assert (answer.status, answer.error["code"]) == (504, "timeout")
            leaving = await Connection.open(box.port)
            leaving.send("POST", SLEEP, b"")
            await box.expect(status.Asked, lambda asked: asked.act == "sleep")
            leaving.close()
            waiting = box.post(raw({"drain_s": 60}), SLEEP)
            await box.expect(status.Asked, lambda asked: asked.drain_s == 60.0)
            box.supervisor.close()
            assert ((await waiting).status, (await waiting).error["code"]) == (503, "draining")
            assert await box.exit_status() == 0

    scenario(work)


@pytest.mark.parametrize("orders", [[status.Sleep(1, 1.0), status.Move(3, "tiny", "host")]])
def test_orders_that_are_for_others_are_passed_over(
    tmp_path: Path, tiny_model: Path, orders: list[status.ParentMessage]
) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            for order in orders:
                box.supervisor.send(order)
            box.supervisor.send(status.Residencies((Residency("another", "asleep"),)))
            answer = asyncio.ensure_future(box.post({}))
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await answer).status == 200
            assert not box.heard(status.Answer)
            assert [each["id"] for each in (await box.get("/v1/models")).json()["data"]] == [MODEL]

    scenario(work)
