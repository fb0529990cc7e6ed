"""With the real router and mock workers: KV routing as a client sees it, and deaths in the middle of things."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

from frontend_peers import scenario
from real_box import running

from dynamo_box.protocol import status
from dynamo_box.protocol.figures import RouterFigures

LONG = "a prompt that is long enough to fill several blocks of the cache, " * 4


def test_the_second_request_goes_where_the_first_left_its_blocks(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model) as box:
            body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}
            first = await box.frontend.post(body)
            assert first.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            for _ in range(4):
                await box.frontend.post({"max_tokens": 2})  # load elsewhere does not draw it away
                again = await box.frontend.post(body)
                assert again.headers["x-dynbox-worker"] == first.headers["x-dynbox-worker"]
                assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
            metrics = (await box.frontend.get("/metrics")).body.decode()
            assert 'dynamo_component_router_kv_hit_rate{model="tiny"} 0.' in metrics

    scenario(work)


def test_a_model_that_has_woken_answers_before_any_watch_has_noticed(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model, workers=1) as box:
            frontend = box.frontend
            (announced,) = frontend.run_dir.instances.glob("*.json")
            content = announced.read_bytes()
            took = [math.inf]
            while min(took) >= 0.5 and len(took) < 20:
                frontend.says("falling_asleep")
                announced.unlink()
                await frontend.asleep()
                answer = frontend.post({"max_tokens": 1})
                await frontend.asked()
                frontend.says("waking")
                await frontend.until_state_is("waking")
                began = time.perf_counter()
                announced.with_suffix(".new").write_bytes(content)
                announced.with_suffix(".new").replace(announced)
                frontend.says("awake")
                assert (await answer).status == 200
                took.append(time.perf_counter() - began)
            print("awake to answered, ms:", [round(each * 1000, 1) for each in took[1:]])
            assert min(took) < 0.5, "the directory is read once a second anyway"

    scenario(work)


def test_leases_are_back_at_the_router_after_every_ending(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        hurry = {"discovery_timeout_s": 5.0}
        async with running(tmp_path, tiny_model, frontend=hurry, decode_ms=5, speedup=1.0) as box:
            gone = [await box.frontend.request({"stream": True, "max_tokens": 500}) for _ in range(4)]
            for connection in gone:
                await connection.head()
                connection.close()
            stopped = [box.frontend.post({"max_tokens": 50, "stop": ["a", "e", "t", " "]}) for _ in range(4)]
            finished = [box.frontend.post({"max_tokens": 5, "stream": True}) for _ in range(4)]
            await asyncio.gather(*stopped, *finished)
            crashed = await box.frontend.post({"max_tokens": 50, "nvext": {"annotations": ["mock:crash:after=3"]}})
            assert crashed.status == 502, "whoever takes it dies of it"
            router = box.children["router"]
            report = await router.expect(status.Report, lambda each: _idle_after(each, 13))
            assert _figures(report).expired_leases == 0

    scenario(work)


def test_a_killed_worker_in_mid_stream_is_not_noticed(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model, decode_ms=10, speedup=1.0) as box:
            for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 5}):
                body = {"prompt": LONG, "max_tokens": 60, "ignore_eos": True, **sampling}
                undisturbed = await box.frontend.post(body, "/v1/completions")
                connection = await box.frontend.request({**body, "stream": True}, "/v1/completions")
                answer = await connection.head()
                for _ in range(10):
                    answer.body += await connection.chunk()
                victim = answer.headers["x-dynbox-worker"]
                await box.kill(victim)
                while piece := await connection.chunk():
                    answer.body += piece
                connection.close()
                events = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
                assert events[-1] == "[DONE]"
                answer.events = events
                assert answer.text() == undisturbed.json()["choices"][0]["text"]
                await box.add_worker(victim)

    scenario(work)


def test_a_killed_router_comes_back_and_streams_do_not_notice(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model, decode_ms=10, speedup=1.0) as box:
            streaming = box.frontend.post({"stream": True, "max_tokens": 150, "ignore_eos": True})
            first = await box.frontend.post({"max_tokens": 1})
            assert first.status == 200
            await box.kill("router")
            waiting = box.frontend.post({"max_tokens": 3})
            router = await box.add_router()
            assert (await waiting).status == 200
            answer = await streaming
            assert answer.events[-1] == "[DONE]"
            await router.expect(status.Report, lambda each: _idle_after(each, 1))

    scenario(work)


def test_every_worker_gone_is_unhealthy_and_a_new_one_is_found(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model, workers=1) as box:
            await box.kill("w0")
            await box.frontend.until_health_is(503)
            assert (await box.frontend.get("/v1/models")).json()["data"] == []
            waiting = box.frontend.post({"max_tokens": 3})
            await box.add_worker("w0")
            assert (await waiting).status == 200
            await box.frontend.until_healthy()

    scenario(work)


def test_two_hundred_streams_at_once_each_get_their_own_tokens(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, tiny_model) as box:
            bodies = [
                {"prompt": f"number {number}", "max_tokens": 24, "temperature": 0, "stream": True, "ignore_eos": True}
                for number in range(200)
            ]
            streamed = await asyncio.gather(*(box.frontend.post(body, "/v1/completions") for body in bodies))
            some = range(0, 200, 20)
            whole = [await box.frontend.post({**bodies[n], "stream": False}, "/v1/completions") for n in some]
            assert [streamed[n].text() for n in some] == [answer.json()["choices"][0]["text"] for answer in whole]
            assert all(answer.events[-1] == "[DONE]" for answer in streamed)

    scenario(work)


def _idle_after(report: status.Report, routed: int) -> bool:
    figures = _figures(report)
    return figures.routed >= routed and figures.active_requests == 0


def _figures(report: status.Report) -> RouterFigures:
    assert isinstance(report.figures, RouterFigures)
    return report.figures
