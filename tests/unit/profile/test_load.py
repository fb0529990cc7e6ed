"""From a name or a file to a profile, and every problem with its line and column."""

# ruff: noqa: E501 (an expected text is one line)

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_box.errors import ExitCode, ProfileError
from dynamo_box.profile.directories import profile_names, shipped_directory
from dynamo_box.profile.json_schema import schema_text
from dynamo_box.profile.load import list_profiles, load_profile, load_text, merge, profile_text, resolved
from dynamo_box.profile.schema import Profile
from dynamo_box.profile.yaml_tree import Leaf, Mapping, Place, plain_data

SHIPPED = ("llama70b-disagg", "mock-8gpu", "smollm2", "smollm2-disagg", "smollm2-duo", "two-models")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no profiles of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        load_text(text, "p.yaml", environ or {})
    assert caught.value.exit_code == ExitCode.USAGE
    return list(caught.value.details)


# what is shipped


def test_the_shipped_profiles_load() -> None:
    assert tuple(profile_names({"XDG_CONFIG_HOME": "/nonexistent"})) == SHIPPED
    for name in SHIPPED:
        profile = load_profile(name, {})
        assert profile.name == name
        assert profile.description
        assert profile.frontend.port == 8000
        assert profile_text(name, {}).startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("name", ["smollm2", "smollm2-disagg", "smollm2-duo"])
def test_smollm2_profiles_serve_smollm2(name: str) -> None:
    (model,) = load_profile(name, {}).served
    assert (model.name, model.engine, model.block_size, model.max_batch) == ("smollm2", "native", 16, 32)


def test_smollm2_duo_has_two_workers_and_routes_by_kv() -> None:
    profile = load_profile("smollm2-duo", {})
    ((role, workers),) = profile.served[0].workers.roles
    assert (role, workers.replicas, profile.router.mode) == ("aggregated", 2, "kv")


def test_smollm2_disagg_has_a_worker_for_each_leg_and_falls_back() -> None:
    profile = load_profile("smollm2-disagg", {})
    (model,) = profile.served
    assert [(role, workers.replicas) for role, workers in model.workers.roles] == [("prefill", 1), ("decode", 1)]
    assert profile.disagg.policy == "fallback" and profile.memory.tiers.host
    assert (model.targets.ttft, model.targets.itl) == (2.0, 0.1)


def test_two_models_are_one_model_in_two_dtypes_of_which_neither_is_pinned() -> None:
    profile = load_profile("two-models", {})
    assert [(model.name, model.origin, model.options.get("dtype")) for model in profile.served] == [
        ("smollm2", "smollm2", None),
        ("smollm2-bf16", "smollm2", "bfloat16"),
    ]
    assert [profile.sleep_of(model).keep for model in profile.served] == ["host", "host"]
    assert not any(profile.sleep_of(model).pin for model in profile.served)


def test_the_schema_file_is_current() -> None:
    current = (shipped_directory() / "schema.json").read_text()
    assert current == schema_text(), "run `python -m dynamo_box.profile.json_schema > profiles/schema.json`"


# shorthands and extends


def test_the_shortest_profile(here: Path) -> None:
    write(here / "mine.yaml", "model: smollm2\n")
    profile = load_profile("mine.yaml")
    assert profile.name == "mine"
    assert profile.served[0].origin == "smollm2"
    assert [(role, workers.replicas) for role, workers in profile.served[0].workers.roles] == [("aggregated", 1)]


@pytest.mark.parametrize("workers", ["3", "{aggregated: 3}", "{aggregated: {replicas: 3}}"])
def test_workers_in_short(workers: str) -> None:
    profile = load_text(f"model: {{name: a, workers: {workers}}}", "p", {})
    assert profile.served[0].workers.roles[0][1].replicas == 3


