"""What one forward and backward pass holds in memory, found by running this project's own code on fake tensors.

Fake tensors have shapes and no data, so autocast, fused layers, checkpointing and the chunked loss run as they do in
training, and every tensor is counted from its birth to its release. Two short models give the cost of a layer.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from finetune.errors import FinetuneError, ModelError, first_line
from finetune.kernels import native, products
from finetune.kernels.attention import packed_row
from finetune.kernels.layout import RowLayout
from finetune.kernels.lora import FourBit, unchanged_adapters
from finetune.kernels.traced import traced
from finetune.models.fused import fuse, is_frozen_forward, run_natively
from finetune.models.heads import checkpoint_layers, supervised_loss
from finetune.models.isolation import hidden_states
from finetune.models.projections import STAND_IN
from finetune.models.skeleton import adapt_skeleton, build_skeleton, is_quantized_linear
from finetune.recipe.schema import QUANTIZED_4BIT, LoraSection, ModelSection

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


# From this size on, glibc maps an allocation by itself and gives it back whole (mallopt(3), M_MMAP_THRESHOLD).
MAPPED_BYTES = 32 * 2**20


class NoEstimateError(ModelError):
    """A model whose work depends on its data, such as experts that tokens choose, cannot be run without data."""


@dataclass(frozen=True)
class ForwardPass:
    """The largest forward pass of a process: B rows of T tokens, N of them supervised."""

    rows: int
    tokens: int
    supervised: int
    layout: RowLayout | None = None  # None: padded rows


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the weights. The peaks contain what is kept, and no scratch."""

    kept: float  # from the forward pass for the backward pass
    forward_peak: float
    loss_peak: float
    backward_peak: float
    passing: float  # what the forward pass allocates and gives back, of tensors below MAPPED_BYTES: glibc keeps holes
    scratch: float = 0.0  # what native kernels keep from call to call

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.forward_peak, self.loss_peak, self.backward_peak)


