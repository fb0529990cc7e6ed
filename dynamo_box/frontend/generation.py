"""The endpoints that generate: from the body of a request to the last byte of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from dynamo_box.frontend import errors
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.intake import Task
from dynamo_box.frontend.output import Output
from dynamo_box.frontend.preprocess import prepare
from dynamo_box.frontend.reply import EVENTS, Reply, read_body, request_id_of
from dynamo_box.frontend.requests import LiveRequest
from dynamo_box.frontend.serving import Serving
from dynamo_box.frontend.stats import CLIENT_GONE, RequestStats
from dynamo_box.frontend.stream import DONE, Usage, Writer
from dynamo_box.log import get_logger

MAX_BODY_ON_LOOP = 64 * 1024
"""A larger body is decoded in a thread: it takes longer than a millisecond."""

log = get_logger()


class Generation:
    """The ASGI endpoint of one kind of completion; `read` makes a task of a body."""

    def __init__(self, serving: Serving, endpoint: str, read: Callable[[bytes], Task]) -> None:
        self._serving = serving
        self._endpoint = endpoint
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, request_id_of(scope))
        task: Task | None = None
        try:
            task = await self._read_task(receive)
            stats = RequestStats(
                self._serving.stats,
                reply.request_id,
                task.model,
                self._endpoint,
                streamed=task.stream,
                priority=task.priority or 0,
            )
            live = self._serving.requests.admit(stats, reply)
        except ApiError as error:
            await self._refuse(error, task, reply)
            return
        except Exception:
            log.exception("a request could not be read", request_id=reply.request_id)
            await self._refuse(errors.internal(reply.request_id), task, reply)
            return
        status = 500
        watcher = asyncio.create_task(_watch_for_disconnect(receive, live))
        try:
            status = await self._answer(task, live, reply)
        finally:
            watcher.cancel()
            self._serving.requests.end(live, status)
            _log_end(stats, status)

    async def _read_task(self, receive: Receive) -> Task:
        """
        Raises:
            ApiError: it can't be served, or not here.
        """
        if self._serving.requests.draining:
            raise errors.draining()
        body = await read_body(receive, self._serving.spec.max_body_bytes)
        if len(body) > MAX_BODY_ON_LOOP:
            task = await asyncio.to_thread(self._read, body)
        else:
            task = self._read(body)
        self._serving.require_model(task.model)
        return task

    async def _refuse(self, error: ApiError, task: Task | None, reply: Reply) -> None:
        log.info("request refused", request_id=reply.request_id, status=error.status, reason=error.message)
        model = task.model if task is not None else ""
        streamed = task is not None and task.stream
        self._serving.stats.refused(model, self._endpoint, error.status, streamed=streamed)
        await reply.fail(error)

    async def _answer(self, task: Task, live: LiveRequest, reply: Reply) -> int:
        """Generate and send, or say what went wrong; the status for metrics and log."""
        try:
            try:
                await self._generate(task, live, reply)
                return 200
            except ApiError as error:
                await reply.fail(error)
                return error.status
            except Exception:
                log.exception("a request failed in the frontend", request_id=reply.request_id)
                await reply.fail(errors.internal(reply.request_id))
                return 500
        except asyncio.CancelledError:
            reason = live.interruption()
            if reason is None:
                raise
        await reply.fail(reason)
        return reason.status

    async def _generate(self, task: Task, live: LiveRequest, reply: Reply) -> None:
        serving = self._serving
        instance = await serving.instance_of(task, live)
        tokenizer = serving.tokenizers[task.model]
        prompt = await prepare(task, tokenizer, instance, serving.context_length(instance))
        stats = live.stats
        stats.prompt_tokens = prompt.count
        output = Output(tokenizer.vocabulary.detokenizer(), task.stops, prompt.sampling.min_tokens)
        writer = Writer(reply.request_id, task.model, task.chat)
        execution = serving.execution(task, prompt, live)
        pieces: list[str] = []
        opened = False
        try:
            while output.finish is None:
                text = output.feed(await execution.next())
                if not task.stream:
                    pieces.append(text)
                    continue
                data = writer.text(text) if text else b""
                if not opened:
                    opened = True
                    if not reply.started:
                        await reply.start(200, EVENTS, stats.worker)
                    data = writer.opening() + data
                if data:
                    await reply.send(data)
        finally:
            execution.close()
        if output.finish == "cancelled":
            raise errors.cancelled()
        usage = Usage(prompt.count, output.tokens, stats.cached_tokens)
        extension = _extension(task, stats)
        if task.stream:
            last = writer.ending(output.finish, extension)
            if task.include_usage:
                last += writer.usage(usage)
            await reply.send(last + DONE, more=False)
        else:
            await reply.whole(writer.whole("".join(pieces), output.finish, usage, extension), stats.worker)


async def _watch_for_disconnect(receive: Receive, live: LiveRequest) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    live.interrupt(errors.client_gone())


def _extension(task: Task, stats: RequestStats) -> dict[str, Any] | None:
    """`nvext` of the answer, as far as the client asked for it."""
    extension: dict[str, Any] = {}
    if "worker_id" in task.extra_fields:
        extension["worker_id"] = stats.worker
        if stats.prefill_worker is not None:
            extension["prefill_worker_id"] = stats.prefill_worker
    if "timing" in task.extra_fields and stats.ttft_s is not None:
        extension["timing"] = {
            "ttft_s": round(stats.ttft_s, 6),
            "total_s": round(stats.last_token - stats.began, 6),
        }
    return extension or None


def _log_end(stats: RequestStats, status: int) -> None:
    log.info(
        "client gone" if status == CLIENT_GONE else "request ended",
        request_id=stats.request_id,
        endpoint=stats.endpoint,
        model=stats.model,
        worker=stats.worker,
        prefill_worker=stats.prefill_worker,
        legs=stats.legs or None,
        status=status,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=stats.output_tokens,
        ttft_s=None if stats.ttft_s is None else round(stats.ttft_s, 4),
        duration_s=round(time.monotonic() - stats.began, 4),
    )
