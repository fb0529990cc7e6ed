"""What is refused, with which status, and what the client is told. Whatever comes, it is never a 500."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from frontend_peers import Connection, FrontendUnderTest, scenario

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = '"messages":[{"role":"user","content":"hi"}]'


def test_each_refusal_names_its_field(tmp_path: Path, tiny_model: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 10**40}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"lora": "x"}, "lora"),
        ({"echo": True}, "echo"),
        ({"nvext": {"agent_hints": {"priority": "high"}}}, "nvext"),
        ({"nvext": {"backend_instance_id": "nobody"}}, "nvext.backend_instance_id"),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for body, field in refused:
                answer = await box.post(body)
                assert (answer.status, answer.error["param"]) == (400, field), (body, answer.body)
                assert answer.error["type"] == "invalid_request_error"
                assert field.split(".")[0] in answer.error["message"], answer.error
            for prompt in ([], "", ["a", "b"], [1, "a"], [1, 2**40], [1, 100_000], [-1], [[]], {}, None):
                answer = await box.post({"prompt": prompt}, COMPLETION)
                assert (answer.status, answer.error["param"]) == (400, "prompt"), (prompt, answer.body)
            await box.nothing_left()
            assert not box.router.places

    scenario(work)


def test_neutral_values_of_unserved_fields_and_unknown_fields_are_accepted(tmp_path: Path, tiny_model: Path) -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "somebody",
        "store": False,
        "temperature": None,
    }

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            answering = box.post({**neutral, "messages": [{"role": "developer", "content": content}]})
            generate = await worker.generated()
            assert "system\none\ntwo<|im_end|>" in worker.prompt_of(generate)
            worker.emit(generate, "x", finish="length")
            assert (await answering).status == 200

    scenario(work)


def test_hostile_bodies_are_the_clients_fault(tmp_path: Path, tiny_model: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    hostile = [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"model": "tiny"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\x00"}]}',
        b'{"model": "tiny", "temperature": NaN, ' + HELLO.encode() + b"}",
        b'{"model": "tiny", "temperature": 1e999, ' + HELLO.encode() + b"}",
        f'{{"model": "tiny", "messages": {deep}}}'.encode(),
        f'{{"model": "tiny", "whatever": {deep}, {HELLO}}}'.encode(),
        f'{{"model": "tiny", "tools": {deep}, {HELLO}}}'.encode(),
        f'{{"model": "tiny", "tools": {deep}'.encode(),
    ]

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for body in hostile:
                for path in (CHAT, COMPLETION):
                    answer = await box.post(body, path)
                    assert answer.status == 400, (body[:80], answer.body)
                    assert answer.error["message"]
            assert (await box.get("/live")).status == 200
            assert '"level": "error"' not in box.log.read_text()

    scenario(work)


def test_what_is_no_http_is_answered_with_400_and_logged(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            connection = await Connection.open(box.port)
            connection.send_raw(b"\x16\x03\x01 this is TLS, say\r\n\r\n")
            assert (await connection.head()).status == 400
            connection.close()
            assert "Invalid HTTP request" in box.log.read_text()

    scenario(work)


def test_a_body_over_the_cap_is_refused_while_it_is_read(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model, max_body_bytes=10_000) as box:
            await box.ready()
            answer = await box.post({"messages": [{"role": "user", "content": "x" * 10_000}]})
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")

            chunked = await Connection.open(box.port)
            chunked.send_raw(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(3):
                chunked.send_raw(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
            assert (await chunked.head()).status == 413  # before the body has ended
            chunked.close()
            await box.nothing_left()

    scenario(work)


def test_a_prompt_far_too_long_is_refused_before_it_is_tokenised(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            text = "a " * 4_000_000
            with_message = {"messages": [{"role": "user", "content": text}]}
            for body, path in (({"prompt": text}, COMPLETION), (with_message, CHAT)):
                answer = await box.post(body, path)
                assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
                assert "the prompt is at least " in answer.error["message"]
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{box.process.pid}/status").read_text())
            assert peak is not None
            assert int(peak[1]) < 400_000  # tokenised, this text takes more than that for itself

    scenario(work)


def test_what_is_not_there(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            answer = await box.post({"model": "gpt-5"})
            assert (answer.status, answer.error["code"]) == (404, "model_not_found")
            assert "tiny" in answer.error["message"]
            assert (await box.get("/v1/nothing")).error["code"] == "unknown_url"
            answer = await box.post({}, CHAT + "/")
            assert (answer.status, answer.error["code"]) == (404, "unknown_url")
            answer = await box.get(CHAT)
            assert (answer.status, answer.headers["allow"]) == (405, "post")
            assert "POST" in answer.error["message"]

    scenario(work)


def test_only_this_machine_may_ask(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for host in ("127.0.0.1", f"localhost:{box.port}", "[::1]:80", "127.9.9.9", "box.localhost", "Localhost."):
                assert (await box.get("/live", {"host": host})).status == 200, host
            for host in ("example.com", "127.0.0.1.example.com", "localhost.example.com:80", "127.0.0.256", ""):
                assert (await box.get("/live", {"host": host})).status == 403, host
            assert (await box.get("http://localhost/live")).status == 200
            for target in ("http://evil.com/live", "http://evil.com:80/live", "HTTP://127.0.0.1@evil.com/live"):
                assert (await box.get(target)).status == 403, target
            assert (await box.get("/live", {"origin": "https://example.com"})).status == 403
            assert (await box.get("/live", {"origin": "null"})).status == 403
            assert (await box.get("/live", {"origin": f"http://localhost:{box.port}"})).status == 200
            answer = await box.post({}, origin="https://example.com")
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers
            assert not box.router.places

    scenario(work)


def test_request_ids_are_taken_over_if_they_are_sane(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            await box.ready()
            for given, kept in (("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)):
                answer = await box.post({"n": 2}, x_request_id=given)
                assert (answer.headers["x-request-id"] == given) is kept, given
                assert len(answer.headers["x-request-id"]) >= 5

    scenario(work)


def test_metrics_have_the_names_that_dashboards_know(tmp_path: Path, tiny_model: Path) -> None:
    names = """
        dynamo_frontend_requests_total dynamo_frontend_active_requests dynamo_frontend_inflight_requests
        dynamo_frontend_queued_requests dynamo_frontend_disconnected_clients_total
        dynamo_frontend_request_duration_seconds dynamo_frontend_time_to_first_token_seconds
        dynamo_frontend_inter_token_latency_seconds dynamo_frontend_input_sequence_tokens
        dynamo_frontend_output_sequence_tokens dynamo_frontend_cached_tokens dynamo_frontend_output_tokens_total
        dynamo_frontend_model_migration_total dynamo_frontend_model_rejection_total
        dynamo_component_inflight_requests dynamo_component_requests_total
        dynamo_component_request_duration_seconds dynamo_component_errors_total dynamo_component_uptime_seconds
        dynamo_component_router_kv_hit_rate dynamo_router_overhead_block_hashing_ms
        dynamo_router_overhead_indexer_find_matches_ms dynamo_router_overhead_scheduling_ms
        dynamo_router_overhead_total_ms dynbox_build_info
    """

    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({"stream": True})
            worker.emit(await worker.generated(), "hello there", finish="length", cached_tokens=16)
            await answering
            assert (await box.post({"n": 2})).status == 400
            await box.nothing_left()
            text = (await box.get("/metrics")).body.decode()
            for name in names.split():
                assert f"# TYPE {name.removesuffix('_total')}" in text, name
            count = len(worker.ids("hello there"))
            for line in (
                'dynamo_frontend_requests_total{endpoint="chat_completions",model="tiny",'
                'request_type="stream",status="200"} 1.0',
                f'dynamo_frontend_output_tokens_total{{model="tiny"}} {float(count)}',
                f'dynamo_frontend_inter_token_latency_seconds_count{{model="tiny"}} {float(count - 1)}',
                'dynamo_frontend_time_to_first_token_seconds_count{model="tiny"} 1.0',
                'dynamo_frontend_cached_tokens_sum{model="tiny"} 16.0',
                'dynamo_component_requests_total{model="tiny",worker="w0"} 1.0',
                "dynamo_router_overhead_total_ms_count 1.0",
            ):
                assert line in text, line

    scenario(work)


def test_every_log_line_of_a_request_carries_its_id(tmp_path: Path, tiny_model: Path) -> None:
    async def work() -> None:
        async with FrontendUnderTest(tmp_path, tiny_model) as box:
            (worker,) = await box.ready()
            answering = box.post({}, x_request_id="find-me")
            worker.emit(await worker.generated(), "x", finish="length", cached_tokens=3)
            await answering
            await box.nothing_left()
            lines = [json.loads(line) for line in box.log.read_text().splitlines()]
            (line,) = [line for line in lines if line.get("request_id") == "find-me"]
            assert line["level"] == "info"
            assert (line["model"], line["worker"], line["status"], line["cached_tokens"]) == ("tiny", "w0", 200, 3)
            assert 0 <= line["ttft_s"] <= line["duration_s"]

    scenario(work)