def between(kept: Footprint, recomputed: Footprint, share: float) -> Footprint:
    """The footprint where this share of the layers is recomputed and the others are kept."""

    def mixed(name: str) -> float:
        first, second = getattr(kept, name), getattr(recomputed, name)
        return float(first + (second - first) * share)

    base = mixed("kept")
    peaks = {
        # The kept layers are the last: their activations are gone when the others are computed again.
        name: max(base + getattr(kept, name) - kept.kept, getattr(recomputed, name))
        for name in ("forward_peak", "loss_peak", "backward_peak")
    }
    return Footprint(kept=base, passing=mixed("passing"), scratch=mixed("scratch"), **peaks)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made within it and are still alive."""

    def __init__(self, existing: Iterator[torch.Tensor], on_cpu: bool) -> None:
        super().__init__()
        self._widens = on_cpu and not products.has_bf16_units()
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in existing})
        self.live = self.peak = self.passed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._widens and (copies := products.widened_bytes(func._schema.name, args, out)):
            self.peak = max(self.peak, self.live + copies)
            # Where torch computes every product, each takes the last one's room.
            self.passed += copies if native.computes_products() else 0
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self._add(size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._add, -size).atexit = False

    def _add(self, size: int) -> None:
        self.live += size
        if -MAPPED_BYTES < size < 0:
            self.passed -= size


def measure_pass(
    config: Any,
    model: ModelSection,
    adapter: LoraSection,
    *,
    precision: str,
    checkpointing: bool,
    attention_name: str,
    step: ForwardPass,
    on_cpu: bool,
) -> Footprint:
    """The footprint of the whole model: that of two short ones, continued to all its layers.

    Raises:
        ModelError: if the model or the adapter's targets cannot be built.
        NoEstimateError: if the model cannot be run without data.
    """
    num_layers = config.get_text_config().num_hidden_layers
    short, long = min(2, num_layers), min(4, num_layers)
    try:
        one, two = (
            _measure_short(config, model, adapter, precision, checkpointing, attention_name, step, layers, on_cpu)
            for layers in (short, long)
        )
    except FinetuneError:
        raise
    except Exception as error:
        raise NoEstimateError(
            f"the memory of {config.model_type} cannot be told without its data: {first_line(error)}"
        ) from error
    if short == long:
        return one
    scale = (num_layers - short) / (long - short)
    values = zip(vars(one).values(), vars(two).values(), strict=True)
    return Footprint(*(first + (second - first) * scale for first, second in values))


def _measure_short(
    config: Any,
    model: ModelSection,
    adapter: LoraSection,
    precision: str,
    checkpointing: bool | int,
    attention_name: str,
    step: ForwardPass,
    num_layers: int,
    on_cpu: bool,
) -> Footprint:
    base = build_skeleton(config, model, precision=precision, attention_name=attention_name, num_layers=num_layers)
    checkpoint_layers(base, checkpointing)
    # Trained tokens need the tokenizer and are few rows; here they would only add a copy of the embedding.
    adapted = adapt_skeleton(base, adapter.model_copy(update={"trainable_tokens": []}), None)
    fused = fuse(adapted)
    autocast: AbstractContextManager[Any] = nullcontext()
    if precision in AUTOCAST:
        autocast = torch.autocast("cpu", dtype=AUTOCAST[precision])
    kernels = traced("cpu" if on_cpu else "cuda")  # after `fuse`, which computes to tell norms apart
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet_rng(), _prompt_collection(), kernels as trace:
        adapted.to_empty(device="cpu")
        if model.quantization != "none":
            _expand_when_used(base, model.quantization, compute=AUTOCAST.get(precision, base.dtype))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        found = _run(base, step, autocast, on_cpu)
        is_native = on_cpu and precision.startswith("bf16") and native.computes_products()
        if checkpointing is True and fused.layers == num_layers and is_native and step.layout is not None:
            # Each gives back what it took in one piece, which the next one takes: 838 MB measured, 836 counted so.
            found = replace(found, passing=0.0)
        return replace(found, scratch=float(sum(trace.kept.values())))


def _run(base: Any, step: ForwardPass, autocast: AbstractContextManager[Any], on_cpu: bool) -> Footprint:
    shape = (step.rows, step.tokens)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros(step.supervised, dtype=torch.int64)
    grads = [p.grad for p in base.parameters() if p.grad is not None]
    live = _LiveBytes(iter([*base.parameters(), *base.buffers(), *grads]), on_cpu)
    with live, autocast, packed_row(step.layout), unchanged_adapters():
        hidden = hidden_states(base, input_ids, position_ids, step.layout)
        kept, passing, forward_peak = live.live, live.passed, live.take_peak()
        loss = supervised_loss(base, hidden, positions, targets=positions)
        loss_peak = live.take_peak()
        del hidden
        loss.backward()
    return Footprint(kept, forward_peak, loss_peak, live.take_peak(), passing)


@contextmanager
def _quiet_rng() -> Iterator[None]:
    """Dropout on fake tensors draws from the real generator: put it back."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _prompt_collection() -> Iterator[None]:
    """Collect cycles at once: fake tensors lie in some, and would count until Python happens to look.

    What imports left frozen (`models.startup`) stays so: each full collection would take half a second again.
    """
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()


def _expand_when_used(base: Any, quantization: str, *, compute: torch.dtype) -> None:
    """Give layers that are quantized a weight of another dtype, so that each use makes a copy in the compute dtype.

    The native kernels make none of a 4-bit weight: they are given a stand-in for it.
    """
    stored = torch.bfloat16 if compute == torch.float32 else torch.float32
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if is_quantized_linear(module, name, head):
            weight = torch.empty(module.weight.shape, dtype=stored)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            if quantization in QUANTIZED_4BIT:
                setattr(module, STAND_IN, FourBit(weight, weight, weight))
            if "forward" not in vars(module):
                module.forward = MethodType(_expanding_forward, module)
            elif is_frozen_forward(module.forward):
                run_natively(module, _expanding_forward)


def _expanding_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    out: torch.Tensor = _Expanded.apply(x.to(dtype), module.weight, module.bias)
    return out


class _Expanded(torch.autograd.Function):
    """A frozen quantized layer: it keeps no input, and expands its weight in both directions."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        return grad @ ctx.weight.to(grad.dtype), None, None
