"""Engine options are checked with the profile, by tables that say what the engines themselves accept."""

from __future__ import annotations

import msgspec
import pytest

from dynamo_box.errors import ProfileError
from dynamo_box.profile.engine_options import ENGINE_OPTIONS, NATIVE_BATCH_TOKENS, Option
from dynamo_box.profile.load import load_text
from engines.contract import EngineError
from engines.mock.options import MockOptions, parse_options
from engines.native.config import DEFAULT_MAX_BATCH_TOKENS, DTYPES, Options, read_options

Value = bool | int | float | str
CASES: tuple[Value, ...] = (-1, 0, 1, 0.5, -0.5, 4096, True, False, "", "1", "infinite", "fast", "none", *DTYPES)


def problems(model: str) -> list[str]:
    try:
        load_text(f"model: {model}\n", "p.yaml", {})
    except ProfileError as error:
        return list(error.details)
    return []


def taken_by_engine(engine: str, key: str, value: Value) -> bool:
    try:
        if engine == "mock":
            parse_options({key: value})
        else:
            read_options({key: value}, 1)
    except EngineError:
        return False
    return True


def test_the_tables_have_the_engines_own_names() -> None:
    assert tuple(ENGINE_OPTIONS["mock"]) == MockOptions.__struct_fields__
    assert tuple(ENGINE_OPTIONS["native"]) == tuple(Options.__dataclass_fields__)
    assert ENGINE_OPTIONS["native"]["dtype"].words == DTYPES
    assert NATIVE_BATCH_TOKENS == DEFAULT_MAX_BATCH_TOKENS


@pytest.mark.parametrize(
    ("engine", "key", "option"),
    [(engine, key, option) for engine, options in ENGINE_OPTIONS.items() for key, option in options.items()],
)
def test_profile_and_engine_take_the_same_values(engine: str, key: str, option: Option) -> None:
    for value in CASES:
        text = msgspec.json.encode(value).decode()
        found = problems(f"{{name: a, engine: {engine}, max_batch: 1, options: {{{key}: {text}}}}}")
        assert (not found) == taken_by_engine(engine, key, value), (key, value, found)


def test_all_that_is_wrong_at_once_in_its_place() -> None:
    model = (
        "{name: a b, engine: mock, options: {decode_mss: 1, decode_ms: fast, kv_blocks: 0, speedup: slow, fault: 3}}"
    )
    assert [problem.split(": ", 1) for problem in problems(model)][1:] == [
        ["p.yaml:1:44", 'unknown key "decode_mss"; did you mean "decode_ms"?'],
        ["p.yaml:1:70", '"decode_ms" must be a number, not "fast"'],
        ["p.yaml:1:87", '"kv_blocks" must be at least 1, not 0'],
        ["p.yaml:1:99", '"speedup" must be a number or "infinite", not "slow"'],
        ["p.yaml:1:112", '"fault" must be a text (put it into quotes), not 3'],
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{dtype: float16}", '"dtype" can\'t be "float16"; did you mean "bfloat16"?'),
        ("{dtypes: float32}", 'unknown key "dtypes"; did you mean "dtype"?'),
        ("{zzz: 1}", 'unknown key "zzz"; known are dtype, max_batch_tokens'),
        ("{max_batch_tokens: 1.5}", '"max_batch_tokens" must be a whole number, not 1.5'),
        ("{max_batch_tokens: 99999999999999999999}", '"max_batch_tokens" must be at most 9223372036854775807'),
        ("{max_batch_tokens: 8}", "max_batch_tokens 8 is below max_batch 32: each sequence takes a token a step"),
    ],
)
def test_options_of_the_native_engine(options: str, expected: str) -> None:
    (problem,) = problems(f"{{name: a, options: {options}}}")
    assert problem.split(": ", 1)[1] == expected


def test_a_batch_beyond_the_default_step_needs_the_option() -> None:
    assert len(problems("{name: a, max_batch: 4096}")) == 1
    assert not problems("{name: a, max_batch: 4096, options: {max_batch_tokens: 4096}}")


def test_infinite_numbers_are_refused() -> None:
    (problem,) = problems("{name: a, engine: mock, options: {decode_ms: .inf}}")
    assert problem.endswith('"decode_ms" must be a finite number, not inf')


def test_engines_without_a_table_take_anything() -> None:
    assert not problems("{name: a, engine: vllm, options: {gpu_memory_utilization: 0.8, x: y}}")
