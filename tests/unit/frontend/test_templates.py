"""Chat templates are a stranger's code: they may refuse, they may fail, and they may reach nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dynamo_box.frontend import templates
from dynamo_box.frontend.errors import ApiError
from dynamo_box.frontend.templates import ChatTemplate, load_chat_template

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}\n{{ m.content }}{% endfor %}", "<s>hi"),
        ("  {% if tools %}\nx{% endif %}\ny", "y"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in messages %}{% break %}{% endfor %}ok", "ok"),
    ],
)
def test_what_templates_in_the_wild_use_is_there(source: str, text: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content.upper() }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% for _ in range(10 ** 9) %}x{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_refuses_fails_or_reaches_out_is_a_400(source: str) -> None:
    with pytest.raises(ApiError) as refusal:
        ChatTemplate(source, {}).render(HELLO)
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


def test_what_a_template_says_on_refusal_is_passed_on() -> None:
    with pytest.raises(ApiError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(HELLO)


def test_output_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ChatTemplate("{% for _ in range(90000) %}{% for _ in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}", {})
    monkeypatch.setattr(templates, "MAX_PROMPT_CHARACTERS", 10_000)
    with pytest.raises(ApiError, match="too long"):
        endless.render(HELLO)
    monkeypatch.setattr(templates, "MAX_PROMPT_CHARACTERS", 10**12)
    monkeypatch.setattr(templates, "MAX_RENDER_S", 0.05)
    with pytest.raises(ApiError, match="too long"):
        endless.render(HELLO)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, set()) is None
    chatml = load_chat_template(tmp_path, {"<|im_start|>", "<|im_end|>"})
    assert chatml is not None
    assert chatml.render(HELLO) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    config = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": several, "eos_token": {"content": "</s>"}}))
    named = load_chat_template(tmp_path, set())
    assert named is not None
    assert named.render(HELLO) == "</s>"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    from_file = load_chat_template(tmp_path, set())
    assert from_file is not None
    assert from_file.render(HELLO) == "from a file"


def test_a_template_that_is_none_is_an_error_at_load_time(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="chat template"):
        load_chat_template(tmp_path, set())
