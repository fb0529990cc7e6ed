"""`dynbox chat`: talk to a model of the box over its HTTP API, as any other client would."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from dynamo_box import wording
from dynamo_box.cli import complete, output, stderr, terminal
from dynamo_box.cli.names import did_you_mean
from dynamo_box.cli.openai_stream import Answer, stream_chat
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import BoxError, ExitCode, UsageError
from dynamo_box.paths import home, run_dir
from dynamo_box.snapshot import BoxSnapshot

app = complete.verb()

PROMPT = "> "
HISTORY_LINES = 1000


class Conversation:
    """Messages so far, and how to ask for the next one."""

    def __init__(self, endpoint: str, model: str, system: str | None, options: dict[str, object]) -> None:
        self._endpoint = endpoint
        self._model = model
        self._options = options
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def ask(self, message: str, show: Callable[[str], None]) -> tuple[Answer, bool]:
        """Stream the answer to `message`; the second value is whether Ctrl-C cut it short. What came is kept.

        Raises:
            BoxError: no answer; the message is taken back.
        """
        self._messages.append({"role": "user", "content": message})
        answer = Answer()
        body: dict[str, object] = {"model": self._model, "messages": self._messages, **self._options}
        cut_short = False
        try:
            with contextlib.closing(stream_chat(self._endpoint, body, answer)) as pieces:
                for piece in pieces:
                    show(piece)
        except KeyboardInterrupt:
            cut_short = True
        except BoxError:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": answer.text})
        return answer, cut_short


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A model that the box serves.", autocompletion=complete.served_models)
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", help="Ask this, print the answer, and leave."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told before you speak.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=2.0, metavar="T", help="0 is greedy (default 0.2).")
    ] = 0.2,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Limit of one answer.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer with its figures as one JSON object.")
    ] = False,
) -> ExitCode:
    """Talk to a model. Ctrl-C ends an answer, Ctrl-D the conversation; a piped text is asked as one message."""
    with ControlClient.connect(run_dir()) as client:
        snapshot = client.snapshot()
    name = choose_model(snapshot, model)
    options: dict[str, object] = {"temperature": temperature}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    conversation = Conversation(snapshot.box.endpoint, name, system, options)

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise UsageError("there is nothing to ask: stdin is empty", remedy="use -m TEXT, or pipe a text in")
    if message is not None:
        cut_short = _turn(conversation, name, message, as_json=as_json)
        return ExitCode.INTERRUPTED if cut_short else ExitCode.OK

    stderr.say(f"{name} on {snapshot.box.endpoint}; Ctrl-C ends an answer, Ctrl-D the conversation")
    for line in _typed_lines():
        try:
            _turn(conversation, name, line, as_json=as_json)
        except BoxError as error:
            stderr.report(error)
    return ExitCode.OK


def choose_model(snapshot: BoxSnapshot, wanted: str | None) -> str:
    """Raises:
    UsageError: the box doesn't serve it, or serves several and none was named.
    """
    names = [model.name for model in snapshot.models]
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise UsageError("which model?", remedy=f"dynbox chat {' | '.join(names)}")
    if wanted not in names:
        raise UsageError(
            f"the box doesn't serve a model called {wanted!r}",
            remedy=did_you_mean(wanted, names, kind="models served"),
        )
    return wanted


def footer(answer: Answer, *, cut_short: bool) -> str:
    """`TTFT 84 ms · 43.1 tokens/s · 12 tokens · smollm2.aggregated.0 · 24 of 37 prompt tokens cached`."""
    parts = []
    if answer.first_at is not None:
        parts.append(f"TTFT {answer.first_at * 1000:.0f} ms")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.usage is not None:
        parts.append(f"{answer.usage.completion_tokens} tokens")
    if answer.worker is not None:
        parts.append(answer.worker)
    if answer.usage is not None and answer.usage.cached_tokens is not None:
        parts.append(f"{answer.usage.cached_tokens} of {answer.usage.prompt_tokens} prompt tokens cached")
    if cut_short:
        parts.append("cut short")
    elif answer.finish_reason == "length":
        parts.append("stopped at the token limit")
    return " · ".join(parts)


def _turn(conversation: Conversation, model: str, message: str, *, as_json: bool) -> bool:
    """One question and its answer; returns whether Ctrl-C cut it short."""
    answer, cut_short = conversation.ask(message, (lambda _: None) if as_json else _show)
    if as_json:
        output.json_line(
            {
                "model": model,
                "text": answer.text,
                "finish_reason": "cancelled" if cut_short else answer.finish_reason,
                "usage": answer.usage,
                "worker": answer.worker,
                "ttft_s": answer.first_at,
                "tokens_per_s": answer.tokens_per_s,
                "cached_tokens": answer.usage.cached_tokens if answer.usage else None,
            }
        )
    else:
        output.text("")
        sys.stdout.flush()
        stderr.say(terminal.style(wording.printable(footer(answer, cut_short=cut_short)), "dim", sys.stderr))
    return cut_short


def _show(piece: str) -> None:
    sys.stdout.write(wording.printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def _typed_lines() -> Iterator[str]:
    """Lines with editing and a history over sessions, until Ctrl-D; Ctrl-C drops the line that is being typed."""
    with _history(home().state / "chat_history"):
        while True:
            try:
                line = input(PROMPT).strip()
            except EOFError:
                stderr.say("")
                return
            except KeyboardInterrupt:
                stderr.say("")
                continue
            if line:
                yield line


@contextlib.contextmanager
def _history(path: Path) -> Iterator[None]:
    import readline

    with contextlib.suppress(OSError):  # none yet, or not ours to read
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)
        except OSError as error:
            stderr.warn(f"the chat history can't be kept in {path}: {error.strerror}")
