"""What an adapter changes: its tensors, by the parameter of the model that each of them changes.

PEFT itself attaches the adapter to an empty copy of the model, so which layers it changes, with which rank, scale
and tying, is what PEFT says and not a second reading of its configuration.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from finetune.errors import ModelError
from finetune.models.adapters import TRAINED_ROWS, WEIGHTS_NAME
from finetune.models.saved import PREFIX, base_tensors, read_config, wrap_saved

_NAME = "default"


@dataclass(frozen=True)
class Step:
    """One change to a weight, and the adapter's tensors that make it."""

    kind: Literal["lora", "dora", "bias", "replace", "rows"]
    tensors: tuple[str, ...]  # names in the adapter's file
    scale: float = 1.0
    rank: int = 0
    transposed: bool = False
    rows: tuple[int, ...] = ()


def read_steps(skeleton: Any, adapter: Path) -> dict[str, tuple[Step, ...]]:
    """The adapter's changes by parameter; every tensor of its file is used, and by one parameter or a tied pair.

    `skeleton` is the model without weights, its embeddings resized for added tokens.

    Raises:
        ModelError: the file is damaged, a tensor is missing, left over or of another shape, or a kind of layer cannot
            be merged.
    """
    config = read_config(adapter)
    model = _attach(skeleton, adapter, config)
    try:
        replaced = base_tensors(skeleton, adapter, config)
        with safe_open(adapter / WEIGHTS_NAME, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{adapter / WEIGHTS_NAME}: cannot be read as an adapter: {error}") from error
    wanted = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    wanted |= {key: tuple(skeleton.get_parameter(name).shape) for name, key in replaced.items()}
    saved = {name: shape for name, shape in saved.items() if name in wanted or not _is_repeat(name)}
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = sorted(name for name in wanted.keys() & saved.keys() if wanted[name] != saved[name])
    if missing or unknown or shapes:
        raise ModelError(
            f"{adapter / WEIGHTS_NAME}: does not fit the model: {len(missing)} tensors missing "
            f"({', '.join(missing[:2])}), {len(unknown)} unknown ({', '.join(unknown[:2])}), "
            f"{len(shapes)} of another shape ({', '.join(shapes[:2])})"
        )
    steps = {name: [Step("replace", (key,))] for name, key in replaced.items()}
    uses = Counter(replaced.values())
    for parameter, step, is_copy in _module_steps(model, set(saved)):
        steps.setdefault(parameter, []).append(step)
        uses.update(() if is_copy else step.tensors)
    unused = sorted(saved.keys() - uses.keys())
    twice = sorted(name for name, count in uses.items() if count > 1)
    if unused or twice:
        raise ModelError(
            f"{adapter / WEIGHTS_NAME}: cannot be merged: {len(unused)} tensors belong to no weight "
            f"({', '.join(unused[:2])}), {len(twice)} to several ({', '.join(twice[:2])})"
        )
    return {parameter: tuple(found) for parameter, found in steps.items()}


def _is_repeat(name: str) -> bool:
    """Whether what PEFT does not ask for stands in the file under another name too, as `load_adapter` finds."""
    return ".modules_to_save." in name or name.endswith(TRAINED_ROWS)


def _attach(skeleton: Any, adapter: Path, config: LoraConfig) -> Any:
    # Initial values are of no interest, and some need the base's weights.
    config.init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrap_saved(copy.deepcopy(skeleton), adapter, config)


def _module_steps(model: Any, saved: set[str]) -> Iterator[tuple[str, Step, bool]]:
    """(parameter, step, whether it repeats a tied one) of every module that PEFT has changed."""
    tokens_at = {
        id(module.token_adapter): name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, TrainableTokensWrapper)
    }
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield from ((parameter, step, False) for parameter, step in _lora_steps(name, module))
        elif isinstance(module, ModulesToSaveWrapper):
            for part in module.modules_to_save[_NAME].state_dict():
                key = f"{PREFIX}{name}.{part}"
                if key in saved:
                    yield f"{name}.{part}", Step("replace", (key,)), False
        elif isinstance(module, TrainableTokensWrapper):
            tokens = module.token_adapter
            is_copy = tokens.tied_adapter is not None
            key = f"{PREFIX}{tokens_at[id(tokens.tied_adapter or tokens)]}.token_adapter.trainable_tokens_delta"
            yield f"{name}.weight", Step("rows", (key,), rows=tuple(tokens.token_indices[_NAME])), is_copy


def _lora_steps(name: str, layer: Any) -> Iterator[tuple[str, Step]]:
    base = layer.get_base_layer()
    is_embedding = isinstance(base, torch.nn.Embedding)
    is_linear = isinstance(base, torch.nn.Linear) or type(base).__name__ == "Conv1D"
    variant = layer.lora_variant.get(_NAME)
    is_dora = isinstance(variant, DoraLinearVariant | DoraEmbeddingVariant)
    if not (is_embedding or is_linear) or (variant is not None and not is_dora):
        raise ModelError(
            f"adapter: {type(variant or base).__name__} at {name} cannot be merged; serve the adapter as it is"
        )
    prefix = f"{PREFIX}{name}."
    parts: tuple[str, ...] = (
        ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    )
    if is_dora:
        parts = (*parts, "lora_magnitude_vector")
    yield (
        f"{name}.weight",
        Step(
            "dora" if is_dora else "lora",
            tuple(prefix + part for part in parts),
            float(layer.scaling[_NAME]),
            int(layer.r[_NAME]),
            is_embedding or bool(getattr(layer, "fan_in_fan_out", False)),
        ),
    )
    if layer.lora_bias[_NAME]:
        if is_dora or base.bias is None:
            raise ModelError(f"adapter: lora_bias at {name} cannot be merged; serve the adapter as it is")
        yield f"{name}.bias", Step("bias", (f"{prefix}lora_B.bias",), float(layer.scaling[_NAME]))
