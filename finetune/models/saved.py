"""An adapter on disk, ours or another program's, on its base: by PEFT's own configuration, beside the weights."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open

from finetune.console import warn
from finetune.errors import ModelError, first_line
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, init_off_the_base, load_adapter, wrap_base
from finetune.models.load import resize_vocabulary
from finetune.run_dir import FINGERPRINTS

PREFIX = "base_model.model."
# What makes of an adapter more than two matrices a layer, in words; DoRA's magnitudes are known here.
_KINDS = {
    "alora_invocation_tokens": "is an activated LoRA (alora_invocation_tokens)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "use_qalora": "is a QA-LoRA",
}
_VARIANTS = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
# Initial values that cannot be made again: they follow from data, or from how the base was quantized.
_LOST_INIT = ("corda", "loftq", "lora_ga")
# Where PEFT puts a layer that it wraps.
_INNER = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.\w+$)")


def read_settings(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter in `folder`, as it stands there.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / CONFIG_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.items()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read as an adapter's configuration: {first_line(error)}") from error
    return dict(settings)


def recorded_base(folder: Path) -> dict[str, Any]:
    """Name, revision and sha256 of the base that an adapter was trained on; empty where nothing is recorded.

    Raises:
        ModelError: the record is damaged.
    """
    path = folder / FINGERPRINTS
    if not path.is_file():
        return {}
    try:
        recorded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("base") or {}
    except (OSError, ValueError, AttributeError):
        raise ModelError(
            f"{path}: is damaged, so the adapter's base cannot be told; bring it back, or remove it to go on without"
        ) from None
    return recorded


def unlike_lora(settings: Mapping[str, Any]) -> str | None:
    """What an adapter of this configuration is or does that no LoRA here computes; None for one that will do."""
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        return f"is not LoRA but {kind}"
    if task not in (None, "CAUSAL_LM"):
        return f"was trained for {task}, and not for text that is written (CAUSAL_LM)"
    if settings.get("bias", "none") != "none":
        return f"has trained biases of its base (bias: {settings['bias']})"
    init = init_off_the_base(settings)
    if init and init.startswith(_LOST_INIT):
        return f"fits only a base that {init} has changed"
    names = [*_KINDS, *(name for name in _VARIANTS if name != "use_dora" and name not in _KINDS)]
    return next((_KINDS.get(name, f"is a variant of LoRA ({name})") for name in names if settings.get(name)), None)


def read_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of the adapter in `folder`, as for one that is attached afresh.

    Raises:
        ModelError: it cannot be read, or is of a kind that is not computed here.
    """
    settings = read_settings(folder)
    if what := unlike_lora(settings):
        raise ModelError(f"{folder}: the adapter {what}; finetune takes LoRA, with rsLoRA and DoRA")
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    if new := sorted(name for name, value in settings.items() if value and name not in known):
        warn(f"{folder / CONFIG_NAME}: {', '.join(new)}: not known to PEFT {peft.__version__}, so it has no effect")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ModelError(f"{folder / CONFIG_NAME}: cannot be read as a LoRA adapter: {first_line(error)}") from error
    config.inference_mode, config.task_type = False, "CAUSAL_LM"
    # PEFT would warn that the base is another one wherever a converted copy of it is loaded.
    config.base_model_name_or_path = None
    return config


def attach_saved(base: Any, folder: Path, tokenizer: Any, *, seed: int) -> PeftModel:
    """Wrap `base` with the adapter in `folder`, its vocabulary made the adapter's; fp32, as in training.

    Rows of tokens that no file holds are drawn from `seed`, and initial values that are taken off the base.

    Raises:
        ModelError: it is of another kind, or does not fit.
    """
    config = read_config(folder)
    fit_saved(base, folder, config, tokenizer, seed=seed)
    model = wrap_saved(base, folder, config, seed=seed)
    load_adapter(model, folder)
    return model


def wrap_saved(base: Any, folder: Path, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """`base` with fresh values in the place of the adapter in `folder`.

    Raises:
        ModelError: it names layers that the base has not.
    """
    try:
        return wrap_base(base, config, seed=seed)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: the adapter does not fit the model: {first_line(error)}") from error


def add_saved(model: PeftModel, folder: Path, name: str) -> None:
    """Add the adapter in `folder` under `name` to a model that has one already, which stays the active one.

    Raises:
        ModelError: as `attach_saved`.
    """
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(name, read_config(folder))
    for parameter_name, parameter in model.named_parameters():
        if name in parameter_name.split("."):
            parameter.data = parameter.data.float()  # as in training, whatever the base's dtype
    load_adapter(model, folder, name)


def base_tensors(base: Any, folder: Path, config: LoraConfig) -> dict[str, str]:
    """Parameters of embedding and head that stand in the adapter's file though it does not train them; to names there.

    PEFT saves them where the vocabulary was resized.
    """
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    modules = [(name, module) for name, module in base.named_modules() if id(module) in ends]
    parameters = {f"{name}.{leaf}" for name, module in modules for leaf, _ in module.named_parameters(recurse=False)}
    whole = tuple(config.modules_to_save or ())
    found = {}
    with _open_weights(folder) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            name = _INNER.sub("", key.removeprefix(PREFIX))
            is_trained = f"{PREFIX}{name}" == key and name.rpartition(".")[0].endswith(whole or ("\0",))
            if name in parameters and not is_trained:
                found[name] = key
    return found


@contextmanager
def _open_weights(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_NAME}: cannot be read as an adapter: {error}") from error


def vocabulary_size(base: Any, folder: Path, config: LoraConfig) -> int | None:
    """Rows of the embedding, where the adapter's file holds it whole."""
    embedding = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding) + ".weight"
    key = base_tensors(base, folder, config).get(name, f"{PREFIX}{name}")
    with _open_weights(folder) as file:
        return int(file.get_slice(key).get_shape()[0]) if key in file.keys() else None  # noqa: SIM118


def fit_saved(base: Any, folder: Path, config: LoraConfig, tokenizer: Any, *, seed: int) -> None:
    """Give `base` the vocabulary that the adapter was trained with: as many rows, and the values that are saved.

    Raises:
        ModelError: a value has another shape, or the tokenizer has tokens without one.
    """
    rows, saved = base.get_input_embeddings().weight.shape[0], vocabulary_size(base, folder, config)
    if saved is not None and saved < len(tokenizer):
        raise ModelError(
            f"{folder / WEIGHTS_NAME}: holds embeddings of {saved:,} tokens, and the tokenizer has {len(tokenizer):,}; "
            "put the tokenizer that it was trained with beside it"
        )
    resize_vocabulary(base, saved or max(rows, len(tokenizer)), seed=seed)
    given: dict[int, torch.Tensor] = {}
    with _open_weights(folder) as file:
        for name, key in base_tensors(base, folder, config).items():
            parameter, value = base.get_parameter(name), file.get_tensor(key)
            if parameter.shape != value.shape or not torch.equal(given.setdefault(id(parameter), value), value):
                raise ModelError(
                    f"{folder / WEIGHTS_NAME}: holds {key} of shape {tuple(value.shape)}, which is not the base's, of "
                    f"shape {tuple(parameter.shape)}, whose embedding and head may be one"
                )
            parameter.data = value.to(parameter)
