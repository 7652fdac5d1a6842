"""Puts fused layers in place of PEFT's and transformers' forwards where they compute the same; elsewhere those stay.

Nothing is renamed or replaced: only the `forward` of single modules changes, so adapters are saved as PEFT names them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.kernels.lora import FourBit, Projection, lora_linears, native_linears, traced_lora_linear
from finetune.kernels.native import is_plain
from finetune.kernels.pointwise import rms_norm, rotate, silu_mul, takes_rotation
from finetune.models.heads import decoder_layers

ADAPTER = "default"

# Where a layer without memory keeps a `FourBit` of its own: the memory estimate's, for weights that it only measures.
STAND_IN = "four_bit_stand_in"

# Classes whose forward is x Wᵀ + b and nothing else.
PLAIN_LINEAR = ("Linear", "FalconLinear", "NonDynamicallyQuantizableLinear")

# Projections of one module that are applied to the same input, in the order in which it calls them.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Fused:
    """How many modules run a fused forward."""

    lora: int = 0
    left_to_peft: int = 0
    norms: int = 0
    mlps: int = 0
    rotations: int = 0
    frozen: int = 0


def fuse(model: PeftModel) -> Fused:
    """Replace the forwards that allow it. For a model whose layers are compiled: `models.compiled`."""
    count = Fused()
    grouped: set[torch.nn.Module] = set()
    frozen = set(_frozen_linears(model))
    shares_kv = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    for module in model.modules():
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            fits = not shares_kv and all(layer in frozen or _is_fusable_lora(layer) for layer in layers)
            if fits and any(isinstance(layer, LoraLayer) for layer in layers):
                _group(layers)
                grouped.update(layers)  # type: ignore[arg-type]
        if module in frozen:
            count.frozen += 1
            if module not in grouped:
                run_natively(module, type(module).forward)
        elif isinstance(module, LoraLayer):
            if not can_fuse(module):
                count.left_to_peft += 1
                continue
            count.lora += 1
            if module not in grouped:
                module.forward = MethodType(lora_forward, module)
        elif _is_rms_norm(module):
            module.forward = MethodType(_norm_forward, module)
            count.norms += 1
        elif _is_swiglu(module):
            module.forward = MethodType(_swiglu_forward, module)
            count.mlps += 1
        elif (rotating := _with_rotation(type(module).forward)) is not None:
            module.forward = MethodType(rotating, module)
            count.rotations += 1
    return count


def unfuse(model: PeftModel) -> None:
    """Give every module the forward of its class again: what `fuse` is compared with."""
    for module in model.modules():
        replaced = inspect.unwrap(getattr(vars(module).get("forward"), "__func__", None))  # type: ignore[arg-type]
        ours = (lora_forward, _frozen_forward, _grouped_forward, _norm_forward, _swiglu_forward, traced_lora_forward)
        if getattr(replaced, "func", replaced) in ours or _rotation_of(replaced) is _rotation:
            del module.forward


def can_fuse(layer: Any) -> bool:
    """Whether a PEFT layer is plain LoRA without dropout on a dense or 4-bit linear layer."""
    return (
        _is_plain_linear(layer.get_base_layer())
        and list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
    )


def _is_fusable_lora(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and can_fuse(layer)


def _is_plain_linear(base: Any) -> bool:
    return isinstance(base, torch.nn.Linear) and (type(base).__name__ in PLAIN_LINEAR or _is_4bit(base))


def _frozen_linears(model: PeftModel) -> Iterator[torch.nn.Module]:
    """The decoder's linear layers without an adapter: a recipe may name few targets."""
    bases = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for layer in decoder_layers(model):
        for module in layer.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if frozen and module not in bases and _is_plain_linear(module):
                yield module


def _is_4bit(base: torch.nn.Module) -> bool:
    return isinstance(base, _linear_4bit())


@cache
def _linear_4bit() -> type:
    from bitsandbytes.nn import Linear4bit

    found: type = Linear4bit
    return found


def _is_plain(layer: Any) -> bool:
    if not isinstance(layer, LoraLayer):
        return True
    return not layer.disable_adapters and not layer.merged and ADAPTER in layer.active_adapters


def projection(layer: Any) -> Projection:
    """What the kernels need of a PEFT LoRA layer, or of a linear layer without an adapter."""
    has_adapter = isinstance(layer, LoraLayer)
    base: Any = layer.base_layer if has_adapter else layer
    expand: Callable[[torch.dtype], torch.Tensor] = partial(expand_4bit if _is_4bit(base) else _dense, base)
    if has_adapter:
        a, b, scale = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
    else:
        device = base.weight.device
        a, b = torch.empty(0, base.in_features, device=device), torch.empty(base.out_features, 0, device=device)
        scale = 1.0
    return Projection(expand, base.bias, a, b, scale, partial(_stored_4bit, base))


def _stored_4bit(base: Any) -> FourBit | None:
    """A bitsandbytes layer's weight for the native kernels; None where they would read it otherwise than it is."""
    found: FourBit | None = vars(base).get(STAND_IN)  # a module's hasattr costs ten times as much
    if found is not None:
        return found
    if not _is_4bit(base):
        return None
    _attach_quant_state(base)
    state, data = base.weight.quant_state, base.weight.data
    if not is_plain(data) or not data.is_contiguous() or data.device.type != "cpu":
        return None
    rounds_alike = state.dtype in (torch.bfloat16, torch.float32)
    nested = state.state2 if state.nested else None
    blocks = (state.blocksize, 32 if nested is None else nested.blocksize)
    if not rounds_alike or any(block % 32 or block & (block - 1) for block in blocks) or state.shape[1] % 32:
        return None
    codes = data.view(torch.uint8)
    if nested is None:
        return FourBit(codes, state.code, state.absmax, block=state.blocksize)
    maxima = (state.absmax, nested.code, nested.absmax, state.offset)
    return FourBit(codes, state.code, None, *maxima, state.blocksize, nested.blocksize)


