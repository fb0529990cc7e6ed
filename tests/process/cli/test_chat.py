"""`dynbox chat` against an HTTP server that streams as the frontend does, piped and on a terminal."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from dynamo_box.snapshot import ModelInfo

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
DEADLINE_S = 90


class Server(ThreadingHTTPServer):
    """Streams `pieces` as one answer; `ending` is what comes after them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pieces = ["The capital ", "is Paris."]
        self.ending = "done"
        self.bodies: list[dict[str, Any]] = []
        self.hung_up = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        assert self.path == "/v1/chat/completions"
        if self.server.ending == "refused":
            error = json.dumps({"error": {"message": "the prompt is too long", "code": "context_length_exceeded"}})
            self.send_response(400)
            self.send_header("Content-Length", str(len(error)))
            self.end_headers()
            self.wfile.write(error.encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("x-dynbox-worker", "smollm2.aggregated.0")
        self.end_headers()
        self.wfile.write(b": a comment\n\n")
        for piece in self.server.pieces:
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if self.server.ending == "error":
            self._event({"error": {"message": "worker w was lost", "code": "worker_lost"}})
        elif self.server.ending == "stall":
            try:
                while True:
                    self.wfile.write(b": still here\n\n")
                    time.sleep(0.05)
            except OSError:
                self.server.hung_up.set()
        elif self.server.ending == "done":
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 37, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 24}}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def server(supervisor: Any) -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        box = msgspec.structs.replace(supervisor.state.box, endpoint=running.endpoint)
        supervisor.state = msgspec.structs.replace(supervisor.state, box=box)
        yield running
        running.shutdown()
        thread.join()


def test_one_question_answer_on_stdout_footer_on_stderr(server: Server, dynbox: Dynbox) -> None:
    done = dynbox("chat", "-m", "Capital?", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9")
    assert done.stdout == "The capital is Paris.\n"
    footer = done.stderr.strip()
    assert footer.startswith("TTFT ")
    assert "tokens/s · 8 tokens · smollm2.aggregated.0 · 24 of 37 prompt tokens cached" in footer
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("smollm2", 0.0, 9, True)


def test_a_piped_text_is_one_message(server: Server, dynbox: Dynbox) -> None:
    done = dynbox("chat", "smollm2", "--json", stdin="first\nsecond\n")
    data = json.loads(done.stdout)
    assert data["text"] == "The capital is Paris."
    assert data["cached_tokens"] == 24
    assert data["finish_reason"] == "stop"
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "first\nsecond"}]
    assert "empty" in dynbox("chat", code=2).stderr


def test_a_pipe_gets_the_bytes_of_the_answer_as_they_are(server: Server, dynbox: Dynbox) -> None:
    server.pieces = ["\x1b[31mred"]
    assert dynbox("chat", "-m", "x").stdout == "\x1b[31mred\n"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("refused", "400: the prompt is too long"),
        ("error", "worker w was lost"),
        ("cut", "the connection closed before it was complete"),
    ],
)
def test_an_answer_that_fails_is_exit_1_with_the_reason(
    server: Server, dynbox: Dynbox, ending: str, words: str
) -> None:
    server.ending = ending
    assert words in dynbox("chat", "-m", "x", code=1).stderr


def test_a_box_without_an_endpoint_that_answers(supervisor: Any, dynbox: Dynbox) -> None:
    box = msgspec.structs.replace(supervisor.state.box, endpoint="http://127.0.0.1:9")
    supervisor.state = msgspec.structs.replace(supervisor.state, box=box)
    assert "nobody answers" in dynbox("chat", "-m", "x", code=3).stderr


def test_a_model_must_be_one_that_is_served(server: Server, supervisor: Any, dynbox: Dynbox) -> None:
    assert "did you mean smollm2" in dynbox("chat", "smolm", "-m", "x", code=2).stderr
    models = (*supervisor.state.models, ModelInfo("other", "ready"))
    supervisor.state = msgspec.structs.replace(supervisor.state, models=models)
    assert "smollm2 | other" in dynbox("chat", "-m", "x", code=2).stderr


def test_ctrl_c_cancels_the_answer(server: Server) -> None:
    server.ending = "stall"
    command = [sys.executable, "-m", "dynamo_box", "chat", "-m", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as chat:
        assert chat.stdout is not None
        assert chat.stdout.read(3) == "The"
        chat.send_signal(signal.SIGINT)
        _, err = chat.communicate(timeout=DEADLINE_S)
    assert chat.returncode == 130
    assert "cut short" in err
    assert server.hung_up.wait(DEADLINE_S)


class Terminal:
    """A program on a pseudo-terminal, as a person sees it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        pid, self._fd = pty.fork()
        if pid == 0:
            os.environ.update({"TERM": "xterm", "COLUMNS": "60", **environment})
            os.execv(sys.executable, [sys.executable, "-m", "dynamo_box", *arguments])
        self._pid = pid

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, since: int = 0) -> int:
        """Returns where the screen text after it begins."""
        end = time.monotonic() + DEADLINE_S
        while text not in self.seen[since:]:
            ready, _, _ = select.select([self._fd], [], [], end - time.monotonic())
            assert ready, f"{text!r} never came: {self.seen!r}"
            self._see(os.read(self._fd, 65536))
        return self.seen.index(text, since) + len(text)

    def _see(self, data: bytes) -> None:
        """Half a character waits for its other half."""
        self.seen += self._decoder.decode(data)

    def finish(self) -> int:
        while True:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the way a terminal says that its program has gone
                break
            if not data:
                break
            self._see(data)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def test_on_a_terminal_the_conversation_is_kept_until_ctrl_d(server: Server, box_env: Any) -> None:
    server.pieces = ["a \x1b[2Jb"]
    chat = Terminal("chat")
    at = chat.wait_for("> ")
    chat.type("one\n")
    at = chat.wait_for("prompt tokens cached", at)
    at = chat.wait_for("> ", at)
    chat.type("two\n")
    at = chat.wait_for("prompt tokens cached", at)
    at = chat.wait_for("> ", at)
    chat.type("\x04")
    assert chat.finish() == 0
    assert "a \\x1b[2Jb" in chat.seen
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["one", "a \x1b[2Jb", "two"]
    history = box_env.home / "state" / "chat_history"
    assert history.read_text().splitlines()[-2:] == ["one", "two"]
    assert history.stat().st_mode & 0o077 == 0


def test_on_a_terminal_ctrl_c_ends_the_answer_not_the_conversation(server: Server) -> None:
    server.ending = "stall"
    chat = Terminal("chat")
    at = chat.wait_for("> ")
    chat.type("one\n")
    at = chat.wait_for("is Paris.", at)
    chat.type("\x03")
    at = chat.wait_for("cut short", at)
    server.ending = "error"
    at = chat.wait_for("> ", at)
    chat.type("two\n")
    at = chat.wait_for("worker w was lost", at)
    server.ending = "done"
    at = chat.wait_for("> ", at)
    chat.type("three\n")
    at = chat.wait_for("prompt tokens cached", at)
    chat.wait_for("> ", at)
    chat.type("\x04")
    assert chat.finish() == 0
    contents = [message["content"] for message in server.bodies[2]["messages"]]
    assert contents == ["one", "The capital is Paris.", "three"], "the question that failed is taken back"


def test_tables_do_not_wrap_on_a_narrow_terminal(supervisor: Any) -> None:
    ps = Terminal("ps", NO_COLOR="1")
    assert ps.finish() == 0
    table = ps.seen.splitlines()[3:]
    assert len(table) == 4
    assert all(len(line) <= 60 for line in table)
    assert "\x1b" not in ps.seen
