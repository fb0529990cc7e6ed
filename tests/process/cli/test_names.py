"""Shell completion, and the verbs around profiles and the model store."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_box.paths import home, logs_dir, run_dir

Dynbox = Callable[..., subprocess.CompletedProcess[str]]
Complete = Callable[..., list[str]]


@pytest.fixture
def stored(dynbox: Dynbox, box_env: Any, tiny_model: Path) -> Path:
    """A store with one whole model and one broken."""
    path = Path(dynbox("pull", str(tiny_model), "--name", "tiny").stdout.strip())
    (box_env.home / "models" / "torn").mkdir()
    return path


def test_completion_offers_verbs_flags_and_names(
    supervisor: Any, stored: Path, complete: Complete, box_env: Any, tmp_path: Path
) -> None:
    assert complete("dynbox p") == ["ps", "pull", "profile"]
    assert "--dry-run" in complete("dynbox up --")
    assert complete("dynbox up --profile smol") == ["smollm2", "smollm2-disagg", "smollm2-duo"]
    assert complete("dynbox up --model t") == ["tiny", "torn"]
    assert complete("dynbox models rm ti") == ["tiny"]
    assert complete("dynbox chat ", of_box=True) == ["smollm2"]
    assert complete("dynbox restart r", of_box=True) == ["router"]
    assert complete("dynbox help exit") == ["exit-codes"]
    assert complete("dynbox completion ") == ["bash", "zsh", "fish"]

    logs = logs_dir(run_dir(), home())
    logs.mkdir(parents=True)
    (logs / "frontend.log").touch()
    assert complete("dynbox logs f") == ["frontend"]

    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more").mkdir()
    offered = complete(f"dynbox up --profile {tmp_path}/m")
    assert offered == [f"{tmp_path}/mine.yaml", f"{tmp_path}/more/"]


def test_completion_without_a_box_or_a_store_offers_nothing_and_says_nothing(complete: Complete) -> None:
    for line in ("dynbox chat ", "dynbox restart r", "dynbox logs f", "dynbox models rm t", "dynbox up -p /nowhere/x"):
        assert complete(line) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_for_this_program(dynbox: Dynbox, shell: str) -> None:
    script = dynbox("completion", shell).stdout
    assert "dynbox" in script
    assert "_DYNBOX_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=90)


def test_the_store_is_listed_and_emptied(stored: Path, dynbox: Dynbox) -> None:
    table = dynbox("models").stdout
    assert "tiny" in table
    assert "broken" in table
    whole, torn = json.loads(dynbox("models", "--json").stdout)
    assert (whole["name"], whole["state"], whole["path"]) == ("tiny", "ready", str(stored))
    assert whole["facts"]["architecture"] == "llama"
    assert (torn["name"], torn["state"]) == ("torn", "broken")
    assert json.loads(dynbox("models", "rm", "tiny", "--json").stdout)["freed_bytes"] >= whole["bytes"]
    assert not stored.exists()
    assert "did you mean torn" in dynbox("models", "rm", "tron", code=2).stderr


def test_a_model_that_is_being_served_stays(stored: Path, supervisor: Any, dynbox: Dynbox) -> None:
    import msgspec

    (model,) = supervisor.state.models
    served = msgspec.structs.replace(model, path=str(stored))
    supervisor.state = msgspec.structs.replace(supervisor.state, models=(served,))
    assert "serves tiny" in dynbox("models", "rm", "tiny", code=1).stderr
    assert stored.exists()


def test_pull_tells_progress_as_json_lines(box_env: Any, dynbox: Dynbox, tiny_model: Path) -> None:
    *progress, last = map(json.loads, dynbox("pull", str(tiny_model), "--json").stdout.splitlines())
    assert {line["event"] for line in progress} == {"progress"}
    assert last["event"] == "pulled"
    assert last["name"] == "tiny"
    assert "there is no" in dynbox("pull", "./nothing.gguf", code=2).stderr


def test_profiles_are_listed_shown_and_checked(dynbox: Dynbox, box_env: Any, tmp_path: Path) -> None:
    names = [each["name"] for each in json.loads(dynbox("profile", "list", "--json").stdout)]
    assert {"smollm2", "smollm2-duo", "mock-8gpu", "llama70b-disagg"} <= set(names)
    assert "model:" in dynbox("profile", "show", "smollm2").stdout
    assert json.loads(dynbox("profile", "show", "smollm2", "--json").stdout)["frontend"]["port"] == 8000
    assert "$schema" in json.loads(dynbox("profile", "schema").stdout)

    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("modle: smollm2\nfrontend:\n  port: high\n")
    done = dynbox("profile", "validate", str(wrong), "smollm2", code=2)
    assert "wrong.yaml:1:1" in done.stderr
    assert "wrong.yaml:3" in done.stderr
    assert done.stdout == "smollm2: valid\n"
    first, second, third = json.loads(
        dynbox("profile", "validate", str(wrong), "smollm2", "llama70b-disagg", "--json", code=2).stdout
    )
    assert (first["valid"], first["fits"]) == (False, False)
    assert (second["valid"], second["fits"]) == (True, True)
    assert (third["valid"], third["fits"]) == (True, False)


def test_a_new_profile_is_valid_and_never_overwrites(stored: Path, dynbox: Dynbox, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "mine.yaml"
    dynbox("profile", "new", "tiny", "-o", str(path))
    assert dynbox("profile", "validate", str(path)).stdout == f"{path}: valid\n"
    before = path.read_text()
    assert before.rstrip() == dynbox("profile", "new", "tiny").stdout.rstrip()
    assert "--force" in dynbox("profile", "new", "tiny", "-o", str(path), code=2).stderr
    dynbox("profile", "new", "tiny", "-o", str(path), "--name", "other", "--force")
    assert path.read_text() != before
