"""What is written is what llama.cpp's own conversion scripts write, tensor by tensor and key by key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import AutoConfig

from finetune.export.gguf_lora import write_lora
from finetune.export.gguf_model import load_model_config, write_model
from tests.export.test_gguf import LLAMA3_ROPE, WRITTEN, models, write_adapter

pytestmark = [pytest.mark.loaders, pytest.mark.timeout(600), pytest.mark.xdist_group("converter")]
__all__ = ["models"]  # a fixture

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
# Titles that the converter makes from the folder's name.
COSMETIC = (
    "GGUF.",
    "tokenizer.ggml.pre",  # forced, see DRIVER
    *(f"general.{key}" for key in ("name", "basename", "size_label", "finetune", "version", "base_model", "tags")),
)
# The converter leaves these to llama.cpp's defaults, or to guesses.
OWN = (
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "falcon.rope.freq_base",
)
# For every line of JSON, a script's arguments, forks a process that runs it: importing takes a hundred times longer.
# The scripts name a split by a hash over real models' tokens, which a tiny tokenizer cannot match.
DRIVER = """
import gc, json, os, runpy, sys
scripts, log = sys.argv[1:]
sys.path.insert(0, scripts)
import transformers.modeling_utils
from conversion import load_all_models
from conversion.base import TextModel
load_all_models()
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
gc.collect()
gc.freeze()
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
os.dup2(1, 2)
sys.argv = json.loads(line)
runpy.run_path(f"{scripts}/{sys.argv[0]}", run_name="__main__")
"""
Convert = Callable[..., None]


@pytest.fixture(scope="module")
def convert(llama_cpp_scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Convert]:
    """Runs one of llama.cpp's scripts: `convert(script, *arguments)`."""
    log, pipe = tmp_path_factory.mktemp("converter") / "log", subprocess.PIPE
    command = [sys.executable, "-c", DRIVER, str(llama_cpp_scripts), str(log)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def run(script: str, *arguments: str | Path) -> None:
            print(json.dumps([script, *map(str, arguments)]), file=requests, flush=True)
            assert answers.readline() == "0\n", log.read_text()

        yield run


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Keys, and tensors as (type, shape, bytes)."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(COSMETIC)}
    return fields, {t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


def assert_same(ours: Path, theirs: Path) -> None:
    our_keys, our_tensors = contents(ours)
    their_keys, their_tensors = contents(theirs)
    assert our_tensors.keys() == their_tensors.keys()
    assert [name for name in our_tensors if our_tensors[name] != their_tensors[name]] == []
    assert {name: our_keys.get(name) for name in their_keys} == their_keys
    assert [name for name in our_keys if name not in their_keys and name not in OWN] == []


def variant(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model with another configuration."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(values))
    return target


def readable(folder: Path, target: Path) -> Path:
    """The model as the converter reads it right: it takes `num_kv_heads` of a Falcon of any kind at its word."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return variant(folder, target, num_kv_heads=1)
    return folder


@pytest.mark.parametrize(
    ("name", "type_name"), [*((name, "f16") for name in WRITTEN), *(("llama", other) for other in ("bf16", "q8_0"))]
)
def test_models(models: dict[str, Path], convert: Convert, name: str, type_name: str, tmp_path: Path) -> None:
    write_model(models[name], tmp_path / "ours.gguf", type_name, "tiny")
    theirs = readable(models[name], tmp_path / "copy")
    options = ("--outfile", tmp_path / "theirs.gguf", "--outtype", type_name)
    convert("convert_hf_to_gguf.py", theirs, *options)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, YARN, LINEAR], ids=["llama3", "yarn", "linear"])
def test_rope_scaling(models: dict[str, Path], convert: Convert, rope: dict[str, Any], tmp_path: Path) -> None:
    folder = variant(models["llama"], tmp_path / "model", rope_parameters=rope, max_position_embeddings=4096)
    write_model(folder, tmp_path / "ours.gguf", "f16", "tiny")
    options = ("--outfile", tmp_path / "theirs.gguf", "--outtype", "f16")
    convert("convert_hf_to_gguf.py", folder, *options)
    factors = [
        {t.name: t.data for t in GGUFReader(tmp_path / name).tensors}.get("rope_freqs.weight")
        for name in ("ours.gguf", "theirs.gguf")
    ]
    if factors[0] is not None:
        # Computed in float64 here and in float32 there.
        np.testing.assert_allclose(*factors, rtol=1e-6)
        return
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "falcon", "new_falcon"])
def test_adapters(models: dict[str, Path], convert: Convert, name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", models[name])
    write_lora(tmp_path / "adapter", load_model_config(models[name]), tmp_path / "ours.gguf", "f32", "tiny")
    base = readable(models[name], tmp_path / "copy")
    options = ("--base", base, "--outfile", tmp_path / "theirs.gguf", "--outtype", "f32")
    convert("convert_lora_to_gguf.py", *options, tmp_path / "adapter")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
