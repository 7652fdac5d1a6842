"""The plan of a merge: every weight of the merged model, and what of the adapter changes it. Loads no weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import AutoHfQuantizer

from finetune.errors import ModelError
from finetune.export.merge_files import BaseFiles, TensorInfo
from finetune.export.merge_steps import Step, read_steps
from finetune.models.load import quantization_config, use_plain_linears
from finetune.models.saved import read_config, vocabulary_size
from finetune.recipe.schema import ModelSection


@dataclass(frozen=True)
class Weight:
    """One tensor of the merged model."""

    info: TensorInfo  # as it is written
    source: str  # the base's tensor
    parameter: str | None  # its name in the model; None for a tensor that the model does not know
    steps: tuple[Step, ...] = ()
    quantized: bool = False  # held in few bits while the adapter was trained
    transposed: bool = False  # stored [I, O]
    resized: bool = False  # has rows for added tokens

    @property
    def is_touched(self) -> bool:
        """Whether the adapter changes it."""
        return bool(self.steps) or self.resized

    @property
    def is_replaced(self) -> bool:
        """Whether nothing of the base's values is left."""
        return any(step.kind == "replace" for step in self.steps)


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, in the order of the base's files."""

    weights: tuple[Weight, ...]
    tied: bool  # the head is the embedding, and is not among the weights
    pair: tuple[str, str] | None  # written names of embedding and head that were tied and need not be any more
    vocab_size: int

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(weight.info.num_bytes for weight in self.weights)

    def without_head(self) -> MergePlan:
        """The plan where embedding and head turned out equal: tied again."""
        assert self.pair is not None
        kept = tuple(weight for weight in self.weights if weight.info.name != self.pair[1])
        return replace(self, weights=kept, tied=True, pair=None)


def build_plan(
    files: BaseFiles, config: Any, model: ModelSection, adapter: Path, num_tokens: int, dtype: torch.dtype
) -> MergePlan:
    """What merging `adapter` into `files` changes; `num_tokens` is the length of the tokenizer.

    Raises:
        ModelError: the adapter does not fit the model (a shape, a tensor too many or too few), or the kind of
            adapter or the way the base is stored cannot be merged.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.name: {model.name} is stored quantized, so there are no whole weights to merge into; name the "
            "model that it was made of, in the recipe or in adapter_config.json (base_model_name_or_path)"
        )
    skeleton = _skeleton(config, model, max(num_tokens, config.get_text_config().vocab_size))
    if rows := vocabulary_size(skeleton, adapter, read_config(adapter)):
        skeleton = _skeleton(config, model, rows)
    steps = read_steps(skeleton, adapter)
    quantized = _quantized_parameters(config, model)
    stored = stored_names(files, skeleton)
    state = skeleton.state_dict()
    weights = []
    for name, info in files.tensors.items():
        parameter = stored.get(name)
        if parameter is None or parameter not in state:
            weights.append(Weight(info, name, None))
            continue
        shape = tuple(state[parameter].shape)
        if not any(step.kind == "replace" for step in steps.get(parameter, ())):
            _check_shape(name, info, shape)
        weights.append(
            Weight(
                info=TensorInfo(name, shape, _written_dtype(info, skeleton, parameter, dtype)),
                source=name,
                parameter=parameter,
                steps=steps.get(parameter, ()),
                quantized=parameter in quantized,
                transposed=type(skeleton.get_submodule(parameter.rpartition(".")[0])).__name__ == "Conv1D",
                resized=info.shape != shape,
            )
        )
    vocab_size = int(skeleton.get_input_embeddings().weight.shape[0])
    plan = _tie(MergePlan(tuple(weights), False, None, vocab_size), skeleton, steps, files)
    reached = {weight.parameter for weight in plan.weights} | ({_names(skeleton)[1]} if plan.tied else set())
    missed = sorted((steps.keys() | quantized) - reached)
    if missed:
        raise ModelError(
            f"model.name: {model.name} does not store {missed[0]} as one tensor, so the adapter cannot be merged "
            f"into it ({len(missed)} weights); serve the adapter as it is"
        )
    return plan


def _tie(plan: MergePlan, skeleton: Any, steps: Mapping[str, tuple[Step, ...]], files: BaseFiles) -> MergePlan:
    """`plan` with one tensor for embedding and head if the same changes reach both, with two if not."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return plan
    names = _names(skeleton)
    found = [next((w for w in plan.weights if w.parameter == name), None) for name in names]
    stored = [weight for weight in found if weight is not None]
    if len(stored) == 2 and not torch.equal(files.read(stored[0].source), files.read(stored[1].source)):
        # transformers does not tie these either, whatever the configuration says.
        return plan
    others = tuple(weight for weight in plan.weights if weight not in stored)
    if steps.get(names[0], ()) == steps.get(names[1], ()):
        return replace(plan, weights=(stored[0], *others), tied=True)
    two = tuple(
        weight
        or replace(stored[0], info=replace(stored[0].info, name=name), parameter=name, steps=tuple(steps.get(name, ())))
        for weight, name in zip(found, names, strict=True)
    )
    return replace(plan, weights=(*two, *others), pair=(two[0].info.name, two[1].info.name))


def _names(skeleton: Any) -> tuple[str, str]:
    """Parameter names of the input and output embeddings' weights."""
    modules = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    return f"{modules[id(embedding)]}.weight", f"{modules[id(head)]}.weight"


def _skeleton(config: Any, model: ModelSection, rows: int) -> Any:
    """The model without weights, its embeddings resized as training resizes them."""
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = rows
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def stored_names(files: BaseFiles, skeleton: Any) -> dict[str, str]:
    """Names in the files to names in the model, as transformers reads them; what it assembles is left out."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = skeleton.state_dict()
    found = {}
    for name in files.tensors:
        parameter, assembled = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, state)
        if assembled is None:
            found[name] = parameter
    return found


def _quantized_parameters(config: Any, model: ModelSection) -> set[str]:
    """Weights that transformers quantizes with the recipe's settings."""
    # Which weights they are follows from no precision.
    settings = quantization_config(model, "bf16-mixed", shardable=False)
    if settings is None:
        return set()
    use_plain_linears()
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=model.trust_remote_code)
    plain = {name for name, module in skeleton.named_modules() if _is_bitsandbytes(module)}
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=skeleton, dtype=torch.float32, device_map={"": "cpu"})
    names = {name for name, module in skeleton.named_modules() if _is_bitsandbytes(module)}
    return {f"{name}.weight" for name in names - plain}


def _is_bitsandbytes(module: Any) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _check_shape(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape and (info.shape[1:] != shape[1:] or info.shape[0] > shape[0]):
        raise ModelError(f"model.name: {name} has shape {info.shape} on disk and {shape} in the model")


def _written_dtype(info: TensorInfo, skeleton: Any, parameter: str, dtype: torch.dtype) -> torch.dtype:
    if not info.dtype.is_floating_point:
        return info.dtype
    kept = {*(skeleton._keep_in_fp32_modules or ()), *(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())}
    is_kept = any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", parameter) for name in kept)
    return torch.float32 if is_kept else dtype
