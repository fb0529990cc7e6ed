"""Two legs with the real router and mock workers, which die in the middle of things: every answer is the one of an
undisturbed run.
"""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import pytest
from frontend_peers import DEADLINE_S, MODEL, Answer, Child, eventually, scenario
from real_box import Box, running

from dynamo_box.discovery.instances import withdraw
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import WorkerFigures
from dynamo_box.protocol.spec import Disagg

COMPLETION = "/v1/completions"
ROLES = {"p0": "prefill", "d0": "decode"}
WHO = {"prompt": "hi", "max_tokens": 2, "nvext": {"extra_fields": ["worker_id"]}}
PACE = {"decode_ms": 4, "speedup": 1.0}


def body(number: int, **more: Any) -> dict[str, Any]:
    """One of many requests: greedy and sampled, short and long."""
    return {
        "prompt": f"number {number}, " * (3 + number % 11),
        "max_tokens": 8 + number % 17,
        "temperature": number % 2,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def figures_of(child: Child) -> WorkerFigures:
    child.forget_reports()
    report = await child.expect(status.Report)
    assert isinstance(report.figures, WorkerFigures)
    return report.figures


def said(answer: Answer) -> tuple[str, dict[str, Any]]:
    """The text and the usage, but for what was cached."""
    assert answer.events[-1:] == ["[DONE]"], answer
    usage = {**answer.chunks()[-1]["usage"], "prompt_tokens_details": None}
    return answer.text(), usage


async def ask_all(box: Box, bodies: list[dict[str, Any]]) -> list[Answer]:
    return await asyncio.gather(*(box.frontend.post(one, COMPLETION) for one in bodies))


async def undisturbed(root: Path, model: Path, bodies: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """What one aggregated worker answers, which nothing happens to."""
    async with running(root / "undisturbed", model, 1) as box:
        return [
            said(answer) for answer in await asyncio.gather(*(box.frontend.post(one, COMPLETION) for one in bodies))
        ]


def test_two_workers_answer_as_one_does(tmp_path: Path, tiny_model: Path) -> None:
    bodies = [body(number) for number in range(40)]

    async def work() -> None:
        expected = await undisturbed(tmp_path, tiny_model, bodies)
        async with running(tmp_path, tiny_model, roles=ROLES) as box:
            await box.until_router_knows(*ROLES)
            await in_two_legs(box)
            answers = await ask_all(box, bodies)
            assert [said(answer) for answer in answers] == expected
            prefill, decode = await asyncio.gather(*(figures_of(box.children[name]) for name in ROLES))
            assert prefill.handed_over == decode.taken_over > len(bodies)
            assert decode.computed_prompt_tokens == 0
            metrics = (await box.frontend.get("/metrics")).body.decode()
            both = f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="two_legs"}} {prefill.handed_over}.0'
            assert both in metrics

    scenario(work)


async def _revive(box: Box, name: str) -> None:
    """What the supervisor does once a worker has died."""
    child = box.children.pop(name)
    await child.exit_status()
    withdraw(box.frontend.run_dir.instances, name)
    child.channel.close()
    await box.add_worker(name, ROLES[name], **PACE)
    await in_two_legs(box)


async def in_two_legs(box: Box) -> None:
    """Return when everybody knows both workers."""
    async with asyncio.timeout(DEADLINE_S):
        while "prefill_worker_id" not in (await box.frontend.post(WHO, COMPLETION)).body.decode():
            await asyncio.sleep(0.01)


def test_a_death_at_any_point_of_the_way_is_not_noticed(tmp_path: Path, tiny_model: Path) -> None:
    faults = {"prefill": "p0", "first_token": "p0", "handover": "p0", "takeover": "d0"}
    bodies = [body(number) for number in range(6)]

    async def work() -> None:
        expected = await undisturbed(tmp_path, tiny_model, bodies)
        async with running(tmp_path, tiny_model, roles=ROLES, **PACE) as box:
            await in_two_legs(box)
            for point, victim in faults.items():
                doomed = {**bodies[0], "nvext": {"annotations": [f"mock:crash:at={point}"]}}
                answers = await ask_all(box, [doomed, *bodies[1:]])
                assert [said(answer) for answer in answers] == expected, point
                await _revive(box, victim)
            for fault in ("fail_handover", "fail_takeover"):
                doomed = {**bodies[0], "nvext": {"annotations": [f"mock:{fault}"]}}
                assert said(await box.frontend.post(doomed, COMPLETION)) == expected[0], fault

    scenario(work)


@pytest.mark.slow
def test_no_answer_differs_while_workers_are_killed_at_random(tmp_path: Path, tiny_model: Path) -> None:
    rng = random.Random(6)
    roles = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
    bodies = [body(number, max_tokens=40 + number % 40) for number in range(120)]

    async def work() -> None:
        expected = await undisturbed(tmp_path, tiny_model, bodies)
        async with running(tmp_path, tiny_model, roles=roles, **PACE) as box:
            room = asyncio.Semaphore(12)
            done: list[int] = []

            async def ask(number: int) -> Answer:
                async with room:
                    answer = await box.frontend.post(bodies[number], COMPLETION)
                    done.append(number)
                    return answer

            async def kill() -> None:
                for wanted in range(5, len(bodies), 15):
                    await eventually(lambda wanted=wanted: len(done) >= wanted, f"{wanted} are done")
                    victim = rng.choice(sorted(roles))
                    await box.kill(victim)
                    await box.add_worker(victim, roles[victim], **PACE)

            *answers, _ = await asyncio.gather(*(ask(number) for number in range(len(bodies))), kill())
            wrong = [number for number, answer in enumerate(answers) if said(answer) != expected[number]]
            assert not wrong
            metrics = (await box.frontend.get("/metrics")).body.decode()
            print(
                "\n".join(
                    re.findall(
                        r"^dynbox_(?:disagg_requests_total|frontend_recovery_seconds_[cs]).*", metrics, re.MULTILINE
                    )
                )
            )

    scenario(work)


def test_what_works_without_the_workers_of_a_role_depends_on_the_policy(tmp_path: Path, tiny_model: Path) -> None:
    """Real router: its policy is in `/health` as soon as it is set, and requests do what that says."""

    async def work() -> None:
        hurry = {"discovery_timeout_s": 0.5}
        async with running(tmp_path, tiny_model, roles=ROLES, disagg=Disagg("strict"), frontend=hurry) as box:
            await in_two_legs(box)
            router = box.children["router"]
            for gone, role in ROLES.items():
                router.forget_reports()
                await box.kill(gone)
                left = next(name for name in ROLES if name != gone)
                await box.until_router_knows(left)
                for policy in ("strict", "conditional", "fallback"):
                    router.channel.send(status.Set(1, "disagg", policy))
                    health = await until_health_says(box, f"no {role} workers", f"(policy {policy})")
                    answer = await box.frontend.post(WHO, COMPLETION)
                    if policy == "strict":
                        assert health.status == 503
                        assert answer.status == 503
                        assert answer.error["message"] == (
                            f"strict: no {role} worker serves {MODEL} now; start one (`dynbox scale`), or set the "
                            "policy to fallback"
                        )
                    else:
                        assert health.status == 200
                        assert answer.json()["nvext"] == {"worker_id": left}
                await box.add_worker(gone, role)
                await in_two_legs(box)

    scenario(work)


async def until_health_says(box: Box, *words: str) -> Answer:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await box.frontend.get("/health")
            if all(word in found.body.decode() for word in words):
                return found
            await asyncio.sleep(0.01)
