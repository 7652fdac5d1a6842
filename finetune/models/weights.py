"""How many bytes a model's weights take: stored as the recipe says, by part, and over several devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.models.heads import decoder_layers
from finetune.models.skeleton import is_quantized_linear
from finetune.recipe.schema import QUANTIZED_4BIT, ModelSection, OptimizerSection

# Source: bitsandbytes 0.50, functional.quantize_4bit and optim.optimizer.
BLOCK = 64  # 4-bit weights that share a scale
NESTED_BLOCK = 256  # scales that share a second scale, with double quantization
CODES_BYTES = 16 * 4
NESTED_CODES_BYTES = 256 * 4 + 4
MIN_8BIT_ELEMENTS = 4096  # smaller parameters keep an fp32 optimizer state


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the frozen base by where they lie, and the sizes of what is trained."""

    blocks: int  # weights of all decoder layers
    largest_block: int
    rest: int  # embeddings, head, last norm
    constants: int  # scales of quantized weights: never sharded
    trainable: tuple[tuple[int, ...], ...]  # shapes
    num_parameters: int  # of the base
    num_blocks: int

    @property
    def base(self) -> int:
        """Weights of the base without constants."""
        return self.blocks + self.rest

    @property
    def num_trainable(self) -> int:
        """Trained elements."""
        return sum(_numel(shape) for shape in self.trainable)


def count_weights(model: torch.nn.Module, section: ModelSection) -> WeightBytes:
    """Count an adapted model, real or a skeleton; shared parameters count once."""
    causal_lm: Any = model.get_base_model()  # type: ignore[operator]
    head = causal_lm.get_output_embeddings()
    blocks = decoder_layers(causal_lm)
    in_block = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    quantized = set()
    if section.quantization != "none":
        quantized = {
            id(module.weight) for name, module in causal_lm.named_modules() if is_quantized_linear(module, name, head)
        }
    by_block = [0] * len(blocks)
    rest = constants = num_parameters = 0
    trainable = []
    for parameter in dict.fromkeys(causal_lm.parameters()):
        if parameter.requires_grad:
            trainable.append(tuple(parameter.shape))
            continue
        count = parameter.numel()
        num_parameters += count
        size = count * parameter.element_size()
        if id(parameter) in quantized:
            size, extra = quantized_bytes(parameter.shape, section)
            constants += extra
        if id(parameter) in in_block:
            by_block[in_block[id(parameter)]] += size
        else:
            rest += size
    return WeightBytes(sum(by_block), max(by_block), rest, constants, tuple(trainable), num_parameters, len(blocks))


def quantized_bytes(shape: torch.Size | tuple[int, ...], section: ModelSection) -> tuple[int, int]:
    """Bytes of a quantized [O, D] weight and of its constants."""
    count = _numel(tuple(shape))
    if section.quantization not in QUANTIZED_4BIT:
        return count, 4 * shape[0]
    scales = -(-count // BLOCK)
    if not section.double_quant:
        return -(-count // 2), 4 * scales + CODES_BYTES
    return -(-count // 2), scales + 4 * -(-scales // NESTED_BLOCK) + CODES_BYTES + NESTED_CODES_BYTES


def optimizer_bytes(shapes: tuple[tuple[int, ...], ...], section: OptimizerSection) -> int:
    """State of the recipe's optimizer over fp32 parameters of these shapes."""
    return sum(OPTIMIZER_STATE[section.name](shape) for shape in shapes)


def _adamw(shape: tuple[int, ...]) -> int:
    return 8 * _numel(shape)


def _paged_adamw_8bit(shape: tuple[int, ...]) -> int:
    return 2 * _state_8bit(shape)


def _lion(shape: tuple[int, ...]) -> int:
    return 4 * _numel(shape)


def _state_8bit(shape: tuple[int, ...]) -> int:
    count = _numel(shape)
    return 4 * count if count < MIN_8BIT_ELEMENTS else count + 4 * -(-count // 256)


def _adafactor(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 4 * _numel(shape)
    rows = _numel(shape[:-1])
    return 4 * (rows + _numel((*shape[:-2], shape[-1])))


OPTIMIZER_STATE = {
    "adamw": _adamw,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "lion": _lion,
    "paged_lion_8bit": _state_8bit,
    "adafactor": _adafactor,
}


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
