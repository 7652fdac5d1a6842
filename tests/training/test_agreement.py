"""What processes that train on different things are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.training.agreement import differences


def found(**training: Any) -> dict[str, Any]:
    values = {"name": "x", "model": {"name": "/disk/m"}, "data": {"sources": [{"path": "/disk/rows.jsonl"}]}}
    recipe = Recipe.model_validate({**values, "training": {"max_steps": 3, **training}})
    hashes = {"base": {"name": "m", "sha256": "1"}, "data": {"train": "2", "validation": None}}
    return {"recipe": dump_recipe(recipe), "fingerprints": hashes, "settled": {"steps in all": 3}}


def test_the_same_at_other_places_is_no_difference() -> None:
    other = found()
    recipe = yaml.safe_load(other["recipe"])
    recipe["model"]["name"], recipe["data"]["sources"][0]["path"] = "/local/m", "/local/rows.jsonl"
    recipe["adapter"]["start_from"], recipe["training"]["gradient_checkpointing"] = "/local/first", 3
    other["recipe"] = yaml.safe_dump(recipe)
    assert differences(found(), other) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda other: other.update(recipe=found(seed=7)["recipe"]), "training.seed: 0 -> 7"),
        (lambda other: other["settled"].update({"steps in all": 2}), "steps in all: 3 -> 2"),
        (lambda other: other["fingerprints"]["base"].update(sha256="9"), "the base model m: its files are others"),
        (lambda other: other["fingerprints"]["data"].update(validation="9"), "the validation data: its samples are"),
        (lambda other: other["fingerprints"].update(test="9"), "the rows that are measured: they are others"),
    ],
    ids=["recipe", "steps", "model", "validation", "test"],
)
def test_a_difference_is_named(change: Any, words: str) -> None:
    other = copy.deepcopy(found())
    change(other)
    (said,) = differences(found(), other)
    assert said.startswith(words)
