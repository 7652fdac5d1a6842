from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.errors import ModelError, RecipeError
from finetune.inference.load import find_run, load_run
from finetune.recipe.load import load_recipe
from tests.inference.conftest import build_llama
from tests.tiny import WORDS, tiny_recipe, write_jsonl, write_model, write_recipe

IDS = torch.tensor([[256, *range(30)]])
MakeRun = Callable[..., tuple[Path, Any]]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_final_adapter_is_loaded_whole(make_run: MakeRun) -> None:
    run, trained = make_run("checkpoints/step-000009", "adapter")
    loaded = load_run(run)
    assert loaded.adapter_path == run / "adapter"
    assert loaded.recipe.name == "tiny"
    assert loaded.template.stop_token_ids == (257,)
    torch.testing.assert_close(logits(loaded.model), logits(trained))
    assert not torch.allclose(logits(loaded.model), logits(build_llama()), atol=0.1)


def test_a_base_that_is_loaded_from_its_converted_copy_is_no_warning(make_run: MakeRun, recwarn: Any) -> None:
    """What PEFT compares is the name in the adapter's file and the path that was loaded."""
    run, _ = make_run("adapter")
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "org/base"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    load_run(run)
    assert not [warning for warning in recwarn if "base_model_name_or_path" in str(warning.message)]


def test_without_it_the_newest_whole_checkpoint_is(make_run: MakeRun) -> None:
    run, trained = make_run("checkpoints/step-000020", "checkpoints/step-1000000")
    half = run / "checkpoints" / "step-2000000"
    shutil.copytree(run / "checkpoints" / "step-000020", half)
    (half / "manifest.json").unlink()
    loaded = load_run(run)
    assert loaded.adapter_path == run / "checkpoints" / "step-1000000"
    torch.testing.assert_close(logits(loaded.model), logits(trained))


def test_a_damaged_checkpoint_is_passed_over_and_named(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run("checkpoints/step-000010", "checkpoints/step-000020")
    weights = run / "checkpoints" / "step-000020" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_run(run)[1] == run / "checkpoints" / "step-000010"
    assert "step-000020 is damaged and passed over: adapter_model.safetensors" in capsys.readouterr().err


def test_an_adapter_that_lacks_a_file_is_passed_over_and_named(make_run: MakeRun, capsys: Any) -> None:
    run, _ = make_run("checkpoints/step-000010", "adapter")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert find_run(run)[1] == run / "checkpoints" / "step-000010"
    said = capsys.readouterr().err
    assert f"{run / 'adapter'} lacks adapter_config.json or adapter_model.safetensors, and is passed over for" in said


def test_a_folder_that_holds_adapter_and_recipe_will_do(make_run: MakeRun, tmp_path: Path) -> None:
    run, trained = make_run("checkpoints/step-000001", "adapter")
    alone = tmp_path / "elsewhere"
    shutil.move(run / "adapter", alone)
    torch.testing.assert_close(logits(load_run(alone).model), logits(trained))
    checkpoint = run / "checkpoints" / "step-000001"
    assert load_run(checkpoint).adapter_path == checkpoint


def test_the_bare_base_needs_no_adapter(make_run: MakeRun) -> None:
    run, _ = make_run()
    loaded = load_run(run, base_only=True)
    assert loaded.adapter_path is None
    torch.testing.assert_close(logits(loaded.model), logits(build_llama()))


def test_the_bare_base_has_rows_for_the_adapters_own_tokens(make_run: MakeRun) -> None:
    """What a prompt may hold, and as many scores as the adapter gives: a merge compares the two."""
    tokens = [f"<own-{number}>" for number in range(500)]
    run, _ = make_run("adapter", adapter={"rank": 4, "trainable_tokens": tokens})
    loaded = load_run(run, base_only=True)
    ids = torch.tensor([loaded.tokenizer.encode(tokens[-1])])
    assert loaded.model(input_ids=ids).logits.shape == load_run(run).model(input_ids=ids).logits.shape


def test_the_saved_template_outlives_its_file(make_run: MakeRun, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(tokenizer.chat_template.replace("assistant", "bot"))
    source = {"path": str(tmp_path / "train.jsonl")}
    run, _ = make_run("adapter", data={"sources": [source], "template": str(file)})
    want = file.read_text()
    file.unlink()
    assert load_run(run).template.source == want
    assert load_run(run, base_only=True).template.source == want


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such directory"),
        (lambda run: shutil.rmtree(run / "adapter"), "no adapter and no whole checkpoint"),
        (lambda run: (run / "recipe.yaml").unlink(), "no recipe.yaml"),
    ],
)
def test_what_is_missing_is_named(make_run: MakeRun, spoil: Callable[[Path], Any], message: str) -> None:
    run, _ = make_run("adapter")
    spoil(run)
    with pytest.raises(ModelError, match=message) as caught:
        load_run(run)
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_that_is_gone_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "base"
    run, _ = make_run("adapter", model={"name": str(gone)})
    with pytest.raises(ModelError, match=str(gone)):
        load_run(run)


def test_a_run_of_what_is_refused_since_is_loaded(make_run: MakeRun) -> None:
    run, trained = make_run(
        "adapter",
        training={"epochs": 1.0, "precision": "32-true", "optimizer": {"name": "lion", "eps": 1e-6}},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 8},
    )
    with pytest.raises(RecipeError, match=r"(?s)eps.*metrics"):
        load_recipe(run / "recipe.yaml")
    torch.testing.assert_close(logits(load_run(run).model), logits(trained))


def test_a_damaged_recipe_is_refused(make_run: MakeRun) -> None:
    run, _ = make_run("adapter")
    (run / "recipe.yaml").write_text("nmae: tiny\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1"):
        load_run(run)


def test_fm07_an_adapter_with_a_renamed_tensor_is_refused(make_run: MakeRun) -> None:
    run, _ = make_run("adapter")
    path = run / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file({key.replace(name, name + "_old"): tensor for key, tensor in state.items()}, path)
    with pytest.raises(ModelError, match="1 tensors missing"):
        load_run(run)


FRESH = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base)
model.resize_token_embeddings(len(tokenizer))
ids = torch.tensor([tokenizer("<one> the <three> fox <two>").input_ids])
with torch.no_grad():
    one = PeftModel.from_pretrained(model, adapter).eval()(ids).logits
    two = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(ids).logits
torch.save([ids, one, two], out)
"""


@pytest.mark.slow
def test_fm27_added_tokens_in_a_fresh_process(tmp_path: Path) -> None:
    """Three tokens are added and trained; PEFT's two loaders give the logits of the run's own loader elsewhere."""
    base = write_model(tmp_path / "base", "tied_llama")
    rows = [{"prompt": f"<one> {word}", "completion": f"<two> {word} <three>"} for word in WORDS[:16]]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tiny_recipe(tmp_path, base, data, adapter={"trainable_tokens": ["<one>", "<two>", "<three>"]})
    assert main(["run", str(write_recipe(tmp_path / "recipe.json", recipe))]) == 0
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(base), str(adapter), str(tmp_path / "logits.pt")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids, one, two = torch.load(tmp_path / "logits.pt")
    assert {320, 321, 322} <= set(ids[0].tolist())
    loaded: Any = load_run(adapter)
    assert loaded.model.get_input_embeddings().weight.shape[0] == 323  # rows are added, and never removed
    with torch.no_grad():
        want = loaded.model.eval()(input_ids=ids).logits
    assert torch.equal(one, want) and torch.equal(two, want)
