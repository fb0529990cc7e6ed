"""What the engine refuses to start with, and how it says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiny_model import make_tiny_llama
from native_harness import RunningEngine, worker_spec
from safetensors.torch import load_file, save_file

from engines.contract import EngineError


def start_error(path: Path, **spec: Any) -> EngineError:
    async def scenario() -> EngineError:
        with pytest.raises(EngineError) as raised:
            await RunningEngine(worker_spec(path, **spec)).__aenter__()
        return raised.value

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"vocab_size": 300}, "embed_tokens"),
    ],
)
def test_an_unsupported_model_is_named(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    path = make_tiny_llama(tmp_path / "model")
    original = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**original, **config}))
    error = start_error(path)
    assert error.permanent
    assert named in error.cause


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    assert "config.json" in start_error(tmp_path).cause
    path = make_tiny_llama(tmp_path / "model")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[:-8], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(damage)
        error = start_error(path)
        assert error.permanent
        assert "model.safetensors" in error.cause
    weights.unlink()
    assert "model.safetensors" in start_error(path).cause


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"options": {"dtyp": "float32"}}, "dtyp"),
        ({"options": {"dtype": "int3"}}, "int3"),
        ({"options": {"max_batch_tokens": 8}, "max_batch": 9}, "max_batch_tokens"),
        ({"kv_bytes": 100}, "no block"),
        ({"device": "GPU-1"}, "GPU-1"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(tiny_model: Path, spec: dict[str, Any], named: str) -> None:
    error = start_error(tiny_model, **spec)
    assert error.permanent
    assert named in error.cause


def test_shards_with_an_index_are_the_same_model(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model")
    prompt = [[40, 41, 42]]

    async def generate(**spec: Any) -> list[int]:
        async with RunningEngine(worker_spec(path, **spec)) as engine:
            return (await engine.generate_all(prompt, max_tokens=20, ignore_eos=True))[0].tokens

    whole = asyncio.run(generate())
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    places = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, path / shard)
        places.update(dict.fromkeys(part, shard))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (path / "model.safetensors").unlink()
    assert asyncio.run(generate()) == whole


@pytest.mark.parametrize(
    ("kept", "wanted", "computed"),
    [
        ("float64", None, "float64"),
        ("float32", None, "float32"),
        ("float32", "float64", "float64"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_dtype_is_the_models_or_the_options(tmp_path: Path, kept: Any, wanted: str | None, computed: str) -> None:
    path = make_tiny_llama(tmp_path / "model", dtype=kept)

    async def scenario() -> None:
        async with RunningEngine(worker_spec(path, options={"dtype": wanted} if wanted else {})) as engine:
            assert engine.info.kv_dtype == computed
            answer = await engine.generate([40, 41, 42], max_tokens=5, ignore_eos=True)
            assert len(answer.tokens) == 5
            size = getattr(torch, computed).itemsize
            assert engine.engine.figures().weights_bytes == 13904 * size

    asyncio.run(scenario())