def test_sizes_and_durations() -> None:
    profile = load_text("model: {name: a, kv_memory: 1.5GiB}\ndrain: 2m\nmemory: {host: 4GB}\n", "p", {})
    assert (profile.served[0].kv_memory, profile.drain, profile.memory.host) == (3 << 29, 120.0, 4 * 10**9)


def test_extends_merges_mappings_and_replaces_the_rest(here: Path) -> None:
    write(
        here / "base.yaml",
        "name: base\nmodel: {name: a, engine: vllm, options: {x: 1, y: 2}}\nrouter: {mode: random, seed: 1}\n",
    )
    write(here / "sub/mine.yaml", "extends: ../base.yaml\nmodel:\n  options: {y: 3}\nrouter: {seed: }\n")
    profile = load_profile("sub/mine.yaml")
    assert (profile.name, profile.served[0].options) == ("mine", {"x": 1, "y": 3})
    assert (profile.router.mode, profile.router.seed) == ("random", None)


def test_an_empty_key_takes_the_bases_value_away(here: Path) -> None:
    write(here / "base.yaml", "model: a\n")
    write(here / "mine.yaml", "extends: ./base.yaml\nmodel:\nmodels: [b, c]\n")
    assert [model.name for model in load_profile("mine.yaml").served] == ["b", "c"]


def test_a_replaced_variable_need_not_be_set(here: Path) -> None:
    write(here / "base.yaml", "model: a\nfrontend: {port: '${NOT_SET}'}\n")
    write(here / "mine.yaml", "extends: ./base.yaml\nfrontend: {port: 9000}\n")
    assert load_profile("mine.yaml", {}).frontend.port == 9000


def test_a_problem_is_where_its_value_came_from(here: Path) -> None:
    write(here / "base.yaml", "model: a\nfrontend:\n  port: 99999\n")
    write(here / "mine.yaml", "extends: ./base.yaml\nrouter: {modus: kv}\n")
    with pytest.raises(ProfileError) as caught:
        load_profile("mine.yaml")
    assert caught.value.details == (
        'base.yaml:3:9: "port" must be at most 65535, not 99999',
        'mine.yaml:2:10: unknown key "modus"; did you mean "mode"?',
    )


def test_a_circle_is_named(here: Path) -> None:
    write(here / "a.yaml", "extends: ./b.yaml\n")
    write(here / "b.yaml", "extends: ./a.yaml\n")
    with pytest.raises(ProfileError) as caught:
        load_profile("a.yaml")
    assert caught.value.details == ("b.yaml:1:10: extends in a circle: a → b → a",)


def test_too_long_a_chain_is_named(here: Path) -> None:
    for n in range(12):
        write(here / f"p{n}.yaml", f"extends: ./p{n + 1}.yaml\n")
    with pytest.raises(ProfileError) as caught:
        load_profile("p0.yaml")
    assert "extends more than 8 profiles in a row: p0 → p1 →" in caught.value.details[0]


def test_a_base_that_is_not_there() -> None:
    (problem,) = refused("model: a\nextends: smolm2\n")
    assert problem == 'p.yaml:2:10: extends: no profile "smolm2"; did you mean "smollm2"?'
    assert refused("extends: [a]\n") == ['p.yaml:1:10: "extends" must be a profile\'s name or path']


# every problem at once


