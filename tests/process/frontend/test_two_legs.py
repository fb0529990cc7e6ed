"""A request whose prompt one worker computes and which goes on at another: one answer to the client, whatever is lost
on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frontend_peers import BLOCK, MODEL, FakeWorker, FrontendUnderTest, scenario

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


async def two_legs(box: FrontendUnderTest, policy: str = "fallback") -> tuple[FakeWorker, FakeWorker]:
    """One worker of each role, found by the frontend."""
    box.router.policy = policy
    prefill, decode = await box.ready_with({"p0": "prefill", "d0": "decode"})
    return prefill, decode


def say(worker: FakeWorker, generate: Generate, *tokens: int, finish: FinishReason | None = None) -> None:
    """One step for each token."""
    for place, token in enumerate(tokens):
        last = place == len(tokens) - 1
        worker.send(Delta(generate.id, (token,), finish if last else None, cached_tokens=BLOCK if place == 0 else 0))


def prefilled(worker: FakeWorker, generate: Generate, transfer: Transfer | None = TRANSFER, error: str = "") -> None:
    worker.send(Delta(generate.id, (), "prefilled", error=error, transfer=transfer))


async def live_in(box: FrontendUnderTest, phase: str) -> RequestFigures:
    """The one live request, in this phase."""

    def fits(report: status.Report) -> bool:
        assert isinstance(report.figures, FrontendFigures)
        return [live.phase for live in report.figures.live] == [phase]

    report = await box.expect(status.Report, fits)
    assert isinstance(report.figures, FrontendFigures)
    return report.figures.live[0]


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
            assert not prefill.cancelled + decode.cancelled
            await box.nothing_left()
            metrics = await metrics_of(box)
            assert f'dynbox_disagg_requests_total{{model="{MODEL}",outcome="two_legs"}} 1.0' in metrics
            assert f'dynbox_disagg_handover_seconds_count{{model="{MODEL}"}} 1.0' in metrics
            assert "dynamo_frontend_model_migration_total{" not in metrics
            assert f'dynamo_frontend_inter_token_latency_seconds_count{{model="{MODEL}"}} 9.0' in metrics
            connection.close()

    scenario(work)
