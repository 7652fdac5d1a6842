"""Several adapters on one base that is loaded once: what each computes is what it computes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.template import ChatTemplate
from finetune.errors import ModelError
from finetune.inference.load import (
    LoadedRun,
    find_run,
    load_run_base,
    load_run_recipe,
    load_saved_template,
)
from finetune.models.load import base_dtype, compute_dtype
from finetune.models.saved import add_saved, attach_saved, base_tensors, read_config, recorded_base
from finetune.models.sources import ModelSource
from finetune.recipe.schema import QUANTIZED_4BIT, Recipe


@dataclass(frozen=True)
class _Trained:
    """An adapter and what it was trained with; nothing of the model is loaded."""

    given: str
    recipe: Recipe
    source: ModelSource
    adapter: Path | None

    def stored(self) -> str:
        """How the base's weights were held while training."""
        model = self.recipe.model
        precision = self.recipe.training.precision
        dtype = str(base_dtype(model, precision)).removeprefix("torch.")
        if model.quantization not in QUANTIZED_4BIT:
            return dtype if model.quantization == "none" else f"{model.quantization} of {dtype}"
        scales = "" if model.double_quant else ", scales not quantized"
        return f"{model.quantization} of {dtype}, computed in {compute_dtype(model, precision)}{scales}"

    def base(self) -> str:
        """The base as the adapter knows it, in words."""
        revision = f" at {self.source.revision}" if self.source.revision else ""
        return f"{self.source.name}{revision} ({self.stored()})"

    def same_base(self, other: _Trained) -> bool:
        """Whether both were trained on the same weights, stored alike."""
        hashes = [recorded_base(one.adapter).get("sha256") if one.adapter else None for one in (self, other)]
        places = [(one.source.location, one.source.revision) for one in (self, other)]
        same = hashes[0] == hashes[1] if all(hashes) else places[0] == places[1]
        return same and self.stored() == other.stored()


def load_adapters(runs: Sequence[tuple[str, Path]], on: tuple[str, Path] | None = None) -> list[LoadedRun]:
    """What `load_run` gives for each of the runs (what the user called it, its path), on one base in memory.

    They share their model: call `activate` on one before it is used. The base is that of `on`, else of the first.

    Raises:
        ModelError: as `load_run`; or a run was trained on another base, or cannot share one.
    """
    trained = [_read(given, path) for given, path in runs]
    base = trained[0] if on is None else _read(*on)
    for one, (given, path) in zip(trained, runs, strict=True):
        if one.adapter is None:
            raise ModelError(f"{path}: holds no adapter and no whole checkpoint; train first (finetune run RECIPE)")
        if not base.same_base(one):
            raise ModelError(
                f"--adapter {given}: was trained on {one.base()}, and {base.given} on {base.base()}; adapters share "
                "one base here: generate with each alone"
            )
        if len(runs) > 1 and one.recipe.adapter.rewrites_base:
            raise ModelError(
                f"--adapter {given}: its initial values ({one.recipe.adapter.init}) were taken off the base's weights, "
                "so it can share them with no other; generate with it alone"
            )
    templates = [load_saved_template(one.recipe, one.source, one.adapter) for one in trained]
    return _attach(base, trained, templates)


def _read(given: str, path: Path) -> _Trained:
    recipe_path, adapter = find_run(path)
    recipe, source = load_run_recipe(recipe_path, adapter)
    return _Trained(given, recipe, source, adapter)


def _attach(base: _Trained, trained: list[_Trained], templates: list[tuple[Any, ChatTemplate]]) -> list[LoadedRun]:
    model: Any = load_run_base(base.recipe, base.source)
    for one in trained if len(trained) > 1 else ():
        assert one.adapter is not None
        if base_tensors(model, one.adapter, read_config(one.adapter)):
            raise ModelError(
                f"--adapter {one.given}: brings embeddings for its base, as PEFT saves them of a vocabulary that was "
                "resized, so it can share the base with no other; generate with it alone"
            )
    rows = model.get_input_embeddings().weight.shape[0]
    # Rows that are added are drawn from the run's seed.
    grown = [
        (len(tokenizer), one.recipe.training.seed) if len(tokenizer) > rows else None
        for one, (tokenizer, _) in zip(trained, templates, strict=True)
    ]
    if len(set(grown)) > 1:
        raise ModelError(
            f"--adapter {', '.join(one.given for one in trained)}: they add different tokens to the base, which has "
            "one vocabulary here; generate with each alone"
        )
    loaded: dict[int, LoadedRun] = {}
    # Trained tokens last: PEFT cannot tell the tensors of an adapter without any where another has some.
    for number in sorted(range(len(trained)), key=lambda number: bool(trained[number].recipe.adapter.trainable_tokens)):
        one, (tokenizer, template) = trained[number], templates[number]
        assert one.adapter is not None
        seed, name = one.recipe.training.seed, f"adapter_{number}" if loaded else "default"
        if loaded:
            add_saved(model, one.adapter, name)
        else:
            model = attach_saved(model, one.adapter, tokenizer, seed=seed)
        loaded[number] = LoadedRun(model, tokenizer, template, one.recipe, one.adapter, name)
    return [loaded[number] for number in range(len(trained))]
