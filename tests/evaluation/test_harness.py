"""Tasks of the lm-eval package, the real one: its figures are those that the models' own forward passes give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cli import main
from finetune.inference.load import load_run
from finetune.inference.mode import base_of, inference_mode
from tests.tiny import WORDS, chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe

pytest.importorskip("lm_eval", reason="the lm-eval package is not installed: pip install 'lm-eval>=0.4'")

QUESTIONS = [
    {"question": f"tell {first} and {second}", "choices": [third, first], "answer": index % 2, "last": third}
    for index, (first, second, third) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))
][:12]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{last}}"
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks over local rows."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(rows)))
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    def run(**sections: Any) -> Path:
        recipe = tiny_recipe(
            tmp_path,
            write_model(tmp_path / "base", "tied_llama"),
            write_jsonl(tmp_path / "rows.jsonl", chat_rows(32)),
            training={"max_steps": 8, "optimizer": {"lr": 3e-2}},
            **sections,
        )
        assert main(["run", str(write_recipe(tmp_path / "recipe.json", recipe))]) == 0
        return tmp_path / "runs" / "tiny"

    return run


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any) -> float:
    """Share of questions whose choice of the larger log-likelihood is the answer."""
    hits = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["question"], add_special_tokens=False).input_ids
            ids = tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scores.append(sum(log_probs[at - 1, ids[at]].item() for at in range(len(context), len(ids))))
        hits += scores.index(max(scores)) == row["answer"]
    return hits / len(QUESTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [{}, {"model": {"quantization": "nf4", "compute_dtype": "fp32"}}, {"adapter": {"modules_to_save": ["lm_head"]}}],
    ids=["plain", "nf4", "untied head"],
)
def test_figures_of_a_local_task(
    train: Callable[..., Path], tasks: Path, sections: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {name: {**values, **({"name": str(tasks.parent / "base")} if name == "model" else {})}
                for name, values in sections.items()}  # fmt: skip
    run = train(**sections)
    assert main(["merge", str(run)]) == 0
    options = ["--lm-eval", "tiny_choice,tiny_write", "--lm-eval-tasks", str(tasks)]
    assert main(["evaluate", str(run), *options]) == 0
    assert "tiny_choice acc" in capsys.readouterr().out
    record = json.loads((run / "results.json").read_text())["evaluations"][-1]
    assert record["lm_eval_tasks"] == ["tiny_choice", "tiny_write"]
    for name, base_only in (("base", True), ("adapter", False)):
        loaded = load_run(run, base_only=base_only)
        with inference_mode(loaded.model):
            want = accuracy(base_of(loaded.model), loaded.tokenizer)
        assert record["metrics"][name]["tiny_choice acc"] == pytest.approx(want)
        assert 0 <= record["metrics"][name]["tiny_write exact_match"] <= 1
    assert record["metrics"]["merged"] == record["metrics"]["adapter"]
    assert main(["evaluate", str(run), *options, "--rows", "3"]) == 0
    few = json.loads((run / "results.json").read_text())["evaluations"][-1]["metrics"]["adapter"]["tiny_choice acc"]
    assert few * 3 == pytest.approx(round(few * 3))


@pytest.mark.slow
def test_an_unknown_task_is_an_error(
    train: Callable[..., Path], tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train()
    assert main(["evaluate", str(run), "--lm-eval", "no_such_task"]) == 1
    err = capsys.readouterr().err
    assert "error: --lm-eval no_such_task: lm-eval failed" in err and "Traceback" not in err
    assert main(["evaluate", str(run), "--lm-eval", "x", "--lm-eval-tasks", str(tasks / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err
