"""Requests to models that sleep: they wait, the model is woken once, and every ending is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
from frontend_peers import DEADLINE_S, MODEL, Connection, FakeWorker, FrontendUnderTest, eventually, scenario

from dynamo_box.protocol import status
from dynamo_box.protocol.figures import FrontendFigures
from dynamo_box.protocol.request import Delta

COMMENT = b": waking tiny (restoring weights, "


async def fell_asleep(box: FrontendUnderTest, worker: FakeWorker, **more: object) -> None:
    """As it goes with an engine that can sleep: the worker lives on, withdrawn."""
    box.says("falling_asleep", **more)
    worker.withdraw()
    box.router.workers.remove(worker.name)
    await box.asleep(**more)


def woke(box: FrontendUnderTest, worker: FakeWorker) -> None:
    worker.announce()
    box.router.workers.append(worker.name)
    box.says("awake", place="device", wakes=1)


def test_a_request_wakes_its_model_once_and_waits(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker, place="host")
            answers = [box.post({}), box.post({"stream": True}), box.post({"prompt": "x"}, "/v1/completions")]
            asked = await box.asked()
            assert (asked.act, asked.model, asked.on_demand) == ("wake", MODEL, True)
            await box.waiting(3)
            box.says("waking", phase="restoring weights")
            woke(box, worker)
            for _ in answers:
                worker.emit(await worker.generated(), "hello", finish="length")
            assert [(await answer).status for answer in answers] == [200, 200, 200]
            await box.waiting(0)
            assert not [each for each in box.heard(status.Asked) if each.id != asked.id]
            await box.nothing_left()
            metrics = (await box.get("/metrics")).body.decode()
            assert 'dynbox_frontend_wake_wait_seconds_count{model="tiny"} 3.0' in metrics

    scenario(work)


def test_from_awake_to_placed_nothing_polls(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            clock = asyncio.get_running_loop().time
            took = []
            for _ in range(5):
                began = clock()
                for _ in range(2):
                    await box.get("/live")
                machine_s = clock() - began  # as many hops as between news and generation
                await fell_asleep(box, worker)
                answer = box.post({})
                await box.asked()
                box.says("waking")
                began = clock()
                woke(box, worker)
                generate = await worker.generated()
                took.append((clock() - began, machine_s))
                worker.emit(generate, "hello", finish="length")
                assert (await answer).status == 200
            assert min(each - machine_s for each, machine_s in took) < 0.05, took

    scenario(work)


def test_what_a_stream_hears_while_it_waits(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, stall_limit_s=1.2) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            connection = await box.request({"stream": True}, x_request_id="sleepy")
            whole = box.post({})
            await box.asked()
            box.says("waking", phase="restoring\nweights")
            head = await connection.head()
            assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            comments = [await connection.chunk() for _ in range(3)]  # the last one after twice the limit
            assert all(each.startswith(COMMENT) and each.endswith(b" s)\n\n") for each in comments), comments
            report = await box.expect(status.Report, lambda report: len(_figures(report).live) == 2)
            assert {(live.phase, live.worker) for live in _figures(report).live} == {("waking", None)}
            woke(box, worker)
            for _ in range(2):
                worker.emit(await worker.generated(), "hello", finish="length")
            rest = b""
            while piece := await connection.chunk():
                rest += piece
            events = [line for line in rest.split(b"\n\n") if line.startswith(b"data: {")]
            assert json.loads(events[0][6:])["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert rest.endswith(b"data: [DONE]\n\n")
            assert (await whole).status == 200
            connection.close()
            await box.nothing_left()

    scenario(work)


def test_openais_client_waits_too(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker, place="host")
            client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{box.port}/v1", api_key="none", max_retries=0)
            async with client:
                (listed,) = (await client.models.list()).data
                assert (listed.id, listed.model_extra) == (MODEL, {"state": "asleep", "place": "host"})

                async def ask() -> str:
                    stream = await client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
                    )
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

                asking = asyncio.create_task(ask())
                await box.asked()
                box.says("waking")
                # Two signs of life are on their way to the client before the model wakes.
                raw = await box.request({"stream": True})
                await raw.head()
                await raw.chunk()
                await raw.chunk()
                raw.close()
                woke(box, worker)
                worker.emit(await worker.generated(), "hello there", finish="length")
                assert await asking == "hello there"

    scenario(work)


def test_one_more_than_may_wait_is_turned_away(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            admitted = [box.post({}) for _ in range(256)]
            await box.waiting(256)
            for stream in (False, True):
                answer = await box.post({"stream": stream})
                assert (answer.status, answer.error["code"]) == (503, "overloaded")
                assert int(answer.headers["retry-after"]) >= 1
                assert "256 requests wait for tiny" in answer.error["message"]
            metrics = (await box.get("/metrics")).body.decode()
            assert 'dynbox_frontend_waking_requests{model="tiny"} 256.0' in metrics
            assert 'dynbox_frontend_wake_refused_total{model="tiny"} 2.0' in metrics
            woke(box, worker)
            for _ in admitted:
                worker.emit(await worker.generated(), "x", finish="length")
            assert {(await answer).status for answer in admitted} == {200}
            await box.nothing_left()

    scenario(work)


def test_a_wake_that_takes_too_long(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, wake_timeout_s=3.0) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            whole, streamed = box.post({}), box.post({"stream": True})
            await box.asked()
            box.says("waking", phase="cold start")
            answer = await whole
            assert (answer.status, answer.error["code"]) == (503, "wake_timeout")
            assert "retry-after" in answer.headers
            assert "within 3 s (cold start)" in answer.error["message"]
            answer = await streamed
            assert answer.status == 200  # a sign of life had been given
            assert answer.chunks()[-1]["error"]["code"] == "wake_timeout"
            await box.nothing_left()

    scenario(work)


def test_a_client_that_leaves_leaves_the_queue(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, max_waking=2) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            leaving = [await box.request({"stream": stream}) for stream in (False, True)]
            await box.waiting(2)
            for connection in leaving:
                connection.close()
            await box.waiting(0)
            staying = box.post({})
            await box.waiting(1)
            woke(box, worker)
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await staying).status == 200
            await box.nothing_left()

    scenario(work)


def test_only_a_person_wakes_a_held_model(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker, held=True)
            answer = await box.post({})
            assert (answer.status, answer.error["code"]) == (503, "model_held")
            assert "`dynbox wake tiny`" in answer.error["message"]
            assert "retry-after" not in answer.headers
            assert answer.headers["x-should-retry"] == "false"
            assert not box.heard(status.Asked)
            # Who waits when it is held is told as well; while a person wakes it, requests wait.
            await box.asleep(held=False)
            waiting = box.post({})
            await box.waiting(1)
            box.says("asleep", held=True)
            assert (await waiting).error["code"] == "model_held"
            box.says("waking", held=True)
            await box.until_state_is("waking")
            waiting = box.post({})
            await box.waiting(1)
            woke(box, worker)
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await waiting).status == 200

    scenario(work)


def test_who_finds_no_room_hears_at_once_that_somebody_has_to_make_it(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            waiting = [box.post({}), box.post({})]
            asked = await box.asked()
            await box.waiting(2)
            box.supervisor.send(status.Told(asked.id, 2, "there is no room: other is pinned", "unpin one"))
            for answer in [await each for each in waiting]:
                assert (answer.status, answer.error["code"]) == (503, "no_room")
                assert answer.error["message"].endswith("can't be woken: there is no room: other is pinned; unpin one")
                assert "retry-after" not in answer.headers and answer.headers["x-should-retry"] == "false"
            # The next request begins anew.
            again = box.post({})
            await box.asked()
            woke(box, worker)
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await again).status == 200
            await box.nothing_left()

    scenario(work)


@pytest.mark.slow
def test_a_wake_that_fails_is_asked_for_again_and_in_the_end_given_up(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            waiting = box.post({})
            for code in (4, 3):  # no room, not now: that may pass
                asked = await box.asked()
                box.supervisor.send(status.Told(asked.id, code, "no room yet"))
            for _ in range(3):
                asked = await box.asked()
                box.supervisor.send(status.Told(asked.id, 1, "the snapshot is damaged"))
            answer = await waiting
            assert (answer.status, answer.error["code"]) == (503, "wake_failed")
            assert "the snapshot is damaged" in answer.error["message"]
            assert "retry-after" in answer.headers
            await box.nothing_left()

    scenario(work)


def test_a_model_that_falls_asleep_again_is_asked_for_again(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            waiting = box.post({})
            first = await box.asked()
            box.says("waking")
            box.says("asleep")
            second = await box.asked()
            assert second.id != first.id
            box.supervisor.send(status.Told(first.id, 1, "old news"))
            residency = box.says("waking")
            worker.announce()
            box.router.workers.append("w0")
            told = status.Told(second.id, 0, "awake", residency=type(residency)(MODEL, "awake"))
            box.supervisor.send(told)  # its word counts as much as news of all models
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await waiting).status == 200

    scenario(work)


def test_a_request_that_was_placed_just_before_waits_as_well(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            box.says("awake")
            await box.until_state_is("awake")
            for refuse in (True, False):
                answer = box.post({"stream": True})
                generate = await worker.generated()
                if refuse:  # the refusal overtakes the news
                    worker.send(Delta(generate.id, (), "error", error="worker is going to sleep"))
                    await box.get("/live")  # it has been read by now
                await fell_asleep(box, worker)
                if not refuse:
                    worker.drop()
                await box.asked()
                woke(box, worker)
                again = await worker.generated()
                assert box.router.places[-1].exclude == ()
                worker.emit(again, "hello", finish="length")
                assert (await answer).text() == "hello"
                await box.nothing_left()
            metrics = (await box.get("/metrics")).body.decode()
            assert "dynamo_frontend_model_migration_total{" not in metrics

    scenario(work)


def test_a_worker_that_only_says_so_counts_as_lost(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            box.says("awake")
            answer = box.post({})
            generate = await first.generated()
            first.send(Delta(generate.id, (), "error", error="worker is going to sleep"))
            worker = await second.generated()
            assert box.router.places[-1].exclude == ("w0",)
            second.emit(worker, "hello", finish="length")
            assert (await answer).status == 200

    scenario(work)


def test_a_forced_sleep_ends_what_runs_with_its_reason(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            why = "cancelled: tiny was put to sleep by force"
            fresh, streamed = box.post({}), box.post({"stream": True})
            generates = [await worker.generated() for _ in range(2)]
            by_id = {generate.request_id: generate for generate in generates}
            assert len(by_id) == 2
            box.says("falling_asleep")
            for generate in generates:
                worker.send(Delta(generate.id, (), "error", error=why))
            for answer in (await fresh, await streamed):
                assert (answer.status, answer.error["code"]) == (503, "cancelled")
                assert answer.error["message"] == why
                assert answer.headers["x-should-retry"] == "false"
            box.says("awake")
            await box.until_state_is("awake")
            streamed = box.post({"stream": True})
            generate = await worker.generated()
            worker.emit(generate, "half")
            await eventually(lambda: len(box.router.prefilled) == 1, "the first token is there")
            worker.send(Delta(generate.id, (), "error", error=why))
            answer = await streamed
            assert (answer.status, answer.chunks()[-1]["error"]["message"]) == (200, why)
            await box.nothing_left()

    scenario(work)


def test_a_bad_request_wakes_nobody(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            assert (await box.post({"temperature": 9})).status == 400
            assert (await box.post({"model": "tinny"})).status == 404
            assert not box.heard(status.Asked)

    scenario(work)


def test_drain_and_stop_end_those_that_wait(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            whole, streamed = box.post({}), box.post({"stream": True})
            await box.waiting(2)
            connection = await Connection.open(box.port)
            box.supervisor.send(status.Drain(1.5))
            assert (await box.expect(status.Draining)).in_flight == 2
            assert (await whole).error["code"] == "draining"
            assert (await streamed).chunks()[-1]["error"]["code"] == "draining"
            assert await box.exit_status() == 0
            connection.close()
            box.supervisor.close()

            # The next life hears where models are before it can answer, and loses its supervisor while clients wait.
            await box.start()
            box.says("asleep")
            await box.expect(status.Ready)
            waiting = box.post({})
            assert (await box.asked()).act == "wake"
            box.supervisor.close()
            assert (await waiting).error["code"] == "draining"
            assert await box.exit_status() == 0

    scenario(work)


def test_a_drain_lets_those_that_wait_finish(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            await fell_asleep(box, worker)
            waiting = box.post({})
            await box.waiting(1)
            box.supervisor.send(status.Drain(DEADLINE_S))
            await box.expect(status.Draining)
            woke(box, worker)
            worker.emit(await worker.generated(), "hello", finish="length")
            assert (await waiting).status == 200
            assert await box.exit_status() == 0

    scenario(work)


def test_a_pinned_request_waits_for_its_worker_to_wake(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            first, second = await box.ready("w0", "w1")
            box.says("falling_asleep")
            for worker in (first, second):
                worker.withdraw()
            await box.asleep()
            waiting = box.post({"nvext": {"backend_instance_id": "w1"}})
            await box.asked()
            for worker in (first, second):
                worker.announce()
            box.says("awake")
            second.emit(await second.generated(), "hello", finish="length")
            assert (await waiting).headers["x-dynbox-worker"] == "w1"

    scenario(work)


def test_where_models_are_is_told(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            assert "state" not in (await box.get("/v1/models/tiny")).json()
            await fell_asleep(
                box, worker, place="disk", sleeps=3, wakes=2, cold_wakes=1, slept_s=7.5, weights_bytes=1000,
                wake_phases={"restore": 0.25, "total": 0.5},
            )  # fmt: skip
            (model,) = (await box.get("/v1/models")).json()["data"]
            assert (model["state"], model["place"]) == ("asleep", "disk")
            health = await box.get("/health")
            assert (health.status, health.json()["status"], health.json()["sleeping"]) == (200, "healthy", ["tiny"])
            text = (await box.get("/metrics")).body.decode()
            for line in (
                'dynbox_model_state{model="tiny",state="asleep"} 1.0',
                'dynbox_model_state{model="tiny",state="awake"} 0.0',
                'dynbox_model_place{model="tiny",place="disk"} 1.0',
                'dynbox_model_weights_bytes{model="tiny"} 1000.0',
                'dynbox_model_sleeps_total{model="tiny"} 3.0',
                'dynbox_model_wakes_total{model="tiny"} 2.0',
                'dynbox_model_cold_wakes_total{model="tiny"} 1.0',
                'dynbox_model_slept_seconds_total{model="tiny"} 7.5',
                'dynbox_model_last_wake_seconds{model="tiny",phase="restore"} 0.25',
            ):
                assert line in text, line

    scenario(work)


def _figures(report: status.Report) -> FrontendFigures:
    assert isinstance(report.figures, FrontendFigures)
    return report.figures
