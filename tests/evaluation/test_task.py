from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.data.prepare import Row, prepare_data
from finetune.data.template import load_template
from finetune.errors import DataError
from finetune.evaluation import task
from finetune.evaluation.task import count_trained, evaluate_task, load_rows, prompt_text
from finetune.inference.generate import Completion, Sampling
from finetune.recipe.schema import DataSection, EvaluationSection, Recipe
from tests.inference.conftest import build_llama, build_tokenizer

ROWS = [Row([{"role": "user", "content": f"say {word}"}], word, "x:1") for word in ("one", "two", "three", "four")]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces generation by fixed answers; what it was called with."""
    seen: dict[str, Any] = {}

    def generate(model: Any, tokenizer: Any, prompts: Any, stops: Any, sampling: Any, **options: Any) -> Any:
        seen.update(prompts=prompts, stops=stops, sampling=sampling, **options)
        return [Completion([1, 2, 257], text, text != "five") for text in ("one", "2", "three", "five")[: len(prompts)]]

    monkeypatch.setattr(task, "generate", generate)
    return seen


def evaluate(rows: list[Row], **section: Any) -> task.TaskResult:
    tokenizer = build_tokenizer()
    template = load_template(tokenizer, DataSection.model_validate({"sources": [{"path": "x.jsonl"}]}))
    return evaluate_task(None, tokenizer, template, rows, EvaluationSection.model_validate(section))  # type: ignore[arg-type]


def test_metrics_samples_and_counts(answers: dict[str, Any]) -> None:
    result = evaluate(ROWS, metrics=["exact_match", "perplexity", "valid_json"], num_samples=2, batch_size=7)
    assert result.metrics == {"exact_match": 0.5, "valid_json": 0.25}
    assert [(s.prompt, s.expected, s.completion, s.stopped) for s in result.samples] == [
        ("say one", "one", "one", True),
        ("say two", "two", "2", True),
    ]
    assert (result.num_rows, result.num_cut, result.new_tokens) == (4, 1, 12)
    assert answers["sampling"] == Sampling(max_new_tokens=128)
    assert answers["stops"] == (257,) and answers["batch_size"] == 7


def test_what_a_template_opens_an_answer_with_is_no_part_of_it(answers: dict[str, Any]) -> None:
    rows = [replace(row, opening=opening) for row, opening in zip(ROWS, ("<t>", "2", "th", ""), strict=True)]
    rows[2] = replace(rows[2], expected="ree")
    result = evaluate(rows, metrics=["exact_match"], num_samples=3)
    assert result.metrics == {"exact_match": 0.5}
    assert [sample.completion for sample in result.samples] == ["one", "", "ree"]


def test_fm12_prompts_are_those_of_the_tokenizers_template(answers: dict[str, Any]) -> None:
    evaluate(ROWS, metrics=["exact_match"])
    tokenizer = build_tokenizer()
    assert answers["prompts"] == [
        tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, return_dict=False) for row in ROWS
    ]


def test_a_rows_tools_are_in_its_prompt(answers: dict[str, Any]) -> None:
    row = replace(ROWS[0], tools=[{"name": "f"}])
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    template = load_template(tokenizer, DataSection.model_validate({"sources": [{"path": "x.jsonl"}]}))
    evaluate_task(None, tokenizer, template, [row], EvaluationSection(metrics=["exact_match"]))  # type: ignore[arg-type]
    prompt = tokenizer.apply_chat_template(row.messages, row.tools, add_generation_prompt=True, return_dict=False)
    assert answers["prompts"] == [prompt] and '"name": "f"' in tokenizer.decode(prompt)


def test_only_what_is_asked_for_is_completed(answers: dict[str, Any]) -> None:
    assert evaluate(ROWS, metrics=["exact_match"], max_rows=2).num_rows == 2
    without_task = evaluate(ROWS, metrics=["perplexity"], num_samples=1)
    assert (without_task.num_rows, len(without_task.samples), without_task.metrics) == (1, 1, {})
    assert evaluate([], metrics=["exact_match"]).metrics == {}


def test_a_real_model_is_measured() -> None:
    tokenizer = build_tokenizer()
    template = load_template(tokenizer, DataSection.model_validate({"sources": [{"path": "x.jsonl"}]}))
    section = EvaluationSection.model_validate({"metrics": ["token_f1"], "max_new_tokens": 4})
    done: list[int] = []
    result = evaluate_task(build_llama(), tokenizer, template, ROWS, section, on_batch=done.append)
    again = evaluate_task(build_llama(), tokenizer, template, ROWS, section)
    assert sum(done) == 4 and 0 < result.new_tokens <= 16 and result.seconds > 0
    assert result.samples == again.samples and 0 <= result.metrics["token_f1"] <= 1


def write_rows(path: Path, count: int) -> dict[str, str]:
    line = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}\n'
    path.write_text("".join(line % (n, n) for n in range(count)))
    return {"path": str(path)}


def recipe_of(tmp_path: Path, evaluation: dict[str, Any], **data: Any) -> Recipe:
    source = write_rows(tmp_path / "train.jsonl", 20)
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"name": "x"},
            "data": {"sources": [source], "num_workers": 1, **data},
            "training": {"epochs": 1.0},
            "evaluation": evaluation,
        }
    )


def load(recipe: Recipe) -> tuple[list[Row], Any]:
    tokenizer = build_tokenizer()
    return load_rows(recipe, tokenizer, load_template(tokenizer, recipe.data))


def test_rows_come_from_the_evaluation_source(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "test.jsonl", 6)
    rows, tokens = load(
        recipe_of(tmp_path, {"source": source, "metrics": ["exact_match", "perplexity"], "max_rows": 4})
    )
    assert [row.expected for row in rows] == ["a0", "a1", "a2", "a3"]
    assert len(tokens) == 4
    rows, tokens = load(recipe_of(tmp_path, {"source": source, "metrics": ["exact_match"]}))
    assert len(rows) == 6 and tokens is None


@pytest.mark.parametrize("metrics", [["exact_match"], ["perplexity"], ["exact_match", "perplexity"]])
def test_rows_that_are_trained_on_are_counted(tmp_path: Path, metrics: list[str]) -> None:
    source = write_rows(tmp_path / "test.jsonl", 25)
    recipe = recipe_of(tmp_path, {"source": source, "metrics": metrics}, validation={"size": 4.0})
    tokenizer = build_tokenizer()
    train = prepare_data(recipe.data, tokenizer, load_template(tokenizer, recipe.data), seed=0).train
    assert len(train) == count_trained(*load(recipe), train) == 16


def test_else_from_the_validation_rows(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"metrics": ["perplexity"], "num_samples": 2}, validation={"size": 5.0})
    rows, tokens = load(recipe)
    assert len(rows) == 2 and len(tokens) == 5
    assert load(recipe_of(tmp_path, {"metrics": ["perplexity", "exact_match"]})) == ([], None)


def test_max_rows_limits_perplexity_on_validation_rows_too(tmp_path: Path) -> None:
    evaluation = {"metrics": ["perplexity", "exact_match"], "max_rows": 3}
    rows, tokens = load(recipe_of(tmp_path, evaluation, validation={"size": 5.0}))
    assert [row.origin for row in rows] == [tokens.origin(index) for index in range(len(tokens))] and len(rows) == 3


@pytest.mark.parametrize("key", ["evaluation", "validation"])
def test_max_rows_counts_rows_that_are_measured(tmp_path: Path, key: str) -> None:
    source = write_rows(tmp_path / "test.jsonl", 6)
    path = Path(source["path"])
    path.write_text('{"messages": 1}\n' + path.read_text())
    evaluation: dict[str, Any] = {"metrics": ["perplexity", "exact_match"], "max_rows": 3}
    data: dict[str, Any] = {"max_rejected_share": 0.5}
    (evaluation if key == "evaluation" else data.setdefault("validation", {}))["source"] = source
    rows, tokens = load(recipe_of(tmp_path, evaluation, **data))
    assert [row.origin for row in rows] == [tokens.origin(index) for index in range(len(tokens))] and len(rows) == 3


def test_nothing_of_training_is_said_of_test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("test", "more"):
        (folder / f"{name}.jsonl").write_text('{"text": "some text of ' + name + '"}\n')
    evaluation = {"source": {"path": str(folder)}, "metrics": ["perplexity"]}
    _, tokens = load(recipe_of(tmp_path, evaluation, system="Be brief."))
    assert len(tokens) == 2
    assert "trained" not in capsys.readouterr().err


def test_answers_are_not_compared_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"text": "some text"}\n')
    evaluation = {"source": {"path": str(path)}, "metrics": ["perplexity", "exact_match"]}
    with pytest.raises(DataError, match=r"evaluation.metrics: exact_match compares answers, .* as text rows"):
        load(recipe_of(tmp_path, evaluation))
    rows, tokens = load(recipe_of(tmp_path, {**evaluation, "metrics": ["perplexity"]}))
    assert rows == [] and len(tokens) == 1


def test_a_prompt_is_shown_without_system_text() -> None:
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    assert prompt_text([system, user]) == "U"
    assert prompt_text([system]) == "S"
    assert prompt_text([user, {"role": "assistant", "content": "A"}, user]) == "user: U\nassistant: A\nuser: U"
