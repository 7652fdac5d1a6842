"""A trained model from its run's directory alone: recipe, base, adapter, tokenizer and template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.console import say, warn
from finetune.data.template import ChatTemplate, load_template
from finetune.errors import DataError, ModelError
from finetune.files import MANIFEST, damage_of, read_manifest
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, token_indices
from finetune.models.foreign import load_foreign, require_rows
from finetune.models.load import fit_vocabulary, load_base, load_config, load_tokenizer
from finetune.models.saved import attach_saved, recorded_base
from finetune.models.shared import mapped_source
from finetune.models.sources import ModelSource, find_model, fingerprint
from finetune.recipe.load import load_recipe
from finetune.recipe.moved import find_files
from finetune.recipe.schema import DataSection, Recipe
from finetune.run_dir import MERGE_RECORD, RunDir

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
    adapter_name: str = "default"  # in the PeftModel; several runs may share one

    def activate(self) -> None:
        """Switch a model that several adapters share to this one."""
        if self.adapter_path is not None:
            model: Any = self.model
            model.set_adapter(self.adapter_name)


def load_run(path: Path, *, base_only: bool = False) -> LoadedRun:
    """The model of a run's directory, or of an adapter's or checkpoint's, with the run's `recipe.yaml` or without.

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
    recipe, source = load_run_recipe(recipe_path, adapter)
    tokenizer, template = load_saved_template(recipe, source, adapter)
    model: Any = load_run_base(recipe, source)
    if base_only:
        fit_vocabulary(model, tokenizer, seed=recipe.training.seed)
        return LoadedRun(model, tokenizer, template, recipe, None)
    assert adapter is not None
    model = attach_saved(model, adapter, tokenizer, seed=recipe.training.seed)
    return LoadedRun(model, tokenizer, template, recipe, adapter)


