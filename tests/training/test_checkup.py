"""What `finetune check` finds in a recipe, a base without its weights, the data, and devices that may not be here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from finetune.console import say
from finetune.errors import ModelError
from finetune.export.gguf_model import write_model
from finetune.findings import Finding, run_checks
from finetune.machine import describe_machine
from finetune.models import gguf_source, sources
from finetune.recipe import preflight
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import ModelSection, Recipe
from finetune.training.checkup import CHECKS, Checkup
from tests.tiny import alpaca_rows, tiny_recipe, write_jsonl, write_recipe

ModelDir = Callable[[str], Path]

# A space before the answer belongs to the answer's first token, and stands alone where a prompt ends with it.
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LONG = {"over_length": "truncate", "max_over_length_share": 1.0}
# Topic, sections of the recipe, what the rows become -> level and a part of what is found.
FOUND: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, str]], dict[str, str]], str, str]] = {
    "no validation": ("validation", {}, dict, "warning", "no rows are held out"),
    "code of others": ("validation", {"model": {"trust_remote_code": True}}, dict, "warning", "runs Python code"),
    "no login": ("logins", {"hub": {"push": True, "repo_id": "a/b"}}, dict, "error", "but there is no login"),
    "offline": ("logins", {}, dict, "fact", "only what is in the local cache can be read"),
    "short context": ("model", {"data": {"max_seq_len": 4096}}, dict, "warning", "but the model was made for 2048"),
    "cut completions": (
        "data",
        {"data": {"validation": {"size": 4}}, "evaluation": {"num_samples": 1, "max_new_tokens": 2040}},
        dict,
        "warning",
        "is more than the model's context of 2048: completions end there",
    ),
    "low coverage": (
        "data",
        {"data": {"max_seq_len": 2048}},
        lambda row: {"instruction": "river " * 600 + row["instruction"], "output": "red"},
        "warning",
        "of its tokens are supervised; see data.train_on",
    ),
    "duplicates": (
        "data",
        {},
        lambda row: {"instruction": "a", "output": "b"},
        "warning",
        "23 rows repeat another one",
    ),
    "no end of turn": (
        "template",
        {"data": LONG},
        lambda row: {**row, "output": "river " * 300},
        "warning",
        "rows.jsonl:1: no end of turn is supervised",
    ),
    "not as served": (
        "template",
        {"data": {"template": "spaced.jinja", "train_on": "everything"}},
        dict,
        "warning",
        "rows.jsonl:1: the prompt in training is not the one that would be served",
    ),
    "int8 and DoRA": (
        "devices",
        {
            "model": {"quantization": "int8"},
            "adapter": {"use_dora": True},
            "distributed": {"accelerator": "auto"},
        },
        dict,
        "error",
        "does not compute on int8 weights on a CPU",
    ),
    "late checkpoint": ("steps", {"checkpoint": {"every_steps": 9}}, dict, "warning", "nothing is saved before"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_will_go_wrong_is_found(
    name: str, model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, sections, change, level, text = FOUND[name]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "spaced.jinja").write_text(SPACED)
    rows = write_jsonl(tmp_path / "rows.jsonl", [change(row) for row in alpaca_rows(24)])
    values = tiny_recipe(tmp_path, model_dir("llama"), rows, **sections)
    made = load_recipe(write_recipe(tmp_path / "tiny.yaml", values))
    subject: Any = Checkup(made) if topic in CHECKS else made
    found = list(run_checks({topic: {**preflight.CHECKS, **CHECKS}[topic]}, subject))
    assert any(one.level == level and text in one.text for one in found), found


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ([], True),
        (["name=other", "training.max_steps=9", "training.optimizer.lr=1.0"], True),
        (["adapter.rank=8"], False),
        (["training.precision=bf16-mixed"], False),
        (["data.max_seq_len=64"], False),
        (["data.packing=none"], False),
        (["model.quantization=nf4"], False),
    ],
)
def test_only_a_run_that_agrees_tells_the_speed(
    changed: list[str], known: bool, model_dir: ModelDir, rows: Path, tmp_path: Path
) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path)
    earlier = tmp_path / "runs" / "earlier"
    earlier.mkdir(parents=True)
    (earlier / "recipe.yaml").write_text(dump_recipe(load_recipe(tmp_path / "tiny.yaml", changed)))
    training = {"tokens_per_second": 123.0, "machine": describe_machine()}
    (earlier / "results.json").write_text(json.dumps({"training": training}))
    (found,) = run_checks({"time": CHECKS["time"]}, Checkup(made))
    assert ("123 tokens/s of an earlier run" in found.text) == known and ("unknown" in found.text) != known


def recipe(model: Path, rows: Path, folder: Path, **training: Any) -> Recipe:
    return load_recipe(write_recipe(folder / "tiny.yaml", tiny_recipe(folder, model, rows, training=training)))


def devices(checkup: Checkup) -> list[Finding]:
    return list(run_checks({"devices": CHECKS["devices"]}, checkup))


def test_halving_is_refused_where_auto_becomes_fsdp(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path, on_out_of_memory="halve")
    (found,) = devices(Checkup(made, gpu_bytes=1_000_000, devices=2))
    assert found.level == "error" and "halve does not go with fsdp" in found.text
    assert not devices(Checkup(made, gpu_bytes=10**12, devices=2))


def test_a_gpu_without_units_for_bf16_is_named(
    model_dir: ModelDir, rows: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path)
    monkeypatch.setattr("finetune.training.checkup.why_bf16_is_slow", lambda recipe, placement: "slow")
    (found,) = devices(Checkup(made))
    assert (found.level, found.text) == ("warning", "slow")
    assert not devices(Checkup(made, gpu_bytes=10**12))


def test_a_warm_up_that_outlasts_the_steps_is_an_error(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path, max_steps=None, epochs=1, schedule={"warmup_steps": 3})
    (found,) = run_checks({"steps": CHECKS["steps"]}, Checkup(made))
    assert found.level == "error"
    assert found.text.startswith("training.schedule.warmup_steps: 3 steps of warm-up do not end before the run does")


def test_habits_and_steps_tell_the_same_forward_passes(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    checkup = Checkup(recipe(model_dir("llama"), rows, tmp_path))
    steps = [finding.text for finding in CHECKS["steps"](checkup)]
    habits = [finding.text for finding in CHECKS["habits"](checkup)]
    # Padded, 8 samples by 2 would be 4.
    assert any("2.0 forward passes a step over all processes" in text for text in steps)
    assert any("gradient accumulation: yes; about 2.0 forward passes a step" in text for text in habits)
    assert not any("is eager" in text for text in habits)


def test_habits_know_what_auto_attention_is(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    checkup = Checkup(recipe(model_dir("gemma2"), rows, tmp_path))
    found = {finding.values["name"]: finding.text for finding in CHECKS["habits"](checkup)}
    assert "auto is eager here" in found["fused attention"]


def test_a_gguf_base_is_known_by_its_header(
    model_dir: ModelDir, rows: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    cache, gguf = tmp_path / "cache", tmp_path / "base.gguf"
    monkeypatch.setenv("FINETUNE_CACHE", str(cache))
    write_model(model_dir("tied_llama"), gguf, "q8_0", "tiny")
    path = str(write_recipe(tmp_path / "tiny.yaml", tiny_recipe(tmp_path, gguf, rows)))

    def check() -> list[Finding]:
        assert main(["check", path, "--json"]) == 0
        found = [Finding(**one) for one in json.loads(capsys.readouterr().out)["findings"]]
        for one in found:
            for of_the_cache in ("location", "ledger"):
                one.values.pop(of_the_cache, None)
        return [one for one in found if one.topic != "disk"]

    with monkeypatch.context() as unread:
        unread.setattr(gguf_source, "_write_converted", lambda *_: pytest.fail("the weights were read"))
        by_header = check()
        assert main(["preview", path]) == 0
        new = ["new", "--model", str(gguf), "--data", str(rows), "--hardware", "cpu", "--epochs", "1"]
        assert main([*new, "--output", str(tmp_path / "new.yaml")]) == 0
    assert not list((cache / "models").glob("*"))
    section = ModelSection(name=str(gguf))
    described, converted = (Path(find(section).location) for find in (sources.describe_model, sources.find_model))
    assert described != converted and sources.describe_model(section).location == str(converted)
    lacking = {file.name for file in converted.iterdir()} - {file.name for file in described.iterdir()}
    assert lacking == {"model.safetensors", "source.json"}
    assert all((converted / file.name).read_bytes() == file.read_bytes() for file in described.iterdir())
    with pytest.raises(ModelError, match="holds no weights"):
        sources.fingerprint(sources.ModelSource("base.gguf", str(described), None))
    capsys.readouterr()
    assert check() == by_header
    say("again")
    assert capsys.readouterr().err == "again\n", "--json is quiet for one call"


@pytest.mark.parametrize(("strategy", "settled"), [("auto", "single"), ("fsdp", "fsdp"), ("ddp", "ddp")])
def test_only_auto_becomes_single_on_one_gpu_that_is_not_here(
    model_dir: ModelDir, rows: Path, tmp_path: Path, strategy: str, settled: str
) -> None:
    distributed = {"strategy": strategy, "cpu_offload": strategy == "fsdp"}
    written = tiny_recipe(tmp_path, model_dir("llama"), rows, distributed=distributed | {"accelerator": "auto"})
    checkup = Checkup(load_recipe(write_recipe(tmp_path / "tiny.yaml", written)), gpu_bytes=24 * 10**9, devices=1)
    (found, *_) = run_checks({"memory": CHECKS["memory"]}, checkup)
    assert found.values["strategy"] == settled
    assert (found.values["parts"]["base"] == 0) == (strategy == "fsdp")  # on the host


def test_single_on_two_gpus_that_are_not_here_is_refused(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    written = tiny_recipe(tmp_path, model_dir("llama"), rows, distributed={"strategy": "single"})
    made = load_recipe(write_recipe(tmp_path / "tiny.yaml", written))
    (found,) = devices(Checkup(made, gpu_bytes=24 * 10**9, devices=2))
    assert found.level == "error" and "single, but 2 processes" in found.text


def test_layers_that_need_not_be_recomputed_are_named(model_dir: ModelDir, rows: Path, tmp_path: Path) -> None:
    made = recipe(model_dir("llama"), rows, tmp_path, gradient_checkpointing=True)
    found = list(run_checks({"memory": CHECKS["memory"]}, Checkup(made, gpu_bytes=10**12)))
    hint = "fewer than its 2 layers need to be computed again, which is faster: training.gradient_checkpointing=false"
    assert all(one.level == "fact" for one in found) and any(one.text.startswith(hint) for one in found)
