"""Recipes that the tests of this folder start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe

MINIMAL = """\
name: tiny
model:
  name: org/model
data:
  sources:
    - path: rows.jsonl
training:
  epochs: 1
"""

# Every section, with a value of every kind; completed with the defaults by `full_example`.
FULL = """\
name: full
model: {name: org/model, quantization: nf4}
adapter: {rank: 8, alpha: 16, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}}
data:
  sources:
    - {path: a.jsonl, columns: {instruction: question}}
    - {path: org/set, weight: 0.5}
  validation:
    source: {path: held_out.jsonl}
training: {epochs: 2, max_steps: 100}
evaluation:
  every_steps: 10
  early_stopping: {patience: 2}
  source: {path: test.jsonl}
hub: {repo_id: org/adapter, push: true}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def errors_of(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that loading raises, without the folder."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [line.replace(f"{path.parent}/", "") for line in str(caught.value).splitlines()]


def keys_of(text: str) -> Iterator[tuple[tuple[str, ...], int, int, int]]:
    """Every key of a YAML text: its path, its line, and where the key itself stands in the text."""
    yield from _keys(yaml.compose(text), ())


def _keys(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, int, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            yield here, key.start_mark.line + 1, key.start_mark.index, key.end_mark.index
            yield from _keys(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _keys(value, (*path, str(index)))
