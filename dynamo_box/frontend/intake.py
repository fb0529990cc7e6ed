"""A request body → a `Task`: what is asked for, checked, with every field that can't be served refused by name."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from dynamo_box.frontend import schemas
from dynamo_box.frontend.errors import ApiError, invalid_request, unsupported
from dynamo_box.frontend.priorities import read_priority, read_ranges
from dynamo_box.protocol.request import PriorityRange

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat answer may take the rest of the context."""

_PATH = re.compile(r"\$\.(\w+)")
_MISSING = re.compile(r"missing required field `(\w+)`")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Task(msgspec.Struct, frozen=True):
    """One completion. Exactly one of `messages`, `text` and `tokens` is set; `max_tokens` None means the rest of the
    context. `seed` etc. as in `protocol.request.Sampling`. `priority` is None where the client gave none.
    """

    model: str
    chat: bool
    messages: list[dict[str, str]] | None
    text: str | None
    tokens: list[int] | None
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    ignore_eos: bool
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    cache_salt: str | None
    priority: int | None
    kv_priorities: tuple[PriorityRange, ...]
    pin: str | None
    annotations: tuple[str, ...]
    extra_fields: tuple[str, ...]


def read_chat(body: bytes) -> Task:
    """Raises ApiError (400) that names the field."""
    decoded: schemas.ChatBody = _decode(schemas.chat_decoder, body)
    _refuse_unserved(decoded)
    messages = [_read_message(raw, number) for number, raw in enumerate(decoded.messages)]
    limit = decoded.max_completion_tokens or decoded.max_tokens
    return _task(decoded, limit, messages=messages)


def read_completion(body: bytes) -> Task:
    """Raises ApiError (400) that names the field."""
    decoded: schemas.CompletionBody = _decode(schemas.completion_decoder, body)
    _refuse_unserved(decoded)
    prompt = decoded.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    limit = decoded.max_tokens or DEFAULT_COMPLETION_TOKENS
    if isinstance(prompt, str):
        return _task(decoded, limit, text=prompt)
    try:
        tokens = msgspec.convert(prompt, schemas.token_ids_type)
    except msgspec.ValidationError as error:
        raise invalid_request(
            "'prompt' must be a string, a list of token ids, or a list of one of either; several prompts in one "
            "request are not served, so send one request for each",
            "prompt",
        ) from error
    return _task(decoded, limit, tokens=tokens)


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_request(f"the body is not valid JSON: {error}") from error


def _invalid(text: str) -> ApiError:
    found = _PATH.search(text) or _MISSING.search(text)
    field = found.group(1) if found else None
    return invalid_request(f"'{field}': {text}" if field else text, field)


def _refuse_unserved(body: schemas.Refused) -> None:
    for field in schemas.Refused.__struct_fields__:
        value = getattr(body, field)
        if value is None or value is False or value in schemas.NEUTRAL.get(field, ()):
            continue
        raise unsupported(field, f"'{field}' is not served by this engine")


def _read_message(raw: msgspec.Raw, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    try:
        message = schemas.message_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid_request(f"{where}: {error}", "messages") from error
    if message.tool_calls or message.function_call or message.role in ("tool", "function"):
        raise invalid_request(
            f"{where}: tools are not served by this engine; leave out 'tool_calls' and tool messages",
            "messages",
            "unsupported_parameter",
        )
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid_request(f"{where}: role {message.role!r} is none of {', '.join(_ROLES)}", "messages")
    return {"role": role, "content": _text_of(message.content, where)}


def _text_of(content: str | list[schemas.ContentPart] | None, where: str) -> str:
    if content is None:
        raise invalid_request(f"{where}: 'content' is missing", "messages")
    if isinstance(content, str):
        return content
    for part in content:
        if part.type != "text" or part.text is None:
            raise invalid_request(
                f"{where}: content of type {part.type!r} is not served by this engine; send text",
                "messages",
                "unsupported_parameter",
            )
    return "\n".join(part.text or "" for part in content)


def _task(
    body: schemas.CommonBody,
    max_tokens: int | None,
    *,
    messages: list[dict[str, str]] | None = None,
    text: str | None = None,
    tokens: list[int] | None = None,
) -> Task:
    extension = body.nvext or schemas.Nvext()
    if extension.cache_salt is not None:
        raise invalid_request("'cache_salt' keeps nothing apart in 'nvext'; give it beside 'nvext'", "nvext.cache_salt")
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    top_k = body.top_k if body.top_k is not None else extension.top_k
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid_request("'stream_options' goes with 'stream': true only", "stream_options")
    return Task(
        model=body.model,
        chat=messages is not None,
        messages=messages,
        text=text,
        tokens=tokens,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or extension.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(top_k or 0, 0),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos or extension.ignore_eos),
        stops=stops,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        cache_salt=body.cache_salt,
        priority=read_priority(body),
        kv_priorities=read_ranges(extension),
        pin=extension.backend_instance_id,
        annotations=tuple(extension.annotations or ()),
        extra_fields=tuple(extension.extra_fields or ()),
    )
