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
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.kernels.lora import lora_linears, native_linears, traced_lora_linear
from finetune.kernels.pointwise import rms_norm, rotate, silu_mul, takes_rotation
from finetune.models.fused_layers import GATE_UP, QKV, layer_forward, norm_of, run_whole
from finetune.models.heads import decoder_layers
from finetune.models.projections import (
    ADAPTER,
    can_fuse,
    decodes_4bit,
    is_active,
    is_fusable_lora,
    is_plain_linear,
    projection,
)

# Projections of one module that are applied to the same input, in the order in which it calls them.
GROUPS = (QKV, GATE_UP)


@dataclass
class Fused:
    """How many modules run a fused forward."""

    lora: int = 0
    left_to_peft: int = 0
    norms: int = 0
    mlps: int = 0
    rotations: int = 0
    layers: int = 0
    frozen: int = 0


def fuse(model: PeftModel, *, on_cpu: bool = True) -> Fused:
    """Replace the forwards that allow it, for computing on a CPU or not.

    For a model whose layers are compiled: `models.compiled`.
    """
    count = Fused()
    grouped: set[torch.nn.Module] = set()
    frozen = set(_frozen_linears(model))
    fused: set[torch.nn.Module] = set(frozen)
    shares_kv = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    for module in model.modules():
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            fits = not shares_kv and all(layer in frozen or is_fusable_lora(layer) for layer in layers)
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
        elif _is_frozen_layer_norm(module):
            module.forward = MethodType(_layer_norm_forward, module)
        elif (rotating := _with_rotation(type(module).forward)) is not None:
            module.forward = MethodType(rotating, module)
            count.rotations += 1
        else:
            continue
        fused.add(module)
    if on_cpu and not shares_kv:
        count.layers = run_whole(decoder_layers(model), fused)
    return count


def unfuse(model: PeftModel) -> None:
    """Give every module the forward of its class again: what `fuse` is compared with."""
    for module in model.modules():
        replaced = inspect.unwrap(getattr(vars(module).get("forward"), "__func__", None))  # type: ignore[arg-type]
        if getattr(replaced, "func", replaced) in _replacements() or _rotation_of(replaced) is _rotation:
            del module.forward


def _replacements() -> tuple[Callable[..., Any], ...]:
    linears = (lora_forward, traced_lora_forward, _frozen_forward, _grouped_forward)
    return (*linears, _norm_forward, _layer_norm_forward, _swiglu_forward, layer_forward)


def _frozen_linears(model: PeftModel) -> Iterator[torch.nn.Module]:
    """The decoder's linear layers without an adapter: a recipe may name few targets."""
    bases = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for layer in decoder_layers(model):
        for module in layer.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if frozen and module not in bases and is_plain_linear(module):
                yield module


def lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A LoRA layer's forward as one node, or PEFT's own where that is not the same."""
    if args or kwargs or not isinstance(layer, LoraLayer) or not is_active(layer) or decodes_4bit(layer, x):
        out: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    return lora_linears(x, [projection(layer)])[0]


def traced_lora_forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A dense LoRA layer's forward for torch.compile, which compares by identity what is made for one layer alone."""
    if args or kwargs or not is_active(layer):
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
    if index == 0 and not args and not kwargs and all(map(is_active, layers)) and not decodes_4bit(layer, x):
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


def forget_pending(model: torch.nn.Module) -> None:
    """Let go of what a pass that failed between the layers of a group left for the others: it holds the pass's graph.

    For whoever computes again in the memory of a pass that did not fit.
    """
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "__func__", None)
        pending = getattr(forward, "keywords", {}).get("pending")
        if pending is not None:
            pending.x = None
            pending.outputs.clear()


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
        return torch.allclose(module(x), rms_norm(x, *norm_of(module)), rtol=1e-2, atol=1e-3)


def _norm_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, *norm_of(module))


def _is_frozen_layer_norm(module: torch.nn.Module) -> bool:
    # The exact class: others may compute something else.
    return type(module) is torch.nn.LayerNorm and not any(p.requires_grad for p in module.parameters())


def _layer_norm_forward(module: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """In x's dtype under autocast too, which on CUDA makes and keeps an fp32 copy of x for each norm.

    The kernel takes mean and variance in fp32 whatever the dtype. On a CPU autocast leaves layer norms alone.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype not in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    weight, bias = module.weight, module.bias
    if device != "cpu":  # whose kernel alone takes parameters in fp32 beside x in half precision
        weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))  # type: ignore[assignment]
    with torch.autocast(device, enabled=False):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _is_swiglu(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)) and nothing else, in training too.

    Compared by values, on a copy whose products are none: others clamp, scale or drop out, under the same names.
    """
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or any(module.named_parameters(recurse=False)):
        return False
    if not isinstance(module.act_fn, torch.nn.SiLU) and type(module.act_fn).__name__ != "SiLUActivation":
        return False
    copied = object.__new__(type(module))
    products = {"gate_proj": torch.clone, "up_proj": partial(torch.flip, dims=(0,)), "down_proj": torch.clone}
    copied.__dict__.update(module.__dict__, **products, _modules={"act_fn": module.act_fn}, training=True)
    # Up to where any clamp would be; so many values that some are dropped.
    x = torch.linspace(-1000, 1000, 4097, dtype=torch.float32, device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            got = type(module).forward(copied, x)
        except (TypeError, RuntimeError, IndexError):
            return False
    return torch.allclose(got, silu_mul(x, x.flip(0)), rtol=1e-4)


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
