"""The request bodies of the OpenAI API as far as they are served here, and `nvext`.

A field that is known but can't be served is declared in `Refused`, so that it is refused by name instead of being
ignored; unknown fields are ignored, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024
MAX_KV_PRIORITIES = 256
I64 = 2**63 - 1

Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=1_000_000)]
TokenLimit = Annotated[int, Meta(ge=1, le=2**31 - 1)]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-I64 - 1, le=I64)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[StopString], Meta(max_length=MAX_STOPS)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class AgentHints(msgspec.Struct, frozen=True):
    priority: int | None = None


class KvPriority(msgspec.Struct, frozen=True):
    """What the KV of the prompt's tokens from `start` up to but without `end` is worth. `priorities` has the bounds."""

    start: int
    end: int
    priority: int


class Nvext(msgspec.Struct, frozen=True):
    """Dynamo's extension. `backend_instance_id` names the worker to use; `priority` is agent_hints' own, in short.
    `cache_salt` belongs beside it and is refused here: who wants to be kept apart must not be left together unheard.
    """

    ignore_eos: bool | None = None
    min_tokens: MinTokens | None = None
    top_k: TopK | None = None
    annotations: Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=64)] | None = None
    backend_instance_id: Name | None = None
    agent_hints: AgentHints | None = None
    priority: int | None = None
    kv_priorities: Annotated[list[KvPriority], Meta(max_length=MAX_KV_PRIORITIES)] | None = None
    extra_fields: list[Literal["worker_id", "timing"]] | None = None
    cache_salt: Any = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that no engine here can serve yet. `intake` refuses any value that would change the answer."""

    n: int | None = None
    best_of: Any = None
    logprobs: bool | int | None = None
    top_logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    response_format: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    lora: Any = None
    lora_name: Any = None
    echo: Any = None
    suffix: Any = None


class CommonBody(Refused, frozen=True, kw_only=True):
    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_tokens: TokenLimit | None = None
    min_tokens: MinTokens | None = None
    stop: StopString | StopList | None = None
    seed: Seed | None = None
    ignore_eos: bool | None = None
    cache_salt: Name | None = None
    priority: int | None = None
    nvext: Nvext | None = None


class ChatBody(CommonBody, frozen=True, kw_only=True):
    """`messages` are decoded one by one (`Message`), so that an error can say which."""

    messages: Annotated[list[msgspec.Raw], Meta(min_length=1)]
    max_completion_tokens: TokenLimit | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    """`prompt`: a string, a list of token ids, or a list of one of either."""

    prompt: str | list[Any]


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (),
    "top_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
"""Values of refused fields that ask for nothing; null always does."""

chat_decoder = msgspec.json.Decoder(ChatBody)
completion_decoder = msgspec.json.Decoder(CompletionBody)
message_decoder = msgspec.json.Decoder(Message)
token_ids_type = list[TokenId]
