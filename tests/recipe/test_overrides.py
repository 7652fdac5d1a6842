"""Overrides: values are YAML, sections are created, and errors name the override."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe
from tests.recipe.examples import MINIMAL, errors_of, write


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def test_values_are_read_as_yaml(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "training.optimizer.lr=1e-3",
            "adapter.target_modules=[q_proj,v_proj]",
            "training.epochs=null",
            "training.max_steps=5",
            "model.quantization=nf4",
            "adapter.rank_pattern={q_proj: 4}",
            "data.system=a = b",
            "name=x",
        ],
    )
    assert loaded.training.optimizer.lr == 1e-3
    assert loaded.adapter.target_modules == ["q_proj", "v_proj"]
    assert (loaded.training.epochs, loaded.training.max_steps) == (None, 5)
    assert loaded.model.quantization == "nf4"
    assert loaded.adapter.rank_pattern == {"q_proj": 4}
    assert loaded.data.system == "a = b"
    assert loaded.name == "x"


def test_sections_and_items_are_created(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "data.sources.1.path=org/second",
            "data.validation.size=0.1",
            "data.sources[1].max_rows=3",
            "evaluation.every_steps=5",
            "evaluation.early_stopping.patience=7",
        ],
    )
    assert [(source.path, source.max_rows) for source in loaded.data.sources][1:] == [("org/second", 3)]
    assert loaded.evaluation.early_stopping is not None
    assert loaded.evaluation.early_stopping.patience == 7


def test_the_last_of_two_wins(recipe: Path) -> None:
    assert load_recipe(recipe, ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_paths_are_relative_to_the_working_directory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(recipe, ["data.validation.source={path: val.jsonl}", "model.name=./m"])
    assert loaded.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert loaded.data.validation.source is not None
    assert loaded.data.validation.source.path == str(elsewhere / "val.jsonl")
    assert loaded.model.name == str(elsewhere / "m")


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    text = MINIMAL.replace("- path: rows.jsonl", "- &one {path: a/x}\n    - *one")
    loaded = load_recipe(write(tmp_path, text), ["data.sources.0.path=b/y"])
    assert [source.path for source in loaded.data.sources] == ["b/y", "a/x"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr=3", "unknown key; did you mean training.optimizer.lr?"),
        ("trainin.epochs=3", "trainin: unknown key; did you mean training?"),
        ("hub.push=yes", 'got "yes"; accepts true or false; did you mean true?'),
        ("distributed.devices=0", "got 0; accepts an integer above 0, at most 256, or auto"),
        ("distributed={devices: 0}", "distributed.devices: got 0; accepts an integer above 0, at most 256, or auto"),
        ("data.sources=rows.jsonl", 'got "rows.jsonl"; accepts a list of at least 1'),
        ("data.sources.4.path=x", "data.sources is a list; give an index from 0 to 1, not 4"),
        ("data.sources.x=1", "data.sources is a list; give an index from 0 to 1, not x"),
        ("training.epochs.x=3", "training.epochs is the value 1, which has no keys beneath it"),
        ("training.epochs", "write KEY.PATH=VALUE, e.g. training.optimizer.lr=1e-3"),
        ("training..epochs=1", "write KEY.PATH=VALUE, e.g. training.optimizer.lr=1e-3"),
        ("=1", "write KEY.PATH=VALUE, e.g. training.optimizer.lr=1e-3"),
        ("hub=[", "the value is not YAML: "),
        ("hub.push=true", "true, but there is nowhere to push to; set hub.repo_id: org/name"),
        ("evaluation.early_stopping.patience=2", "evaluation.early_stopping: there are no validation rows"),
    ],
)
def test_errors_name_the_override(recipe: Path, override: str, message: str) -> None:
    said = errors_of(recipe, override)
    assert said[0].startswith(f"override {override}: {message}")


def test_errors_of_overrides_follow_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("epochs: 1", "epochs: x"))
    said = errors_of(path, "hub.push=no", "bad", "model.dtype=int4")
    assert [line.split(": ")[0] for line in said] == [
        "recipe.yaml:8",
        "override hub.push=no",
        "override model.dtype=int4",
        "override bad",
    ]


def test_an_override_mends_what_the_file_has_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("epochs: 1", "epochs: x"))
    assert load_recipe(path, ["training.epochs=1"]).training.epochs == 1
