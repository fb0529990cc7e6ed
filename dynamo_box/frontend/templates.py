"""Chat templates: the model's own Jinja, in a sandbox that can change nothing and reach nothing."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dynamo_box.frontend.errors import invalid_request

MAX_PROMPT_CHARACTERS = 32 * 1024 * 1024
MAX_RENDER_S = 5.0
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can do wrong with messages that it wasn't made for."""

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Used for a model that brings no template but knows ChatML's special tokens."""


class ChatTemplate:
    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises:
        ValueError: the source is no template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the model's chat template is none: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt up to where the assistant's answer begins.

        Raises:
            ApiError: the template refuses these messages (400).
        """
        pieces: list[str] = []
        size = 0
        give_up_at = time.monotonic() + MAX_RENDER_S
        try:
            for piece in self._template.generate(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_PROMPT_CHARACTERS:
                    raise invalid_request("the messages make a prompt that is too long", "messages")
                if time.monotonic() > give_up_at:
                    raise invalid_request("the messages take the model's chat template too long", "messages")
        except _FAILURES as error:
            raise invalid_request(f"the model's chat template refuses these messages: {error}", "messages") from error
        return "".join(pieces)


def load_chat_template(model: Path, special_tokens: set[str]) -> ChatTemplate | None:
    """The template of a Hugging Face directory: `chat_template.jinja`, else the one in tokenizer_config.json.

    None when there is none: such a model serves completions only.
    """
    configuration = _read_json(model / "tokenizer_config.json")
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in configuration.items()
        if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value is not None
    }
    file = model / "chat_template.jinja"
    source: Any = file.read_text("utf-8") if file.exists() else configuration.get("chat_template")
    if isinstance(source, list):
        source = next((each["template"] for each in source if each.get("name") == "default"), None)
    if source is None and {"<|im_start|>", "<|im_end|>"} <= special_tokens:
        source = _CHATML
    return ChatTemplate(source, names) if isinstance(source, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now(datetime.UTC).astimezone().strftime(pattern)
