"""Settings that do nothing are pointed out, by `check` and by `run`; those that work, and defaults, are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.commands.run import _check_cheap_things
from finetune.recipe.idle import IDLE, find_idle
from finetune.recipe.keys import all_keys
from finetune.recipe.load import load_recipe
from finetune.recipe.preflight import CHECKS
from tests.recipe.examples import MINIMAL, write

# Overrides under which a key does nothing, what is said, and one more with which it does something.
CASES = [
    (
        "model.double_quant=false",
        "model.double_quant: false has no effect on model.quantization none",
        "model.quantization=nf4",
    ),
    ("model.compute_dtype=fp32", "model.compute_dtype: fp32 has no effect on", "model.quantization=fp4"),
    (
        "training.precision=32-true model.dtype=bf16",
        "model.dtype: bf16 is what the base computes in, for training.precision 32-true converts nothing",
        "training.precision=bf16-true",
    ),
    ("training.precision=bf16-true model.dtype=fp32", "model.dtype: fp32 is what", "training.precision=bf16-mixed"),
    ("data.packing=none data.row_multiple=8", "data.row_multiple: 8 has no effect", "data.packing=auto"),
    (
        "data.validation.size=0.1 checkpoint.keep_best=3",
        "checkpoint.keep_best: 3 keeps none",
        "evaluation.every_steps=5",
    ),
    (
        "evaluation.source={path: a/b} evaluation.metrics=[] evaluation.num_samples=0",
        "evaluation.source: a/b is not read",
        "evaluation.num_samples=1",
    ),
    (
        "logging.project=mine logging.trackers=[tensorboard]",
        "logging.project: mine has no effect",
        "logging.trackers=[trackio]",
    ),
    ("logging.tags=[a] logging.trackers=[trackio]", 'logging.tags: ["a"] have no effect', "logging.trackers=[wandb]"),
    (
        "hub.private=false hub.repo_id=org/x",
        "hub.private: false has no effect without hub.push",
        "hub.push=true",
    ),
]


def split(overrides: str) -> list[str]:
    """At the blanks before a key."""
    return overrides.replace(" ", "\n").replace(":\n", ": ").split("\n")


@pytest.mark.parametrize(("overrides", "said", "mended"), CASES)
def test_it_is_pointed_out(tmp_path: Path, overrides: str, said: str, mended: str) -> None:
    path = write(tmp_path, MINIMAL)
    (line,) = find_idle(load_recipe(path, split(overrides)))
    assert line.startswith(said)
    assert find_idle(load_recipe(path, [*split(overrides), mended])) == []


def test_nothing_is_said_of_defaults(tmp_path: Path) -> None:
    assert find_idle(load_recipe(write(tmp_path, MINIMAL))) == []


def test_every_row_of_the_table_is_tried() -> None:
    assert {row.key for row in IDLE} == {said.split(":")[0] for _, said, _ in CASES} <= set(all_keys())


def test_check_and_run_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["model.compute_dtype=fp32", f"output_dir={tmp_path}"])
    (found,) = CHECKS["settings"](recipe)
    _check_cheap_things(recipe)
    said = " ".join(capsys.readouterr().err.split())
    assert found.level == "warning" and found.text in said
