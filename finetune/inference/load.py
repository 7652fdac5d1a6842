"""A trained model from its run's directory alone: recipe, base, adapter, tokenizer and template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.data.template import ChatTemplate, load_template
from finetune.errors import ModelError
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, attach_adapter, load_adapter, token_indices
from finetune.models.load import fit_vocabulary, load_base, load_tokenizer
from finetune.models.sources import find_model
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run_dir import RunDir

# What decoding can use; everything else becomes sdpa.
_DECODING_ATTENTION = ("eager", "sdpa", "flash_attention_2")
_CHECKPOINT = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class LoadedRun:
    """A model ready to generate, with all that turns messages into its prompts."""

    model: torch.nn.Module  # a PeftModel, or the bare base
    tokenizer: Any
    template: ChatTemplate
    recipe: Recipe
    adapter_path: Path | None  # None for the bare base


def load_run(path: Path, *, base_only: bool = False) -> LoadedRun:
    """The model of a run's directory, or of an adapter's or checkpoint's that holds the run's `recipe.yaml`.

    The base is quantized as in training. The template is the one that was saved with the adapter; the bare
    base gets the same, so that the two compare.

    Raises:
        RecipeError: the run's recipe cannot be used.
        ModelError: no run is there, it has no adapter yet, or the base cannot be found.
    """
    recipe_path, adapter = find_run(path)
    if adapter is None and not base_only:
        raise ModelError(
            f"{path}: holds no adapter and no whole checkpoint; train first (finetune run RECIPE), "
            "or ask for the base model (--base)"
        )
    recipe = load_recipe(recipe_path)
    source = find_model(recipe.model)
    tokenizer, template = _load_template(recipe, source, adapter)
    model: Any = load_base(
        recipe.model,
        source,
        precision=recipe.training.precision,
        attention_name=recipe.model.attention if recipe.model.attention in _DECODING_ATTENTION else "sdpa",
        device=_device(recipe),
    )
    if base_only:
        return LoadedRun(model, tokenizer, template, recipe, None)
    assert adapter is not None
    fit_vocabulary(model, tokenizer, seed=recipe.training.seed)
    model = attach_adapter(model, recipe.adapter, tokenizer, seed=recipe.training.seed)
    load_adapter(model, adapter)
    return LoadedRun(model, tokenizer, template, recipe, adapter)


def find_run(path: Path) -> tuple[Path, Path | None]:
    """The recipe and the adapter's directory of `path`: its final adapter, else its newest whole checkpoint.

    Raises:
        ModelError: there is no such directory, or it holds no recipe.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; give a run's directory, such as runs/my-run")
    run = RunDir(path)
    if not run.recipe.is_file():
        foreign = (path / CONFIG_NAME).is_file()
        what = "an adapter that was not trained by finetune" if foreign else "not a run"
        raise ModelError(f"{path}: holds no recipe.yaml, so it is {what}; give a directory such as runs/my-run")
    if _is_adapter(path):
        return run.recipe, path
    if _is_adapter(run.adapter):
        return run.recipe, run.adapter
    return run.recipe, _newest_checkpoint(run.checkpoints)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()


def _newest_checkpoint(folder: Path) -> Path | None:
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "manifest.json").is_file() and _is_adapter(path)
    ]
    return max(found)[1] if found else None


def _load_template(recipe: Recipe, source: Any, adapter: Path | None) -> tuple[Any, ChatTemplate]:
    """Tokenizer and template as saved with the adapter, else the base's and the recipe's."""
    model, data = recipe.model, recipe.data
    saved = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    if saved:
        model = model.model_copy(update={"tokenizer": str(adapter)})
    tokenizer = load_tokenizer(model, source)
    if saved and tokenizer.chat_template:
        # Saved with the template that it was trained with, whatever has become of a .jinja file since.
        data = data.model_copy(update={"template": "auto"})
    token_indices(recipe.adapter, tokenizer)
    return tokenizer, load_template(tokenizer, data)


def _device(recipe: Recipe) -> torch.device:
    if recipe.distributed.accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
