"""`finetune evaluate`: base, adapter and merged model in one table."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune.cli import main
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its merged model."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = write_model(folder / "base", "llama")
    recipe = tiny_recipe(
        folder,
        base,
        write_jsonl(folder / "train.jsonl", chat_rows(48)),
        data={"validation": {"size": 6}},
        training={"max_steps": 8, "optimizer": {"lr": 3e-2}},
        evaluation={"metrics": ["perplexity", "token_f1", "exact_match"], "before": True, "max_new_tokens": 4},
    )
    assert main(["run", str(write_recipe(folder / "recipe.json", recipe))]) == 0
    assert main(["merge", str(folder / "runs" / "tiny")]) == 0
    return folder / "runs" / "tiny"


def last(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "results.json").read_text())["evaluations"][-1]
    return record


def test_the_figures_are_those_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr()
    out = printed.out
    assert all(word in out for word in ("base", "adapter", "merged", "perplexity", "token_f1", "exact_match"))
    results = json.loads((run / "results.json").read_text())
    metrics = results["evaluations"][-1]["metrics"]
    assert metrics["base"] == pytest.approx(results["before"]["metrics"], rel=1e-4)
    assert metrics["adapter"] == pytest.approx(results["after"]["metrics"], rel=1e-4)
    assert metrics["merged"] == pytest.approx(metrics["adapter"], rel=1e-4)
    assert metrics["base"]["perplexity"] > 1.2 * metrics["adapter"]["perplexity"]
    assert results["evaluations"][-1]["num_rows"] == results["before"]["num_rows"] == 6
    cut = results["before"]["num_cut"]
    assert cut > 0  # a random model does not stop after four tokens
    assert f"base: {cut} of 6 completions were cut at evaluation.max_new_tokens: 4" in " ".join(printed.err.split())


def test_evaluations_are_appended(run: Path) -> None:
    before = json.loads((run / "results.json").read_text())
    assert main(["evaluate", str(run), "--rows", "2", "--merged", str(run / "merged")]) == 0
    after = json.loads((run / "results.json").read_text())
    assert len(after["evaluations"]) == len(before.get("evaluations", [])) + 1
    assert after["after"] == before["after"]
    assert last(run)["num_rows"] == 2 and last(run)["merged"] == str(run / "merged")


def test_figures_that_cannot_be_kept_are_printed_all_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A colleague's run, on a disk that is read-only here."""

    def refuse(path: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("finetune.commands.evaluate.write_atomic", refuse)
    assert main(["evaluate", str(run), "--rows", "1"]) == 0
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "not kept: cannot write" in " ".join(printed.err.split()) and "Permission denied" in printed.err


def test_a_merged_model_that_is_not_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--merged", str(tmp_path)]) == 2
    assert "finetune merge" in capsys.readouterr().err


def test_lm_eval_that_is_not_installed_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["evaluate", str(run), "--lm-eval", "arc_easy"]) == 2
    assert "pip install 'lm-eval>=0.4'" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--lm-eval", " , "]) == 2


def test_a_stand_in_for_lm_eval_gets_every_model(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    seen: list[tuple[float, Any]] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        parameters = sum(parameter.sum().item() for parameter in model.pretrained.parameters())
        seen.append((parameters, (type(model.pretrained).__name__, tasks, limit)))
        values = {"acc,none": 0.25 * len(seen), "acc_stderr,none": 0.1, "alias": tasks[0]}
        return {"results": {tasks[0]: values}}

    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    index = ModuleType("lm_eval.tasks")
    index.TaskManager = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", index)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    monkeypatch.setattr("finetune.evaluation.harness.importlib.util.find_spec", lambda name: name)
    assert main(["evaluate", str(run), "--lm-eval", "arc_easy", "--rows", "7"]) == 0
    assert [call for _, call in seen] == [("LlamaForCausalLM", ["arc_easy"], 7)] * 3
    assert "arc_easy acc" in capsys.readouterr().out
    assert {name: values["arc_easy acc"] for name, values in last(run)["metrics"].items()} == {
        "base": 0.25,
        "adapter": 0.5,
        "merged": 0.75,
    }


@pytest.mark.usefixtures("same_dtypes")
def test_modules_trained_whole_in_bf16_are_measured_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_NATIVE_KERNELS", "0")
    recipe = tiny_recipe(
        tmp_path,
        write_model(tmp_path / "base", "llama"),
        write_jsonl(tmp_path / "train.jsonl", chat_rows(12)),
        adapter={"modules_to_save": ["embed_tokens", "lm_head"]},
        data={"validation": {"size": 2}},
        training={"precision": "bf16-mixed", "max_steps": 2},
        evaluation={"metrics": ["perplexity", "token_f1"], "max_new_tokens": 4},
    )
    run = tmp_path / "runs" / "tiny"
    assert main(["run", str(write_recipe(tmp_path / "recipe.json", recipe))]) == 0
    assert main(["generate", str(run), "--prompt", "count the boats", "--max-new-tokens", "4"]) == 0
    assert main(["merge", str(run)]) == 0
    assert "is loaded whole for the check" not in capsys.readouterr().err
    assert main(["evaluate", str(run)]) == 0
    metrics = last(run)["metrics"]
    assert metrics["merged"]["perplexity"] == pytest.approx(metrics["adapter"]["perplexity"], rel=0.02)