def test_all_problems_at_once_with_line_and_column() -> None:
    text = """\
model:
  name: x y
  engine: natve
  max_batch: lots
  blok_size: 16
  workers:
    aggregated: {replicas: 0}
    prefil: 2
frontend: {host: 0.0.0.0, port: "x"}
routr: {}
memory:
  host: 4GIB
simulate: {devices: [{count: 2}]}
"""
    assert refused(text) == [
        "p.yaml:2:9: \"name\" can't be \"x y\": letters, digits, '.', '-' and '_', beginning with a letter or digit, at most 64",
        'p.yaml:3:11: "engine" can\'t be "natve"; did you mean "native"?',
        'p.yaml:4:14: "max_batch" must be a whole number, not "lots"',
        'p.yaml:5:3: unknown key "blok_size"; did you mean "block_size"?',
        'p.yaml:7:28: "replicas" must be at least 1, not 0',
        'p.yaml:8:5: unknown key "prefil"; did you mean "prefill"?',
        'p.yaml:9:18: "host" can\'t be "0.0.0.0"; did you mean "127.0.0.1"?',
        'p.yaml:9:33: "port" must be a whole number, not "x"',
        'p.yaml:10:1: unknown key "routr"; did you mean "router"?',
        'p.yaml:12:9: "host" must be a size such as "512MiB" or "4GiB", not "4GIB"',
        'p.yaml:13:22: "memory" is missing',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("description: x\n", "p.yaml:1:1: names no model: add `model: NAME`, or a list `models:`"),
        ("model: a\nmodels: [b]\n", "p.yaml:2:9: a profile has `model` or `models`, not both"),
        ("models: [a, a]\n", 'p.yaml:1:13: two models are called "a"'),
        ("model: {name: a, workers: {aggregated: 1, prefill: 1, decode: 1}}\n",
         "p.yaml:1:40: a model has aggregated workers, or prefill and decode workers"),
        ("model: a\ndisagg: {policy: strict, min_uncached_tokens: 5}\n",
         "p.yaml:2:47: policy strict has no thresholds; take it out, or set policy: conditional"),
        ("model: a\ndisagg: {policy: sometimes}\n",
         'p.yaml:2:18: "policy" can\'t be "sometimes"; known are strict, fallback, conditional'),
        ("model: a\ndisagg: {policy: conditional, min_uncached_share: 1.5}\n",
         'p.yaml:2:51: "min_uncached_share" must be at most 1, not 1.5'),
        ("model: {name: a, targets: {ttft: 0s}}\n", 'p.yaml:1:34: "ttft" must be above 0, not "0s"'),
        (
            "model: {name: a, targets: {itl: 50}}\n",
            'p.yaml:1:33: "itl" needs a unit, 50 has none: write "50ms" or "50s"',
        ),
        ("model: {name: a, engine: mock, workers: {prefill: 1}}\n", "p.yaml:1:51: prefill workers need decode workers beside them"),
        ("model: {name: a, engine: mock, workers: {aggregated: {devices: cpu, tensor_parallel: 2}}}\n",
         "p.yaml:1:86: tensor_parallel needs GPUs; there is one cpu device"),
        ("model: {name: a, engine: vllm, workers: {aggregated: {devices: cpu}}}\n",
         "p.yaml:1:64: the vllm engine needs GPUs; native and mock run on the cpu"),
        ("model: {name: a, engine: mock, workers: {aggregated: {devices: 3, tensor_parallel: 2}}}\n",
         "p.yaml:1:64: 3 GPUs can't be shared out to replicas of tensor_parallel 2"),
        ("model: {name: a, engine: mock, workers: {aggregated: {devices: [0, 0]}}}\n", 'p.yaml:1:64: "devices" names a device twice'),
        ("model: {name: a, engine: mock, workers: {aggregated: {devices: gpu}}}\n",
         'p.yaml:1:64: "devices" must be "cpu", a number of GPUs, or a list of GPU indices'),
        ("model: a\nsimulate: {devices: [{memory: 1GiB}]}\n", "p.yaml:1:8: simulated devices carry the mock engine, not native"),
        ("model: {name: a, context_length: 8}\n", "p.yaml:1:34: a context of 8 tokens is shorter than a block of 16"),
        ("model: a\nmemory: {host: 1GiB, cpu: 2GiB}\n",
         "p.yaml:2:27: the cpu device's budget is part of memory.host, and larger than it"),
        ("model: a\nrestart: {first: 10s, longest: 1s}\n", "p.yaml:2:32: the longest wait is shorter than the first (10 s)"),
        ("model: {name: a, options: {x: [1]}}\n", 'p.yaml:1:31: "x" an engine option must be a text, a number, true or false'),
        ("model: [a]\n", 'p.yaml:1:8: "model" must be a mapping, not a list'),
        ("model: a\nrouter: kv\n", 'p.yaml:2:9: "router" must be a mapping, not "kv"'),
        ("model: a\nrouter: {temperature: .inf}\n", 'p.yaml:2:23: "temperature" must be a finite number, not inf'),
        ("model: 8\n", 'p.yaml:1:8: "name" must be a text (put it into quotes), not 8'),
    ],
)  # fmt: skip
def test_impossible_combinations(text: str, expected: str) -> None:
    assert refused(text) == [expected]


