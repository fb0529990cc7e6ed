"""What the store takes for a model, and what it says of everything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_box.errors import BoxError, UsageError
from dynamo_box.profile.pull import pull
from dynamo_box.profile.store import MANIFEST, BrokenModel, ModelStore, StoredModel


def ignore(_phase: str, _done: int, _total: int | None, _unit: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def stored(store: ModelStore, tiny_model: Path) -> StoredModel:
    return pull(str(tiny_model), store, name="tiny", progress=ignore)


def broken_reason(store: ModelStore) -> str:
    (entry,) = store.list()
    assert isinstance(entry, BrokenModel)
    assert store.find(entry.name) is None
    return entry.reason


def test_a_store_that_does_not_exist_yet_is_empty(store: ModelStore) -> None:
    assert store.list() == ()
    assert store.find("tiny") is None


def test_a_model_is_found_with_its_facts(store: ModelStore, stored: StoredModel) -> None:
    found = store.find("tiny")
    assert found == stored
    assert store.list() == (stored,)
    assert found.facts.layers == 2
    assert found.facts.path == str(store.path_of("tiny"))
    assert found.facts.fingerprint == found.fingerprint
    assert found.bytes == sum(path.stat().st_size for path in found.path.iterdir() if path.name != MANIFEST)


def test_a_moved_store_still_holds_its_models(store: ModelStore, stored: StoredModel, tmp_path: Path) -> None:
    elsewhere = ModelStore(store.root.rename(tmp_path / "elsewhere"))
    found = elsewhere.find("tiny")
    assert found is not None
    assert found.fingerprint == stored.fingerprint
    assert found.facts.path == str(tmp_path / "elsewhere" / "tiny")


def test_the_fingerprint_changes_with_any_byte(store: ModelStore, stored: StoredModel, tiny_model: Path) -> None:
    again = pull(str(tiny_model), store, name="again", progress=ignore)
    assert again.fingerprint == stored.fingerprint
    changed = store.root.parent / "changed"
    changed.mkdir()
    for path in tiny_model.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 3e-5}))
    assert pull(str(changed), store, progress=ignore).fingerprint != stored.fingerprint


def test_a_directory_without_a_manifest_is_no_model(store: ModelStore) -> None:
    (store.root / "half").mkdir(parents=True)
    assert "dynbox.json" in broken_reason(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}', "\xff\xfe", "null"])
def test_a_damaged_manifest_is_told_not_raised(store: ModelStore, stored: StoredModel, text: str) -> None:
    (stored.path / MANIFEST).write_bytes(text.encode("latin-1"))
    assert MANIFEST in broken_reason(store)


def test_a_manifest_of_a_later_format_is_told(store: ModelStore, stored: StoredModel) -> None:
    manifest = json.loads((stored.path / MANIFEST).read_text())
    (stored.path / MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    assert "format 2" in broken_reason(store)


def test_a_missing_or_shortened_file_is_told(store: ModelStore, stored: StoredModel) -> None:
    weights = stored.path / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # a hard link: the original must stay as it is
    weights.write_bytes(content[:-1])
    assert "model.safetensors has" in broken_reason(store)
    weights.unlink()
    assert "model.safetensors: No such file" in broken_reason(store)


def test_a_manifest_can_not_name_files_outside_its_model(store: ModelStore, stored: StoredModel) -> None:
    manifest = json.loads((stored.path / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../../secret"
    (stored.path / MANIFEST).write_text(json.dumps(manifest))
    assert "outside" in broken_reason(store)


def test_a_pull_repairs_a_broken_model(store: ModelStore, stored: StoredModel, tiny_model: Path) -> None:
    (stored.path / MANIFEST).unlink()
    again = pull(str(tiny_model), store, name="tiny", progress=ignore)
    assert store.list() == (again,)
    assert again.fingerprint == stored.fingerprint


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-dash", "a b", "a@b", "x" * 97, "ü", "a\n"])
def test_names_that_no_model_can_have(store: ModelStore, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        store.find(name)
    with pytest.raises(UsageError):
        store.remove(name)


def test_remove_takes_a_model_out_and_leaves_only_its_lock(store: ModelStore, stored: StoredModel) -> None:
    assert store.remove("tiny") >= stored.bytes
    assert store.list() == ()
    assert [path.name for path in store.root.iterdir()] == [".lock-tiny"]
    with pytest.raises(BoxError, match="no model 'tiny'"):
        store.remove("tiny")


def test_names_of_the_stores_own_are_not_models(store: ModelStore, stored: StoredModel) -> None:
    (store.root / ".partial-other@1").mkdir()
    (store.root / "a file").write_text("")
    assert store.list() == (stored,)


def test_reading_the_store_imports_nothing_heavy() -> None:
    program = "import sys, dynamo_box.profile.store; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    assert not {"torch", "numpy", "gguf", "pydantic", "tokenizers", "huggingface_hub"} & set(output)
