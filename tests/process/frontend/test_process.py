"""The process under its supervisor: start, drain, stop, and starts that fail."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import msgspec
from frontend_peers import DEADLINE_S, Connection, FrontendUnderTest, eventually, scenario

from dynamo_box.protocol import status


def test_it_reports_its_start_and_becomes_healthy_with_router_and_worker(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            assert (await box.expect(status.Starting)).phase == "tokenizer of tiny"
            await box.expect(status.Ready)
            health = await box.get("/health")
            assert health.status == 503
            assert health.json()["reasons"] == ["no worker serves tiny", "the router is not connected"]
            assert (await box.get("/live")).status == 200
            assert (await box.get("/v1/models")).json()["data"] == []
            assert (await box.get("/v1/models/tiny")).status == 404
            await box.ready_again()
            healthy = {"status": "healthy", "reasons": [], "models": ["tiny"], "roles": {"tiny": {"aggregated": 1}}}
            assert (await box.get("/health")).json() == healthy
            assert [each["id"] for each in (await box.get("/v1/models")).json()["data"]] == ["tiny"]
            assert (await box.get("/v1/models/tiny")).json()["object"] == "model"

    scenario(work)


def test_a_worker_that_has_announced_itself_is_known_to_whoever_asks(tmp_path: Path, tiny_model: Path) -> None:
    """It calls itself ready next: from then on `/health` and the list of models have it, with no moment in between."""

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            for life in range(5):
                worker.withdraw()
                await box.until_health_is(503)
                worker.announce(kv_blocks_total=65 + life)
                health = (await box.get("/health")).json()
                assert (health["status"], health["roles"]) == ("healthy", {"tiny": {"aggregated": 1}})
                worker.withdraw()
                await box.until_health_is(503)
                worker.announce(kv_blocks_total=75 + life)
                assert [each["id"] for each in (await box.get("/v1/models")).json()["data"]] == ["tiny"]

    scenario(work)


def test_a_drain_finishes_what_runs_and_turns_the_rest_away(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            unasked, idle = await Connection.open(box.port), await Connection.open(box.port)
            idle.send("GET", "/live")
            assert (await idle.answer()).status == 200
            running = box.post({"stream": True})
            generate = await worker.generated()
            box.supervisor.send(status.Drain(DEADLINE_S))
            assert (await box.expect(status.Draining)).in_flight == 1
            assert await idle.at_end()
            unasked.send("POST", "/v1/chat/completions", b"{}")
            answer = await unasked.answer()
            assert (answer.status, answer.error["code"]) == (503, "draining")
            assert answer.error["message"] == "this frontend is stopping or restarting; try again"
            assert answer.headers["connection"] == "close"
            assert await unasked.at_end()
            unasked.close()
            idle.close()
            worker.emit(generate, "to the end", finish="stop")
            assert (await running).events[-1] == "[DONE]"
            assert (await box.expect(status.Draining)).in_flight == 0
            assert await box.exit_status() == 0

    scenario(work)


def test_who_connects_after_a_drain_began_is_served_by_the_next_process(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            running = box.post({"stream": True})
            generate = await worker.generated()
            box.supervisor.send(status.Drain(DEADLINE_S))
            await box.expect(status.Draining)
            early = box.post({})
            worker.emit(generate, "old", finish="length")
            assert (await running).text() == "old"
            assert await box.exit_status() == 0
            assert not early.done()
            box.supervisor.close()
            await box.start()
            worker.emit(await worker.generated(), "new", finish="length")
            answer = await early
            assert (answer.status, answer.json()["choices"][0]["message"]["content"]) == (200, "new")

    scenario(work)


def test_an_idle_frontend_reports_all_the_same(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            latest: list[status.Report] = []

            def told_again(report: status.Report) -> bool:
                latest.append(report)
                return latest[-2:] == [report, report]

            await box.expect(status.Report, told_again)

    scenario(work)


def test_what_is_left_at_the_deadline_gets_an_error(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            streamed = box.post({"stream": True})
            worker.emit(await worker.generated(), "half")
            await eventually(lambda: len(box.router.prefilled) == 1, "the client has the first token")
            whole = box.post({})
            await worker.generated()
            box.supervisor.send(status.Drain(0.2))
            errors = [(await streamed).chunks()[-1]["error"]["code"], (await whole).error["code"]]
            assert errors == ["draining", "draining"]
            await eventually(lambda: not box.router.leases, "the leases are back")
            assert await box.exit_status() == 0

    scenario(work)


def test_stop_sigterm_and_the_end_of_the_supervisor_end_it(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            running = box.post({"stream": True})
            worker.emit(await worker.generated(), "half")
            await eventually(lambda: len(box.router.prefilled) == 1, "the client has the first token")
            box.process.send_signal(signal.SIGINT)  # the supervisor's to answer
            assert (await box.get("/live")).status == 200
            box.process.send_signal(signal.SIGTERM)
            assert await box.exit_status() == 0
            assert (await running).chunks()[-1]["error"]["code"] == "draining"
            box.supervisor.close()

            await box.start()
            await box.expect(status.Ready)
            box.supervisor.send(status.Stop())
            assert await box.exit_status() == 0
            box.supervisor.close()

            await box.start()
            await box.expect(status.Ready)
            box.supervisor.close()
            assert await box.exit_status() == 0

    scenario(work)


def test_a_killed_frontend_comes_back_on_the_same_port_and_finds_everyone(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            box.process.kill()
            await box.exit_status()
            box.supervisor.close()
            early = asyncio.create_task(box.get("/live"))  # waits in the backlog of the inherited socket
            await box.start()
            assert (await early).status == 200
            await box.until_healthy()
            answering = box.post({})
            worker.emit(await worker.generated(), "again", finish="length")
            assert (await answering).json()["choices"][0]["message"]["content"] == "again"

    scenario(work)


def test_a_start_that_can_not_work_says_why(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.expect(status.Ready)
            box.supervisor.close()
            await box.exit_status()
            good = box.spec()
            model = msgspec.structs.replace(good.models[0], path=str(tmp_path / "nowhere"))
            await box.start(msgspec.structs.replace(good, models=(model,)))
            failed = await box.expect(status.Failed)
            assert "nowhere" in failed.cause
            assert failed.permanent
            assert await box.exit_status() == 1

    scenario(work)


def test_an_unknown_setting_is_answered_with_an_error(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.expect(status.Ready)
            box.supervisor.send(status.Set(7, "mode", "kv"))
            answer = await box.expect(status.Answer)
            assert (answer.id, "no setting 'mode'" in answer.error) == (7, True)

    scenario(work)