def test_control_characters_are_escaped() -> None:
    (problem,) = refused('model: {name: "a\\nb\\e[31m"}\n')
    assert r'be "a\nb\x1b[31m": letters' in problem and problem.isprintable()
    assert refused('model: a\n"x\\ny": 1\n')[0].startswith(r'p.yaml:2:1: unknown key "x\ny"; known are')
    assert r"a\nb" in refused('extends: "a\\nb"\n')[0]


def test_an_unknown_key_does_not_hide_what_stands_beside_it() -> None:
    problems = refused("model: {name: a, engine: vllm, x: 1, workers: {aggregated: {devices: cpu, y: 1}}}\n")
    assert [problem.split(": ", 1)[1][:12] for problem in problems] == [
        "unknown key ",
        "the vllm eng",
        "unknown key ",
    ]


# files


def test_names_paths_and_what_is_not_there(here: Path) -> None:
    (here / "directory.yaml").mkdir()
    for reference, words in (
        ("./nothing.yaml", "no profile at ./nothing.yaml"),
        ("directory.yaml", "directory.yaml is a directory, not a profile"),
        ("smolm2", 'no profile "smolm2"; did you mean "smollm2"?'),
        ("", "no profile"),
    ):
        with pytest.raises(ProfileError, match="profile") as caught:
            load_profile(reference)
        assert caught.value.what.startswith(words)


def test_a_fifo_is_not_read(here: Path) -> None:
    os.mkfifo(here / "pipe.yaml")
    with pytest.raises(ProfileError) as caught:
        load_profile("pipe.yaml")
    assert caught.value.details == ("pipe.yaml:1:1: not a file",)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(here: Path) -> None:
    write(here / "p.yaml", "model: a\n").chmod(0)
    with pytest.raises(ProfileError) as caught:
        load_profile("p.yaml")
    assert caught.value.details == ("p.yaml:1:1: can't be read: Permission denied",)


def test_a_users_profile_hides_a_shipped_one_and_a_broken_one_is_listed(here: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(here / "config")}
    write(here / "config/dynbox/profiles/smollm2.yaml", "model: mine\ndescription: my own\n")
    write(here / "config/dynbox/profiles/broken.yml", "modl: mine\n")
    listed = {one.name: one for one in list_profiles(environ)}
    assert set(listed) == {*SHIPPED, "broken"}
    assert (listed["smollm2"].shipped, listed["smollm2"].description) == (False, "my own")
    assert 'unknown key "modl"; did you mean "model"?' in listed["broken"].problem
    assert load_profile("smollm2", environ).served[0].name == "mine"


# merging, for any two mappings

PLACE = Place("p", 1, 1)
TREES = st.recursive(
    st.integers(0, 9).map(lambda n: Leaf(PLACE, str(n))),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda d: tree(d)),
    max_leaves=8,
)


def tree(entries: dict[str, object]) -> Mapping:
    return Mapping(PLACE, entries, dict.fromkeys(entries, PLACE))  # type: ignore[arg-type]


MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3).map(lambda d: tree(d))


def brute(base: object, over: object) -> object:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {k: brute(base[k], over[k]) if k in base and k in over else {**base, **over}[k] for k in {**base, **over}}


@given(MAPPINGS, MAPPINGS)
def test_merge_is_what_it_says(base: Mapping, over: Mapping) -> None:
    assert plain_data(merge(base, over)) == brute(plain_data(base), plain_data(over))