def _dense(base: Any, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = base.weight.to(dtype)
    return weight


def expand_4bit(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, D] that a bitsandbytes 4-bit layer stands for."""
    from finetune.models.four_bit import dequantize_4bit

    _attach_quant_state(base)
    return dequantize_4bit(base.weight.data.view(-1, 1), base.weight.quant_state).to(dtype)


def _attach_quant_state(base: Any) -> None:
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(base)


def lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A LoRA layer's forward as one node, or PEFT's own where that is not the same."""
    if args or kwargs or not isinstance(layer, LoraLayer) or not _is_plain(layer):
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    return lora_linears(x, [projection(layer)])[0]


def traced_lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A dense LoRA layer's forward for torch.compile, which compares by identity what is made for one layer alone."""
    if args or kwargs or not _is_plain(layer):
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    base, a, b = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return traced_lora_linear(x, base.weight, base.bias, a, b, layer.scaling[ADAPTER])


def run_natively(module: Any, otherwise: Callable[..., torch.Tensor]) -> None:
    """Let a linear layer without an adapter run the native kernel, and `otherwise` where that does not compute it."""
    module.forward = MethodType(partial(_frozen_forward, otherwise=otherwise), module)


def is_frozen_forward(forward: Any) -> bool:
    """Whether `run_natively` made it."""
    return getattr(getattr(forward, "__func__", None), "func", None) is _frozen_forward


def _frozen_forward(module: Any, x: torch.Tensor, *, otherwise: Callable[..., torch.Tensor]) -> torch.Tensor:
    found = native_linears(x, [projection(module)])
    return otherwise(module, x) if found is None else found[0]


@dataclass
class _Pending:
    """Outputs that the first layer of a group computed for the others."""

    x: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)


def _group(layers: list[Any]) -> None:
    pending = _Pending()
    for index, layer in enumerate(layers):
        layer.forward = MethodType(partial(_grouped_forward, layers=layers, index=index, pending=pending), layer)


def _grouped_forward(
    layer: Any, x: torch.Tensor, *args: Any, layers: list[Any], index: int, pending: _Pending, **kwargs: Any
) -> torch.Tensor:
    if index == 0 and not args and not kwargs and all(_is_plain(other) for other in layers):
        outputs = lora_linears(x, [projection(other) for other in layers])
        pending.x, pending.outputs = x, dict(enumerate(outputs))
        return pending.outputs.pop(0)
    # The very same tensor, or it was not the call that the first layer saw.
    if x is pending.x and index in pending.outputs:
        out = pending.outputs.pop(index)
        if not pending.outputs:
            pending.x = None
        return out
    return lora_forward(layer, x, *args, **kwargs)


def _is_rms_norm(module: torch.nn.Module) -> bool:
    """Whether a frozen norm's own forward gives what `rms_norm` gives: names vary, and some scale by 1 + weight."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.requires_grad:
        return False
    if weight.is_meta:
        # Without its weights, ones stand for them: what the class computes is the same.
        module = copy.deepcopy(module).to_empty(device="cpu")
        weight = torch.ones_like(weight, device="cpu")
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        return torch.allclose(module(x), rms_norm(x, weight, _eps(module)), rtol=1e-2, atol=1e-3)


def _eps(module: Any) -> float:
    eps: float = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 1e-6
    return eps


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, _eps(module))


def _is_swiglu(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)) and nothing else."""
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    return isinstance(module.act_fn, torch.nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"


def _swiglu_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module.down_proj(silu_mul(module.gate_proj(x), module.up_proj(x)))
    return out


# The name by which transformers' attention modules call their rotary embedding.
ROTARY = "apply_rotary_pos_emb"


def _rotation_of(forward: Any) -> Any:
    """The rotary function that a forward calls by `ROTARY`; None if it calls none."""
    code = getattr(forward, "__code__", None)
    found = forward.__globals__.get(ROTARY) if code is not None and ROTARY in code.co_names else None
    return getattr(found, "func", found)


def _rotates_halves(theirs: Any) -> bool:
    """Whether a model's rotary function rotates the halves of its heads: some rotate pairs instead."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 3, 8, generator=generator, device="cpu")
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator, device="cpu")
    try:
        got = theirs(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError):
        return False
    halves = [torch.cat((-x[..., 4:], x[..., :4]), -1) for x in (q, k)]
    return all(torch.allclose(a, x * cos + h * sin) for a, x, h in zip(got, (q, k), halves, strict=True))


@cache
def _with_rotation(forward: Any) -> FunctionType | None:
    """The same function, but what it calls by `ROTARY` is `_rotation`; None where that would be another.

    The module that defines it stays as it is. Cached: all layers of a model have one class.
    """
    theirs = _rotation_of(forward)
    if theirs is None or "position_embeddings" not in forward.__code__.co_varnames or not _rotates_halves(theirs):
        return None
    own = {**forward.__globals__, ROTARY: partial(_rotation, theirs)}
    changed = FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


def _rotation(theirs: Any, q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not all(takes_rotation(x, cos, sin) for x in (q, k)):
        return theirs(q, k, cos, sin, *args, **kwargs)
    return rotate(q, cos, sin), rotate(k, cos, sin)
