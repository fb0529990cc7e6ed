"""A request whose prompt one worker computes and which goes on at another: one answer to the client, whatever is lost
on the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from frontend_peers import BLOCK, DEADLINE_S, MODEL, Answer, FakeWorker, FrontendUnderTest, eventually, scenario

from dynamo_box.protocol import status
from dynamo_box.protocol.figures import FrontendFigures, RequestFigures
from dynamo_box.protocol.request import Delta, FinishReason, Generate, Transfer, unpack_tokens

COMPLETION = "/v1/completions"
PROMPT = list(range(5, 5 + 2 * BLOCK + 7))
TOKENS = list(range(70, 80))
TRANSFER = Transfer(b"k" * 16, len(PROMPT), b"p" * 16)
BODY = {
    "prompt": PROMPT,
    "max_tokens": len(TOKENS),
    "temperature": 1.0,
    "min_tokens": 4,
    "stream": True,
    "stream_options": {"include_usage": True},
    "nvext": {"extra_fields": ["worker_id", "timing"]},
}
WHOLE: dict[str, Any] = {"stream": False, "stream_options": None}


async def two_legs(box: FrontendUnderTest, policy: str = "fallback") -> tuple[FakeWorker, FakeWorker]:
    """One worker of each role, found by the frontend."""
    box.router.policy = policy
    prefill, decode = await box.ready_with({"p0": "prefill", "d0": "decode"})
    return prefill, decode


def given_up(*workers: FakeWorker) -> list[bytes]:
    """The transfers that they were told nobody will go on from, since this was asked last."""
    found = [key for worker in workers for key in worker.given_up]
    for worker in workers:
        worker.given_up.clear()
    return found


def say(worker: FakeWorker, generate: Generate, *tokens: int, finish: FinishReason | None = None) -> None:
    """One step for each token."""
    for place, token in enumerate(tokens):
        last = place == len(tokens) - 1
        worker.send(Delta(generate.id, (token,), finish if last else None, cached_tokens=BLOCK if place == 0 else 0))


def prefilled(worker: FakeWorker, generate: Generate, transfer: Transfer | None = TRANSFER, error: str = "") -> None:
    worker.send(Delta(generate.id, (), "prefilled", error=error, transfer=transfer))


async def live_in(box: FrontendUnderTest, phase: str) -> RequestFigures:
    """The one live request there has been, in this phase."""

    def fits(report: status.Report) -> bool:
        assert isinstance(report.figures, FrontendFigures)
        return [live.phase for live in report.figures.live] == [phase]

    report = await box.expect(status.Report, fits)
    assert isinstance(report.figures, FrontendFigures)
    return report.figures.live[0]


async def health_with(box: FrontendUnderTest, roles: dict[str, int]) -> dict[str, Any]:
    """What `/health` says once these workers are connected."""
    async with asyncio.timeout(DEADLINE_S):
        while (found := (await box.get("/health")).json())["roles"].get(MODEL) != roles:
            await asyncio.sleep(0.01)
    return dict(found)


async def metrics_of(box: FrontendUnderTest) -> str:
    return (await box.get("/metrics")).body.decode()


def test_the_answer_of_two_workers_is_one(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            connection = await box.request(BODY, COMPLETION)
            first = await prefill.generated()
            assert (first.leg, first.transfer, first.must_transfer) == ("prefill", None, False)
            assert unpack_tokens(first.tokens) == PROMPT
            live = await live_in(box, "prefill")
            assert (live.prefill_worker, live.worker) == ("p0", "d0")

            say(prefill, first, TOKENS[0])
            head = await connection.head()
            head.body += await connection.chunk()
            assert box.tokenizer.decode(TOKENS[:1]) in head.body.decode(), "streamed before anything is handed over"
            assert (head.status, head.headers["x-dynbox-worker"]) == (200, "d0")
            assert await live_in(box, "handover")
            assert box.router.prefilled == [box.router.places[0].id]

            prefilled(prefill, first)
            second = await decode.generated()
            assert (second.leg, second.transfer, second.must_transfer) == ("decode", TRANSFER, False)
            assert unpack_tokens(second.tokens) == PROMPT + TOKENS[:1]
            assert second.sampling.seed == first.sampling.seed is not None
            assert second.sampling == first.sampling.__class__(
                max_tokens=9, temperature=1.0, min_tokens=3, seed=first.sampling.seed
            )
            say(decode, second, TOKENS[1])
            assert await live_in(box, "decode")
            say(decode, second, *TOKENS[2:], finish="length")
            answer = await connection.rest(head)
            assert answer.text() == box.tokenizer.decode(TOKENS)
            assert answer.events[-1] == "[DONE]"
            assert answer.chunks()[-1]["usage"] == {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": len(TOKENS),
                "total_tokens": len(PROMPT) + len(TOKENS),
                "prompt_tokens_details": {"cached_tokens": BLOCK},
            }
            extension = answer.chunks()[-2]["nvext"]
            assert (extension["worker_id"], extension["prefill_worker_id"]) == ("d0", "p0")
            assert len(box.router.places) == 1, "one lease covers both"
            assert not prefill.cancelled + decode.cancelled + given_up(prefill, decode)
            await box.nothing_left()
            metrics = await metrics_of(box)
            assert f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="two_legs"}} 1.0' in metrics
            assert f'dynbox_disagg_handover_seconds_count{{model="{MODEL}"}} 1.0' in metrics
            assert "dynamo_frontend_model_migration_total{" not in metrics
            assert f'dynamo_frontend_inter_token_latency_seconds_count{{model="{MODEL}"}} 9.0' in metrics
            connection.close()

    scenario(work)


class Story:
    """A request on its way through two legs, told step by step."""

    def __init__(self, box: FrontendUnderTest, prefill: FakeWorker, decode: FakeWorker) -> None:
        self.box = box
        self.prefill = prefill
        self.decode = decode
        self.answering: asyncio.Task[Answer]
        self.said = 0

    async def begin(self, body: dict[str, Any]) -> None:
        self.said = 0
        self.answering = self.box.post(body, COMPLETION)
        self._first = await self.prefill.generated()

    async def first_token(self) -> None:
        self._say(self.prefill, self._first, 1)
        await self.box.until_said(self._first, 1)

    async def hand_over(self) -> None:
        prefilled(self.prefill, self._first)
        self._second = await self.decode.generated()

    async def go_on(self, count: int = 3) -> None:
        self._say(self.decode, self._second, count)
        await self.box.until_said(self._first, self.said)

    def _say(self, worker: FakeWorker, generate: Generate, count: int) -> None:
        say(worker, generate, *TOKENS[self.said : self.said + count])
        self.said += count

    def fail_prefill(self, error: str) -> None:
        self.prefill.send(Delta(self._first.id, (), "error", error=error))

    def fail_decode(self, error: str) -> None:
        self.decode.send(Delta(self._second.id, (), "error", error=error))

    def end_prefill_with_transfer(self) -> None:
        prefilled(self.prefill, self._first)

    def end_prefill(self, error: str = "") -> None:
        prefilled(self.prefill, self._first, None, error)


Loss = Callable[[Story], Awaitable[None]]


async def prefill_dies_first(story: Story) -> None:
    story.prefill.drop()


async def prefill_fails_first(story: Story) -> None:
    story.fail_prefill("the engine has no room")


async def prefill_dies_after_its_token(story: Story) -> None:
    await story.first_token()
    story.prefill.drop()


async def nothing_was_stored(story: Story) -> None:
    await story.first_token()
    story.end_prefill("the store is full")


async def nothing_is_said_of_the_transfer(story: Story) -> None:
    await story.first_token()
    story.end_prefill()


async def decode_refuses(story: Story) -> None:
    await story.first_token()
    await story.hand_over()
    story.fail_decode("this worker drains")


async def transfer_is_lost(story: Story) -> None:
    await story.first_token()
    await story.hand_over()
    story.fail_decode("nothing is held under this key")


async def decode_dies_first(story: Story) -> None:
    await story.first_token()
    await story.hand_over()
    story.decode.drop()


async def decode_dies_later(story: Story) -> None:
    await story.first_token()
    await story.hand_over()
    await story.go_on()
    story.decode.drop()


UNCLAIMED = (decode_refuses, transfer_is_lost, decode_dies_first)
"""Those after which nobody goes on from what was handed over."""

LOSSES: list[tuple[Loss, tuple[str, ...], str]] = [
    (prefill_dies_first, ("p0",), "its connection closed"),
    (prefill_fails_first, ("p0",), "the engine has no room"),
    (prefill_dies_after_its_token, ("p0",), "its connection closed"),
    (nothing_was_stored, (), "the store is full"),
    (nothing_is_said_of_the_transfer, (), "no word of where"),
    (decode_refuses, ("d0",), "this worker drains"),
    (transfer_is_lost, ("d0",), "nothing is held"),
    (decode_dies_first, ("d0",), "its connection closed"),
    (decode_dies_later, ("d0",), "its connection closed"),
]
"""How it comes about, the workers that are lost by it, and the reason that is told."""


def test_whatever_is_lost_under_fallback_goes_on_in_one_leg(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            story = Story(box, prefill, decode)
            for lose, lost, _ in LOSSES:
                await story.begin(BODY)
                await lose(story)
                left = prefill if lost == ("d0",) else decode
                generate = await left.generated()
                place = box.router.places[-1]
                assert (place.exclude, place.one_leg) == (lost, True), lose
                assert (generate.leg, generate.transfer, generate.must_transfer) == ("whole", None, False)
                assert unpack_tokens(generate.tokens) == PROMPT + TOKENS[: story.said]
                assert generate.sampling.max_tokens == len(TOKENS) - story.said
                say(left, generate, *TOKENS[story.said :], finish="length")
                answer = await story.answering
                assert (answer.text(), answer.events[-1]) == (box.tokenizer.decode(TOKENS), "[DONE]"), lose
                usage = answer.chunks()[-1]["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), len(TOKENS))
                await box.nothing_left()
                assert given_up(prefill) == [TRANSFER.key] * (lose in UNCLAIMED), lose
                assert not given_up(decode)
            metrics = await metrics_of(box)
            assert f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="fell_back"}} {len(LOSSES)}.0' in metrics
            assert f'dynamo_frontend_model_migration_total{{model="{MODEL}"}} {len(LOSSES)}.0' in metrics
            assert f'dynbox_frontend_recovery_seconds_count{{model="{MODEL}"}} {len(LOSSES)}.0' in metrics

    scenario(work)


def test_what_strict_can_not_hand_over_is_an_error_with_its_reason(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, discovery_timeout_s=1.0) as box:
            prefill, decode = await two_legs(box, "strict")
            story = Story(box, prefill, decode)
            for lose, _, reason in LOSSES:
                for streamed in (True, False):
                    await story.begin(BODY if streamed else {"prompt": PROMPT, "max_tokens": 9})
                    await lose(story)
                    answer = await story.answering
                    error = answer.chunks()[-1]["error"] if answer.events else answer.error
                    assert answer.status == (200 if streamed and story.said else 503), (lose, answer)
                    assert reason in error["message"], (lose, error)
                    assert error["code"] == ("not_handed_over" if story.said else "unavailable")
                    assert "[DONE]" not in answer.events
                    assert not box.router.places[-1].one_leg
                    await box.nothing_left()
                    assert given_up(prefill, decode) == [TRANSFER.key] * (lose in UNCLAIMED), lose
            metrics = await metrics_of(box)
            assert f'outcome="failed"}} {2 * len(LOSSES)}.0' in metrics

            # Nothing was said: another prefill worker may have it.
            other = await box.add_worker("p1", "prefill")
            await story.begin(BODY)
            prefill.drop()
            first = await other.generated()
            assert (first.leg, box.router.places[-1].exclude) == ("prefill", ("p0",))
            say(other, first, TOKENS[0])
            prefilled(other, first)
            second = await decode.generated()
            assert (second.leg, second.must_transfer) == ("decode", True)
            say(decode, second, *TOKENS[1:], finish="length")
            assert (await story.answering).text() == box.tokenizer.decode(TOKENS)

    scenario(work)


def test_what_a_decode_worker_does_not_take_another_one_takes_over(tmp_path: Path, tiny_model: Path) -> None:
    """It drains, changes its role or is gone before its turn has come: no policy has the prompt computed again."""

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box, "strict")
            other = await box.add_worker("d1", "decode")
            await health_with(box, {"prefill": 1, "decode": 2})
            story = Story(box, prefill, decode)

            async def goes_on(must_transfer: bool) -> None:
                second = await other.generated()
                assert (second.leg, second.transfer, second.must_transfer) == ("decode", TRANSFER, must_transfer)
                assert unpack_tokens(second.tokens) == PROMPT + TOKENS[:1]
                assert (box.router.places[-1].exclude, box.router.places[-1].one_leg) == (("d0",), True)
                say(other, second, *TOKENS[1:], finish="length")
                answer = await story.answering
                assert (answer.text(), answer.events[-1]) == (box.tokenizer.decode(TOKENS), "[DONE]")
                extension = answer.chunks()[-2]["nvext"]
                assert (extension["worker_id"], extension["prefill_worker_id"]) == ("d1", "p0")
                await box.nothing_left()
                assert not given_up(prefill, decode, other)

            for policy in ("strict", "fallback"):
                box.router.policy = policy
                for refusal in ("worker is draining", "worker is changing its role"):
                    await story.begin(BODY)
                    await story.first_token()
                    await story.hand_over()
                    story.fail_decode(refusal)
                    await goes_on(policy == "strict")
            await story.begin(BODY)
            await story.first_token()
            decode.withdraw()
            await health_with(box, {"prefill": 1, "decode": 1})
            story.end_prefill_with_transfer()
            await goes_on(must_transfer=False)
            metrics = await metrics_of(box)
            assert f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="two_legs"}} 5.0' in metrics

            # Nobody is left who may take it over.
            box.router.policy = "strict"
            box.router.workers.remove("d0")
            await story.begin(BODY)
            await story.first_token()
            other.close()
            await health_with(box, {"prefill": 1})
            story.end_prefill_with_transfer()
            error = (await story.answering).chunks()[-1]["error"]
            assert error["code"] == "not_handed_over"
            assert "only workers for prefill are left" in error["message"]
            await eventually(lambda: prefill.given_up == [TRANSFER.key], "it need not be held any longer")

    scenario(work)


def test_a_death_of_who_has_handed_over_is_not_noticed(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            answering = box.post(BODY, COMPLETION)
            first = await prefill.generated()
            # The last token and the end of the leg may come in one.
            prefill.send(Delta(first.id, (TOKENS[0],), "prefilled", transfer=TRANSFER))
            second = await decode.generated()
            prefill.close()
            say(decode, second, *TOKENS[1:], finish="length")
            assert (await answering).text() == box.tokenizer.decode(TOKENS)
            assert len(box.router.places) == 1
            await box.nothing_left()

    scenario(work)


def test_a_first_token_that_ends_the_answer_needs_nobody_else(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            ends: list[tuple[dict[str, Any], FinishReason]] = [({}, "stop"), ({"max_tokens": 1}, "length")]
            for more, finish in ends:
                answering = box.post({"prompt": PROMPT, **more}, COMPLETION)
                say(prefill, await prefill.generated(), TOKENS[0], finish=finish)
                answer = (await answering).json()
                assert answer["choices"][0]["finish_reason"] == finish
                assert answer["usage"]["completion_tokens"] == 1
            answering = box.post({"prompt": PROMPT, "stop": "hello", "max_tokens": 9}, COMPLETION)
            first = await prefill.generated()
            prefill.send(Delta(first.id, tuple(prefill.ids("hello"))))
            assert (await answering).json()["choices"][0]["finish_reason"] == "stop"
            await eventually(lambda: prefill.cancelled == [first.id], "its prompt need not be handed over")
            assert decode.hello is not None
            await box.nothing_left()
            metrics = await metrics_of(box)
            assert f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="one_leg"}} 3.0' in metrics

    scenario(work)


def test_a_client_that_leaves_ends_whichever_leg_there_is(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            for steps in range(4):
                connection = await box.request(BODY, COMPLETION)
                first = second = await prefill.generated()
                if steps > 0:
                    say(prefill, first, TOKENS[0])
                    await box.until_said(first, 1)
                if steps > 1:
                    prefilled(prefill, first)
                    second = await decode.generated()
                if steps > 2:
                    say(decode, second, TOKENS[1])
                    await box.until_said(second, 2)
                worker, other = (prefill, decode) if steps < 2 else (decode, prefill)
                connection.close()
                await worker.cancels.wait()
                worker.cancels.clear()
                assert (worker.cancelled, other.cancelled) == ([second.id], []), steps
                worker.cancelled.clear()
                await box.nothing_left()
                if steps == 1:
                    prefilled(prefill, first)  # too late: it crosses with our Cancel
                if steps in (1, 2):
                    await eventually(lambda: prefill.given_up == [TRANSFER.key], "it need not be held any longer")
                assert given_up(prefill, decode) == [TRANSFER.key] * (steps in (1, 2))

            connection = await box.request(BODY, COMPLETION)
            first = await prefill.generated()
            say(prefill, first, TOKENS[0])
            prefilled(prefill, first)
            await decode.generated()
            prefill.die()
            await health_with(box, {"decode": 1})
            connection.close()
            await eventually(lambda: decode.given_up == [TRANSFER.key], "whoever is left is told of it")

    scenario(work)


def test_no_request_takes_longer_than_it_may_in_whatever_phase(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        limit_s = 4.0
        async with FrontendUnderTest(
            tmp_path, tiny_model, max_generation_s=limit_s, discovery_timeout_s=DEADLINE_S, wake_timeout_s=DEADLINE_S
        ) as box:
            prefill, decode = await two_legs(box)
            answers: dict[str, asyncio.Task[Answer]] = {}

            async def begin(phase: str) -> Generate:
                answers[phase] = box.post(BODY if len(answers) % 2 else {**BODY, **WHOLE}, COMPLETION)
                return await prefill.generated()

            async def handed_over(phase: str) -> Generate:
                first = await begin(phase)
                say(prefill, first, TOKENS[0])
                prefilled(prefill, first)
                return await decode.generated()

            await begin("waits for its turn to be computed")
            say(prefill, await begin("is handed over"), TOKENS[0])
            await handed_over("waits for a place to go on")
            say(decode, await handed_over("decodes"), TOKENS[1])
            decode.send(Delta((await handed_over("goes on elsewhere")).id, (), "error", error="out of order"))
            assert (await prefill.generated()).leg == "whole"
            prefill.send(Delta((await begin("finds nobody to go on")).id, (), "error", error="out of order"))
            decode.send(Delta((await decode.generated()).id, (), "error", error="out of order"))
            box.router.silent = True
            placed = len(box.router.places)
            answers["waits for the router"] = box.post(BODY, COMPLETION)
            await eventually(lambda: len(box.router.places) > placed, "it is asked")
            await box.asleep()
            answers["waits for its model to wake"] = box.post(BODY, COMPLETION)
            for phase, answering in answers.items():
                answer = await answering
                error = answer.chunks()[-1]["error"] if answer.status == 200 else answer.error
                assert (error["code"], answer.status in (200, 504)) == ("max_generation", True), (phase, answer)
                assert f"{limit_s:g} s" in error["message"]
            assert len(answers) == 8
            await box.nothing_left()
            await eventually(lambda: prefill.given_up == [TRANSFER.key] * 2, "what was not claimed is given up")

    scenario(work)


def test_a_restarted_router_is_told_who_computes_and_who_answers(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box)
            answering = box.post(BODY, COMPLETION)
            first = await prefill.generated()

            async def restarted() -> tuple[str, str, bool]:
                box.router.close()
                box.router.adopted.clear()
                await box.router.listen()
                await eventually(lambda: len(box.router.adopted) == 1, "the new router hears of it")
                adopted = box.router.adopted[0]
                return adopted.prefill, adopted.worker, adopted.prefill_done

            assert await restarted() == ("p0", "d0", False)
            say(prefill, first, TOKENS[0])
            await box.until_said(first, 1)
            assert await restarted() == ("", "d0", True)
            prefilled(prefill, first)
            say(decode, await decode.generated(), *TOKENS[1:], finish="length")
            assert (await answering).text() == box.tokenizer.decode(TOKENS)
            await box.nothing_left()

    scenario(work)


def test_health_says_which_roles_are_there_and_what_works_without_the_others(tmp_path: Path, tiny_model: Path) -> None:
    async def set_policy(box: FrontendUnderTest, name: str, says: str) -> dict[str, Any]:
        """It is known without a request."""
        box.router.set_policy(name)
        async with asyncio.timeout(DEADLINE_S):
            while says not in (found := await box.get("/health")).body.decode():
                await asyncio.sleep(0.01)
        return dict(found.json())

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            prefill, decode = await two_legs(box, "")
            found = await health_with(box, {"prefill": 1, "decode": 1})
            assert (found["status"], found["reasons"], "notes" in found) == ("healthy", [], False)
            prefill.withdraw()
            found = await health_with(box, {"decode": 1})
            assert found["status"] == "healthy", "a router has not said yet which policy is in force"
            assert found["notes"] == [
                "tiny: no prefill workers: prompts are computed by decode workers (unless the policy is strict: then "
                "requests fail)"
            ]
            found = await set_policy(box, "strict", "(policy strict)")
            assert (found["status"], found["reasons"]) == (
                "unhealthy",
                ["tiny: no prefill workers: requests fail (policy strict)"],
            )
            found = await set_policy(box, "fallback", "(policy fallback)")
            assert found["notes"] == [
                "tiny: no prefill workers: prompts are computed by decode workers (policy fallback)"
            ]
            decode.withdraw()
            prefill.announce()
            found = await health_with(box, {"prefill": 1})
            assert found["notes"] == ["tiny: no decode workers: prefill workers answer by themselves (policy fallback)"]

    scenario(work)