@given(MAPPINGS)
def test_merging_nothing_changes_nothing(one: Mapping) -> None:
    empty = tree({})
    assert (
        plain_data(merge(one, empty)) == plain_data(merge(empty, one)) == plain_data(merge(one, one)) == plain_data(one)
    )


def test_a_profile_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Profile.model_validate({"model": {"name": "a"}}).name = "b"  # type: ignore[misc]


# sleep


def test_what_a_model_says_of_its_sleep_goes_before_what_the_box_says() -> None:
    text = """
models:
  - {name: plain}
  - {name: own, sleep: {idle_ttl: 90s, keep: disk}}
  - {name: fixed, sleep: {pin: true}}
  - {name: tireless, sleep: {idle_ttl: never}}
sleep: {idle_ttl: 10m, min_awake: 5s, keep: device}
"""
    profile = load_text(text, "p.yaml", {})
    plain, own, fixed, tireless = (profile.sleep_of(model) for model in profile.served)
    assert (plain.idle_ttl, plain.pin, plain.min_awake, plain.keep) == (600, False, 5, "device")
    assert (own.idle_ttl, own.pin, own.min_awake, own.keep) == (90, False, 5, "disk")
    assert (fixed.idle_ttl, fixed.pin) == (None, True), "an exception needs no second key"
    assert tireless.idle_ttl is None
    shown = resolved(profile)["models"]
    assert isinstance(shown, list) and shown[0]["sleep"]["min_awake"] == 5.0


def test_a_pinned_box_lets_one_model_sleep_if_it_says_so() -> None:
    text = "models: [{name: a}, {name: b, sleep: {pin: false, idle_ttl: 5m}}]\nsleep: {pin: true}"
    profile = load_text(text, "p.yaml", {})
    assert [profile.sleep_of(model).pin for model in profile.served] == [True, False]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: a\nsleep:\n  pin: true\n  idle_ttl: 5m", "p.yaml:4:13: a pinned model never sleeps by itself; take out idle_ttl or pin"),
        ("model:\n  name: a\n  sleep:\n    pin: true\n    idle_ttl: 5m", "p.yaml:5:15: a pinned model never sleeps by itself; take out idle_ttl or pin"),
        ("model:\n  name: a\n  sleep:\n    idle_ttl: 5m\nsleep: {pin: true}", "p.yaml:4:15: the box's `sleep` pins every model; say pin: false beside this idle_ttl, or take it out"),
        ("model:\n  name: a\n  engine: mock\n  sleep: {keep: disk}", "p.yaml:4:17: the mock engine can't sleep: its workers are stopped, which leaves nothing to keep"),
        ("model: a\nsleep: {idle_ttl: 0s}", 'p.yaml:2:19: "idle_ttl" must be above 0, not 0.0'),
        ("model: a\nsleep: {idle_tl: 5m}", 'p.yaml:2:9: unknown key "idle_tl"; did you mean "idle_ttl"?'),
        ("model: a\nsleep: {after_idle: 5m}", 'p.yaml:2:9: unknown key "after_idle"; did you mean "idle_ttl"?'),
        ("model: {name: a, sleep: {weights_to: host}}", 'p.yaml:1:26: unknown key "weights_to"; did you mean "keep"?'),
        ("model: a\nsleep: {keep: hots}", 'p.yaml:2:15: "keep" can\'t be "hots"; did you mean "host"?'),
        ("model: a\nfrontend: {max_waking: 0}", 'p.yaml:2:24: "max_waking" must be at least 1, not 0'),
        ("model: a\nfrontend: {wake_timeout: 0}", 'p.yaml:2:26: "wake_timeout" must be above 0, not 0.0'),
    ],
)  # fmt: skip
def test_impossible_sleep_is_refused_at_its_line(text: str, problem: str) -> None:
    assert refused(text) == [problem]
