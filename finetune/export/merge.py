"""A base model and an adapter become one model on disk: planned, checked against each other, then streamed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.console import progress_bar
from finetune.errors import BadInputError, FinetuneError, ModelError
from finetune.export.merge_config import write_configs
from finetune.export.merge_files import BaseFiles, read_tensor, write_shards
from finetune.export.merge_plan import MergePlan, Weight, build_plan
from finetune.export.merge_steps import Step
from finetune.export.merge_weights import LowRank, Rounding, add_low_rank, add_rows
from finetune.models.adapters import WEIGHTS_NAME
from finetune.models.load import DTYPES, base_dtype, load_config
from finetune.models.sources import ModelSource
from finetune.models.tokenizer_files import save_tokenizer
from finetune.recipe.schema import Recipe

Base = Literal["original", "dequantized"]

# Configuration files and the file system's own needs.
_SPARE_BYTES = 64_000_000


def choose_base(recipe: Recipe, wanted: str) -> Base:
    """What the adapter is added to: `wanted`, or for `auto` the weights that it was trained on.

    `original` is the published weights, `dequantized` what the quantized layers stood for, expanded to 16 bits.
    A quantized base's rounding errors are part of what the adapter has learned to correct, so adding it to
    the original weights leaves a correction of errors that are not there.

    Raises:
        BadInputError: `dequantized` for a base that was not quantized.
    """
    is_quantized = recipe.model.quantization != "none"
    if wanted == "auto":
        return "dequantized" if is_quantized else "original"
    if wanted == "dequantized" and not is_quantized:
        raise BadInputError("merge.base: dequantized, but model.quantization is none; use original")
    return "original" if wanted == "original" else "dequantized"


@dataclass(frozen=True)
class Merge:
    """A merge that can be done; nothing is written and no weight is loaded before `write`."""

    recipe: Recipe
    source: ModelSource
    adapter: Path
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    base: Base
    dtype: str  # auto, bf16, fp16 or fp32
    device: torch.device | str = "cpu"  # where the base was quantized
    residuals: Mapping[str, torch.Tensor] | None = None  # base weights that the adapter's initial values changed

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the merged weights; auto is that of the base while the adapter was trained."""
        own = base_dtype(self.recipe.model, self.recipe.training.precision)
        return own if self.dtype == "auto" else DTYPES[self.dtype]

    @cached_property
    def files(self) -> BaseFiles:
        """The base's weights on disk."""
        return BaseFiles(self.source)

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        return load_config(self.recipe.model, self.source)

    @cached_property
    def plan(self) -> MergePlan:
        """Every tensor that is written; building it checks the adapter against the base."""
        model = self.recipe.model
        return build_plan(self.files, self.config, model, self.adapter, len(self.tokenizer), self.torch_dtype)

    def check_disk(self, folder: Path) -> None:
        """Whether the merged model fits where `folder` will be.

        Raises:
            FinetuneError: it does not.
        """
        parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        need, free = self.plan.num_bytes + _SPARE_BYTES, shutil.disk_usage(parent).free
        if free < need:
            raise FinetuneError(
                f"{folder}: the merged model takes {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
                "free some space, give --out on another disk, or a smaller --dtype"
            )

    def write(self, folder: Path) -> MergePlan:
        """Write weights, configuration and tokenizer into `folder`; the plan that was carried out is returned.

        Memory stays at a few tensors. Embedding and head are tied again where they come out equal.

        Raises:
            FinetuneError: a merged weight is not finite.
        """
        plan = self.plan
        if plan.pair is not None and self._is_equal_pair(plan, plan.pair):
            plan = plan.without_head()
        by_name = {weight.info.name: weight for weight in plan.weights}
        infos = [weight.info for weight in plan.weights]
        with progress_bar("merging", len(infos)) as bar:

            def merged(name: str) -> torch.Tensor:
                bar.advance()
                return self.tensor(by_name[name], self.base)

            write_shards(folder, infos, merged)
        write_configs(folder, self.config, self.source, self.torch_dtype, plan, self.tokenizer, self.stop_token_ids)
        save_tokenizer(self.tokenizer, folder)
        return plan

    def rounded_weights(self, base: Base) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter, merged value on `base`) of every weight for which the two bases differ."""
        for weight in self.plan.weights:
            if weight.quantized and weight.parameter is not None:
                yield weight.parameter, self.tensor(weight, base)

    def tensor(self, weight: Weight, base: Base) -> torch.Tensor:
        """One merged weight: read, rounded if `base` says so, changed in fp32, cast once.

        Raises:
            FinetuneError: a value is not finite.
        """
        value = self._base_value(weight, base)
        for step in weight.steps:
            value = self._apply(step, value, weight.info.dtype)
        value = value.to(weight.info.dtype)
        if weight.is_touched and not torch.isfinite(value).all():
            raise FinetuneError(
                f"{weight.info.name}: merged values are not finite; the adapter is damaged, or too large for "
                f"{weight.info.dtype}: try --dtype bf16"
            )
        return value

    def _base_value(self, weight: Weight, base: Base) -> torch.Tensor:
        residual = (self.residuals or {}).get(weight.parameter or "")
        if residual is not None:
            return residual
        value = self.files.read(weight.source)
        if weight.quantized and base == "dequantized":
            own = base_dtype(self.recipe.model, self.recipe.training.precision)
            value = Rounding(self.recipe.model, own, self.device)(value, transposed=weight.transposed)
        return add_rows(value, weight.info.shape[0]) if weight.resized and not weight.is_replaced else value

    def _apply(self, step: Step, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        parts = [read_tensor(self.adapter / WEIGHTS_NAME, name) for name in step.tensors]
        if step.kind in ("lora", "dora"):
            update = LowRank(parts[0], parts[1], step.scale, parts[2] if step.kind == "dora" else None)
            return add_low_rank(value, update, dtype, transposed=step.transposed)
        if step.kind == "bias":
            return value.float().add(parts[0].float(), alpha=step.scale)
        if step.kind == "replace":
            return parts[0]
        return value.to(dtype).index_copy(0, torch.tensor(step.rows), parts[0].to(dtype))

    def _is_equal_pair(self, plan: MergePlan, pair: tuple[str, str]) -> bool:
        both = [weight for weight in plan.weights if weight.info.name in pair]
        return torch.equal(self.tensor(both[0], self.base), self.tensor(both[1], self.base))


def residual_weights(merge: Merge, model: Any) -> Merge:
    """`merge` with the base weights of `model`, whose adapter's initial values (PiSSA, OLoRA) were taken off them.

    The model stays in memory while it is merged.

    Raises:
        ModelError: a weight that the adapter changes is not in the model.
    """
    found: dict[str, torch.Tensor] = {}
    for weight in merge.plan.weights:
        if weight.parameter is None or not any(step.kind in ("lora", "dora") for step in weight.steps):
            continue
        try:
            layer = model.get_base_model().get_submodule(weight.parameter.rpartition(".")[0])
            found[weight.parameter] = layer.get_base_layer().weight.detach().cpu()
        except AttributeError as error:
            raise ModelError(f"model.name: the loaded model has no adapter at {weight.parameter}") from error
    return replace(merge, residuals=found)
