"""Adapters that another program trained: the recipe that stands for theirs, from PEFT's own configuration."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open

from finetune.console import say
from finetune.errors import ModelError
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME
from finetune.models.load import PRECISION_DTYPES, load_config
from finetune.models.saved import read_config, read_settings
from finetune.models.sources import ModelSource, find_model
from finetune.models.tokenizer_files import TOKENIZER_CONFIG
from finetune.recipe.hub_address import SNAPSHOT
from finetune.recipe.schema import DataSection, LoraSection, ModelSection, Precision, Recipe, TrainingSection

_BASE = "base_model_name_or_path"
_PRECISIONS: dict[str, Precision] = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-mixed"}


def derive_recipe(adapter: Path) -> Recipe:
    """What of a run's recipe is known of an adapter by its own files: a name, the base, and the adapter; no data.

    Raises:
        ModelError: it is of a kind that is not computed here, names no base, or one that is not where it says.
    """
    config, settings = read_config(adapter), read_settings(adapter)
    if isinstance(config.init_lora_weights, str) and "niter" in config.init_lora_weights:
        raise ModelError(
            f"{adapter}: its initial values ({config.init_lora_weights}) were drawn and taken off its base, which "
            "nobody can draw again; let PEFT convert it (save_pretrained, path_initial_model_for_weight_conversion)"
        )
    init = config.init_lora_weights if config.init_lora_weights in ("pissa", "olora") else "default"
    section = LoraSection.model_construct(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init=init,
        modules_to_save=list(config.modules_to_save or ()),
        trainable_tokens=sorted(_trained_tokens(config)),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    model = ModelSection(name=_find_base(adapter, settings.get(_BASE)), revision=settings.get("revision"))
    nothing = DataSection.model_construct(sources=[])
    return Recipe.model_construct(
        name=_name_of(adapter), model=model, adapter=section, data=nothing, training=TrainingSection()
    )


def load_foreign(adapter: Path) -> tuple[Recipe, ModelSource]:
    """`derive_recipe` with the dtype in which its base is stored, and that base; says what they are.

    Raises:
        ModelError: as `derive_recipe`, or the base cannot be found.
    """
    recipe = derive_recipe(adapter)
    try:
        source = find_model(recipe.model)
        config = load_config(recipe.model, source)
    except ModelError as error:
        raise _base_error(adapter, str(error).removeprefix("model.name: ")) from error
    # As PEFT's own loading takes it; what it was quantized to while the adapter was trained is recorded nowhere.
    stored = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    training = TrainingSection(precision=_PRECISIONS.get(stored, "32-true"))
    owner = "its own" if (adapter / TOKENIZER_CONFIG).is_file() else "the base's"
    say(
        f"{adapter}: has no recipe.yaml, so PEFT's files count: base {source.name} in "
        f"{PRECISION_DTYPES[training.precision]} as it is stored, tokenizer and chat template {owner}"
    )
    return recipe.model_copy(update={"training": training}), source


def require_rows(adapter: Path, tokenizer: Any, config: Any) -> None:
    """Whether there is an embedding for each token of the tokenizer beside an adapter.

    Raises:
        ModelError: the base has fewer, and those that were added are not in the adapter's file.
    """
    num_rows, num_tokens = config.get_text_config().vocab_size, len(tokenizer)
    trained = _trained_tokens(read_config(adapter))
    with safe_open(adapter / WEIGHTS_NAME, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if ".lora_" not in name]  # noqa: SIM118
    is_saved = any(len(shape) > 1 and shape[0] >= num_tokens for shape in shapes)
    if num_tokens > num_rows and not is_saved and not {*range(num_rows, num_tokens)} <= trained:
        raise ModelError(
            f"{adapter}: the tokenizer has {num_tokens:,} tokens and the base {num_rows:,}, and the embeddings of those"
            " added were not saved with it; save the adapter again: save_pretrained(..., save_embedding_layers=True)"
        )


def _trained_tokens(config: LoraConfig) -> set[int]:
    indices = config.trainable_token_indices or []
    return {*itertools.chain(*indices.values())} if isinstance(indices, dict) else {*indices}


def _find_base(adapter: Path, named: Any) -> str:
    """The base as `find_model` takes it: a hub id, or a directory here (as for PEFT) or beside the adapter."""
    if not named or not isinstance(named, str):
        raise _base_error(adapter, "no base is named")
    places = (Path(named).expanduser(), adapter / named)
    return next((str(place.absolute()) for place in places if place.is_dir()), named)


def _base_error(adapter: Path, what: str) -> ModelError:
    return ModelError(
        f"{adapter / CONFIG_NAME}: {_BASE}: {what}\n  That is the base that the adapter needs: bring it back, or write "
        "there where it is now, or its id on the Hub."
    )


def _name_of(adapter: Path) -> str:
    """A run's name for it."""
    path = adapter.resolve()
    match = SNAPSHOT.search(str(path))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", match.group(2) if match else path.name).strip("._-") or "adapter"
