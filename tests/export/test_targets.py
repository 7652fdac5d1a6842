"""`finetune export` on a run's directory: every row of the table, and what is said where it cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune.cli import main
from finetune.export.targets import TARGETS
from finetune.files import sha256_file
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Recipe
from tests.export.test_gguf import write_adapter
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl
from tests.tiny import write_model as write_tiny


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with an adapter and a merged model."""
    folder = tmp_path_factory.mktemp("trained")
    base = write_tiny(folder / "base", "llama")
    data = write_jsonl(folder / "rows.jsonl", alpaca_rows(2))
    run = folder / "runs" / "tiny"
    (run / "adapter").mkdir(parents=True)
    write_adapter(run / "adapter", base)
    recipe = Recipe.model_validate(tiny_recipe(folder, base, data))
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    shutil.copytree(base, run / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    model.merge_and_unload().save_pretrained(run / "merged")
    record(run)
    return run


def record(run: Path, **changes: Any) -> None:
    values = {"usable": True, "fault": None, "adapter_sha256": sha256_file(run / "adapter/adapter_model.safetensors")}
    (run / "merged" / "merge.json").write_text(json.dumps(values | changes))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "tiny")


def test_the_table_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    out = capsys.readouterr().out
    for name, target in TARGETS.items():
        assert f"{name:10}{target.loads_into}\n" in out and f"verified: {target.verified}\n" in out
    assert "needs the merged model; --type f16, bf16, q8_0\n" in out


def test_gguf(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "gguf", "--type", "q8_0"]) == 0
    path = run / "export" / "tiny-q8_0.gguf"
    assert capsys.readouterr().out == f"wrote     {path}\nstart     llama-server --jinja -m {path}\n"
    assert {t.tensor_type.name for t in GGUFReader(path).tensors} == {"Q8_0", "F32"}


def test_gguf_lora(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "gguf-lora", "--out", str(tmp_path / "x.gguf")]) == 0
    assert f"--lora {tmp_path}/x.gguf" in capsys.readouterr().out
    assert GGUFReader(tmp_path / "x.gguf").fields["adapter.type"].contents() == "lora"


@pytest.mark.parametrize("target", ["gguf", "gguf-lora", "ollama"])
def test_only_an_earlier_export_is_replaced(
    target: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, before = (
        run / "adapter" / "adapter_model.safetensors",
        sha256_file(run / "adapter/adapter_model.safetensors"),
    )
    out = tmp_path / "x"
    command = ["export", str(run), "--to", target, "--out"]
    assert [main([*command, str(out)]) for _ in range(2)] == [0, 0]
    if target == "ollama":
        (out / "Modelfile").write_text("FROM mine\n")
        assert main([*command, str(out)]) == 2
        assert f"{out}/Modelfile: exists, and is no earlier output" in capsys.readouterr().err
        return
    other = {"gguf": "gguf-lora", "gguf-lora": "gguf"}[target]
    base = tmp_path / "base.gguf"
    assert main(["export", str(run), "--to", other, "--out", str(base)]) == 0
    for path in (adapter, base):
        assert main([*command, str(path)]) == 2
        assert f"--out {path}: exists, and is no earlier output of this command" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == 2 and "is a directory; name a file" in capsys.readouterr().err
    assert sha256_file(adapter) == before


def test_ollama(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "ollama"]) == 0
    folder = run / "export" / "tiny-ollama"
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"]
    text = (folder / "Modelfile").read_text()
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>" in text and 'PARAMETER stop "<|im_end|>"' in text
    assert f"ollama create tiny -f {folder}/Modelfile && ollama run tiny" in capsys.readouterr().out


def test_ollama_gets_the_date_of_the_run(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["data.date=2024-07-26"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    template = run / "merged" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    assert main(["export", str(run), "--to", "ollama"]) == 0
    assert "26 Jul 2024" in (run / "export" / "tiny-ollama" / "Modelfile").read_text()


def test_servers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "--enable-lora --lora-modules tiny=" in out and out.endswith("--max-lora-rank 8\n")
    assert main(["export", str(run), "--to", "tgi"]) == 0
    assert "text-generation-launcher --model-id" in capsys.readouterr().out
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    assert main(["export", str(run), "--to", "vllm"]) == 2
    assert f"finetune merge {run}" in capsys.readouterr().err


def test_a_merged_directory_exports_without_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run / "merged"), "--to", "gguf"]) == 0
    assert (run / "export" / "merged-f16.gguf").is_file()
    assert main(["export", str(run / "merged"), "--to", "vllm"]) == 2
    assert "is a whole model, and --to vllm takes an adapter" in capsys.readouterr().err


def test_an_adapters_directory_finds_its_merged_model(run: Path) -> None:
    shutil.copy(run / "recipe.yaml", run / "adapter" / "recipe.yaml")
    assert main(["export", str(run / "adapter"), "--to", "gguf"]) == 0
    assert (run / "export" / "tiny-f16.gguf").is_file()
    # An adapter without its run: both stand beside it.
    alone = run.parent / "alone"
    shutil.copytree(run / "adapter", alone / "mine")
    shutil.copytree(run / "merged", alone / "mine-merged")
    assert main(["export", str(alone / "mine"), "--to", "gguf"]) == 0
    assert (alone / "export" / "tiny-f16.gguf").is_file()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--to", "onyx"), "--to onyx: there is no such target; accepted are gguf, gguf-lora, ollama, vllm, tgi"),
        ((), "name a run and a target"),
        (("--to", "gguf", "--type", "q4_k"), "--type q4_k: not for --to gguf; accepted are f16, bf16, q8_0"),
        (("--to", "vllm", "--type", "f16"), "it writes no weights, so leave --type out"),
        (("--to", "vllm", "--out", "x"), "writes nothing, it checks; leave --out out"),
    ],
)
def test_mistakes_exit_2(run: Path, options: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), *options]) == 2
    assert part in capsys.readouterr().err


def test_without_a_merged_model_the_command_that_makes_it_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "merged")
    assert main(["export", str(run), "--to", "gguf"]) == 2
    assert f"has not been merged yet, and --to gguf needs it; run: finetune merge {run}" in capsys.readouterr().err


def test_a_model_that_failed_its_check_is_not_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, usable=False, fault="KL 3.1 is over 0.1")
    assert main(["export", str(run), "--to", "gguf"]) == 2
    assert "failed its check when it was merged (KL 3.1 is over 0.1); merge it again" in capsys.readouterr().err


def test_a_model_merged_from_an_older_adapter_is_pointed_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(run, adapter_sha256="0" * 64)
    assert main(["export", str(run), "--to", "gguf"]) == 0
    assert "was merged from another adapter than" in capsys.readouterr().err


def test_a_path_that_cannot_be_written_is_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", str(run), "--to", "gguf", "--out", str(tmp_path / "file" / "x.gguf")]) == 1
    assert f"{tmp_path}/file/x.gguf: cannot be written: " in capsys.readouterr().err