def find_run(path: Path) -> tuple[Path | None, Path | None]:
    """The recipe and the adapter's directory of `path`: its final adapter, else its newest whole checkpoint.

    An adapter that another program trained has no recipe.

    Raises:
        ModelError: there is no such directory, or it holds neither recipe nor adapter.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; give a run's directory, such as runs/my-run")
    run = RunDir(path)
    if (path / MERGE_RECORD).is_file():
        raise ModelError(
            f"{path}: is a merged model; give the run that it was made of, or serve it: finetune export {path} "
            "--to gguf"
        )
    if not run.recipe.is_file():
        if _is_adapter(path):
            return None, path
        raise ModelError(f"{path}: {_missing(path)}")
    if _is_adapter(path):
        return run.recipe, path
    if _is_adapter(run.adapter):
        return run.recipe, run.adapter
    checkpoint = _newest_checkpoint(run.checkpoints)
    if run.adapter.exists() and checkpoint is not None:
        warn(f"{run.adapter} lacks {CONFIG_NAME} or {WEIGHTS_NAME}, and is passed over for {checkpoint}")
    return run.recipe, checkpoint


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()


def _missing(folder: Path) -> str:
    """What a directory lacks that is neither a run's nor an adapter's."""
    if (folder / CONFIG_NAME).is_file():
        return (
            f"holds {CONFIG_NAME} and no {WEIGHTS_NAME}, so it is no adapter; PEFT writes both from an older one's "
            "adapter_model.bin: PeftModel.from_pretrained(base, DIR).save_pretrained(NEW)"
        )
    below = sorted(path.name for path in folder.iterdir() if _is_adapter(path))
    give = f"one of the adapters in it: {', '.join(below)}" if below else "a directory such as runs/my-run"
    return f"holds no recipe.yaml, so it is not a run; give {give}"


def _newest_checkpoint(folder: Path) -> Path | None:
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / MANIFEST).is_file() and _is_adapter(path)
    ]
    for _, path in sorted(found, reverse=True):
        manifest, why_not = read_manifest(path)
        damage = why_not or damage_of(path, manifest["files"])
        if damage is None:
            return path
        warn(f"{path} is damaged and passed over: {damage}")
    return None


def load_run_recipe(recipe_path: Path | None, adapter: Path | None) -> tuple[Recipe, ModelSource]:
    """What `find_run` found: a run's recipe and its base model; local files of one that has moved are looked for here.

    Of an adapter without a recipe, what its own files say.

    Raises:
        RecipeError: the recipe cannot be used.
        ModelError: the base cannot be found, or is another than the adapter was trained on.
    """
    if recipe_path is None:
        assert adapter is not None
        return load_foreign(adapter)
    moved, missing = find_files(recipe_path)
    for value in missing:
        if value.path == ("model", "name") and value.text.startswith("./"):
            raise ModelError(
                f"model.name: {value.text} was a directory or file of the machine that trained this adapter, and is "
                f"not here; put a copy of that base into the working directory, named {Path(value.text).name}"
            )
    recipe = load_recipe(recipe_path, moved, was_run=True)
    source = find_model(recipe.model)
    if adapter is not None:
        _require_same_base(adapter, source)
    return recipe, source


def _require_same_base(adapter: Path, source: ModelSource) -> None:
    """Compare the base at hand with the one that the adapter was trained on, where that is recorded.

    Raises:
        ModelError: they differ.
    """
    recorded = recorded_base(adapter)
    if recorded and (found := fingerprint(source))["sha256"] != recorded["sha256"]:
        raise ModelError(
            f"model.name: {source.name} is not the base that the adapter was trained on: its files hash to "
            f"{found['sha256'][:12]} instead of {recorded['sha256'][:12]} (revision {recorded['revision']}); "
            "bring the old files back, or set model.revision in the run's recipe.yaml"
        )


def load_saved_template(recipe: Recipe, source: ModelSource, adapter: Path | None) -> tuple[Any, ChatTemplate]:
    """Tokenizer and template as saved with the adapter, else the base's and the recipe's."""
    model, data = recipe.model, recipe.data
    saved = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    if saved:
        model = model.model_copy(update={"tokenizer": str(adapter)})
    tokenizer = load_tokenizer(model, source)
    if saved and tokenizer.chat_template:
        # Saved with its variables as it was trained with, whatever has become of a .jinja file since.
        data = data.model_copy(update={"template": "auto", "template_variables": {}})
    token_indices(recipe.adapter, tokenizer)
    if recipe.is_derived:
        assert adapter is not None
        require_rows(adapter, tokenizer, load_config(recipe.model, source))
        return tokenizer, _foreign_template(adapter, tokenizer, data)
    return tokenizer, load_template(tokenizer, data)


def _foreign_template(adapter: Path, tokenizer: Any, data: DataSection) -> ChatTemplate:
    """The tokenizer's own template; where it has none, one that writes the text alone, and is not saved with it.

    Raises:
        DataError: it is a template that no run could be trained with.
    """
    own = tokenizer.chat_template
    if not own:
        say(f"{adapter}: neither it nor its base has a chat template; a prompt is taken as the text itself")
    try:
        template = load_template(tokenizer, data)
    except DataError as error:
        raise DataError(f"{error}\n  Put another tokenizer beside {adapter / CONFIG_NAME}.") from error
    tokenizer.chat_template = own
    return template


def load_run_base(recipe: Recipe, source: ModelSource) -> Any:
    """The base model, quantized as in training, with an attention that can decode."""
    attention_name, device = placement(recipe)
    precision = recipe.training.precision
    mapped = mapped_source(recipe.model, source, precision=precision, on_cpu=device.type == "cpu")
    return load_base(
        recipe.model,
        mapped,
        precision=precision,
        attention_name=attention_name,
        device=device,
        shardable=mapped is not source,
    )


def placement(recipe: Recipe) -> tuple[str, torch.device]:
    """The attention that a run's model infers with, and where."""
    attention_name = recipe.model.attention if recipe.model.attention in _DECODING_ATTENTION else "sdpa"
    if recipe.distributed.accelerator != "cpu" and torch.cuda.is_available():
        return attention_name, torch.device("cuda", torch.cuda.current_device())
    return attention_name, torch.device("cpu")
