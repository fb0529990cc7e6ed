"""However a request ends, the client hears of it, the worker stops, and the router gets its lease back."""

from __future__ import annotations

import asyncio
import json
import operator
import time
from pathlib import Path

from frontend_peers import MODEL, Connection, FrontendUnderTest, eventually, scenario

from dynamo_box.protocol import status
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.request import Delta


def test_a_client_that_leaves_cancels_its_sequence(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            for stream, tokens in ((True, 3), (True, 0), (False, 3), (False, 0)):
                connection = await box.request({"stream": stream})
                generate = await worker.generated()
                for _ in range(tokens):
                    worker.send(Delta(generate.id, (70,)))
                if stream and tokens:
                    await connection.head()
                connection.close()
                worker.cancels.clear()
                await worker.cancels.wait()
                assert worker.cancelled.pop() == generate.id
                await box.nothing_left()
            metrics = (await box.get("/metrics")).body.decode()
            assert 'dynamo_frontend_disconnected_clients_total{model="tiny"} 4.0' in metrics

    scenario(work)


def test_a_client_that_leaves_while_there_is_no_router_is_let_go(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            box.router.silent = True
            connection = await box.request({})
            await eventually(lambda: len(box.router.places) == 1, "it asks the router")
            connection.close()
            await box.expect(status.Report, lambda report: _figures(report).disconnected == 1)
            await box.nothing_left()

    scenario(work)


def test_a_frozen_router_is_given_up_and_what_it_places_late_is_released(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, discovery_timeout_s=0.5) as box:
            await box.ready()
            box.router.silent = True
            answer = await box.post({})
            assert (answer.status, answer.error["code"]) == (503, "unavailable")
            assert "the router doesn't answer" in answer.error["message"]
            box.router.answer_late()
            assert box.router.leases
            await box.nothing_left()

    scenario(work)


def test_before_the_first_token_a_lost_worker_is_replaced_unseen(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            answering = box.post({"stream": True})
            await first.generated()
            first.close()
            generate = await second.generated()
            assert box.router.places[-1].exclude == ("w0",)
            second.emit(generate, "fine", finish="length")
            answer = await answering
            assert answer.text() == "fine"
            assert answer.headers["x-dynbox-worker"] == "w1"
            await box.nothing_left()

    scenario(work)


def test_an_error_before_the_first_token_is_tried_elsewhere_but_a_rejection_is_not(
    tmp_path: Path, tiny_model: Path
) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            answering = box.post({})
            generate = await first.generated()
            first.send(Delta(generate.id, (), "error", error="this worker drains"))
            second.emit(await second.generated(), "fine", finish="length")
            assert (await answering).status == 200

            answering = box.post({})
            generate = await first.generated()
            first.send(Delta(generate.id, (), "error", error="top_k is not for me", rejected=True))
            answer = await answering
            assert answer.status == 400
            assert "top_k is not for me" in answer.error["message"]
            await box.nothing_left()

    scenario(work)


def test_an_answer_that_nobody_can_go_on_with_is_an_error_never_silence(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, discovery_timeout_s=3.0) as box:
            (worker,) = await box.ready()
            streamed, whole = box.post({"stream": True}), box.post({})
            for _ in range(2):
                worker.emit(await worker.generated(), "half")
            await eventually(lambda: len(box.router.prefilled) == 2, "both got their first token")
            worker.close()
            answer = await streamed
            error = answer.chunks()[-1]["error"]
            assert (answer.status, error["code"]) == (200, "worker_lost")
            for word in ("worker w0", "its connection closed", "none is left"):
                assert word in error["message"]
            assert "[DONE]" not in answer.events
            answer = await whole
            assert (answer.status, answer.error["code"]) == (502, "worker_lost")
            await box.nothing_left()
            second = await box.add_worker("w1")
            await box.until_healthy()
            after = box.post({})
            second.emit(await second.generated(), "still here", finish="length")
            assert (await after).status == 200

    scenario(work)


def test_an_engine_error_in_mid_stream_is_told_if_nobody_else_is_there(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, discovery_timeout_s=3.0) as box:
            (worker,) = await box.ready()
            answering = box.post({"stream": True})
            generate = await worker.generated()
            worker.emit(generate, "half")
            worker.send(Delta(generate.id, (), "error", error="out of blocks"))
            error = (await answering).chunks()[-1]["error"]
            assert error["code"] == "worker_failed"
            assert "out of blocks" in error["message"]
            await box.nothing_left()

    scenario(work)


def test_a_worker_that_withdraws_may_finish_what_runs(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({"stream": True})
            generate = await worker.generated()
            worker.withdraw()
            await box.until_health_is(503)
            worker.emit(generate, "to the end", finish="stop")
            assert (await answering).events[-1] == "[DONE]"
            await box.nothing_left()

    scenario(work)


def test_a_router_that_restarts_is_told_what_runs(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            running = box.post({"stream": True})
            generate = await worker.generated()
            worker.emit(generate, "one ")
            await eventually(lambda: len(box.router.prefilled) == 1, "the first token is there")
            box.router.close()
            waiting = box.post({})  # its placement has to wait for the new router
            await box.router.listen()
            other = await worker.generated()
            assert [(each.worker, each.prefill_done) for each in box.router.adopted] == [("w0", True)]
            assert box.router.adopted[0].prompt_tokens == len(generate.tokens) // 4
            worker.emit(generate, "two", finish="length")
            worker.emit(other, "three", finish="length")
            assert (await running).text() == "one two"
            assert (await waiting).status == 200
            await box.nothing_left()

    scenario(work)


def test_without_router_or_worker_the_answer_is_503_after_a_bounded_wait(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, discovery_timeout_s=3.0) as box:
            await box.expect(status.Ready)
            answer = await box.post({})
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "no worker" in answer.error["message"]
            (worker,) = await box.ready_again()
            box.router.close()
            answer = await box.post({})
            assert answer.status == 503
            assert "router" in answer.error["message"]
            worker.withdraw()
            reasons = (await box.get("/health")).json()["reasons"]
            assert "the router is not connected" in reasons

    scenario(work)


def test_a_request_in_which_nothing_moves_is_ended(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, stall_limit_s=3.0) as box:
            (worker,) = await box.ready()
            streamed, whole = box.post({"stream": True}), box.post({})
            for _ in range(2):
                worker.emit(await worker.generated(), "half")
            assert (await streamed).chunks()[-1]["error"]["code"] == "stalled"
            assert (await whole).status == 504
            await eventually(lambda: len(worker.cancelled) == 2, "both are cancelled on the worker")
            await box.nothing_left()

    scenario(work)


def test_a_request_that_waits_for_its_turn_is_no_stall(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, stall_limit_s=2.0) as box:
            (worker,) = await box.ready()
            for _ in range(10):
                busy = box.post({"stream": True})
                running = await worker.generated()
                queued = box.post({})
                waiting = await worker.generated()
                sent_at = [time.monotonic()]
                for _ in range(12):
                    worker.send(Delta(running.id, (70,)))
                    await asyncio.sleep(0.2)  # the pace of a busy worker, not a wait for anything
                    sent_at.append(time.monotonic())
                worker.send(Delta(running.id, (), "length"))
                worker.emit(waiting, "my turn", finish="length")
                answers = await busy, await queued
                if max(map(operator.sub, sent_at[1:], sent_at)) < 1.0:  # else the test was held up, and no such worker
                    break
            assert answers[0].events[-1] == "[DONE]"
            assert answers[1].status == 200

    scenario(work)


def test_a_client_that_does_not_read_is_let_go(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, stall_limit_s=0.5) as box:
            (worker,) = await box.ready()
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
            connection = await Connection.open_narrow(box.port)
            connection.send("POST", "/v1/chat/completions", json.dumps(body).encode())
            generate = await worker.generated()
            (token,) = worker.ids(" the")
            for _ in range(80):  # more at once than any socket holds
                worker.send(*[Delta(generate.id, (token,) * 200) for _ in range(100)])
            assert (await connection.head()).status == 200
            await worker.cancels.wait()
            await box.nothing_left()
            (ended,) = [line for line in box.log.read_text().splitlines() if "client gone" in line]
            assert json.loads(ended)["status"] == 499, "it was not the worker who said nothing"
            connection.close()

    scenario(work)


def test_the_operator_cancels_by_request_id(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({"stream": True}, x_request_id="mine")
            worker.emit(await worker.generated(), "half")
            report = await box.expect(status.Report, lambda report: bool(_figures(report).output_tokens))
            (live,) = _figures(report).live
            assert (live.request_id, live.worker, live.phase) == ("mine", "w0", "decode")
            box.supervisor.send(status.CancelRequest(1, "mine"))
            assert (await box.expect(status.Answer)).error == ""
            assert (await answering).chunks()[-1]["error"]["code"] == "cancelled"
            await worker.cancels.wait()
            box.supervisor.send(status.CancelRequest(2, "mine"))
            assert "no live request" in (await box.expect(status.Answer)).error
            await box.nothing_left()

    scenario(work)


def test_one_request_more_than_the_queue_holds_is_turned_away(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, max_queue=2) as box:
            (worker,) = await box.ready()
            admitted = [box.post({}, x_request_id="same"), box.post({}, x_request_id="same")]
            generates = [await worker.generated() for _ in admitted]
            answer = await box.post({})
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
            assert answer.headers["retry-after"] == "1"
            for generate in generates:
                worker.emit(generate, "x", finish="length")
            assert [(await each).status for each in admitted] == [200, 200]
            await box.nothing_left()

    scenario(work)


def _figures(report: status.Report) -> FrontendFigures:
    assert isinstance(report.figures, FrontendFigures)
    return report.figures
