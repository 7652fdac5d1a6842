"""A model whose weights stay on disk: a forward pass reads each layer's just before it computes, and then drops them.

The model is built without weights. Hooks fill the embedding, one decoder layer after the other, the last norm and the
head, quantized as training quantizes them; adapters and buffers stay in memory. Memory is that of one layer, or of
the head.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.quantizers import AutoHfQuantizer

from finetune.kernels.products import multiply_in_fp32
from finetune.machine import trim_freed_memory
from finetune.models.adapters import init_off_the_base, load_adapter
from finetune.models.heads import decoder_layers
from finetune.models.load import quantization_config
from finetune.models.saved import base_tensors, fit_saved, read_config, vocabulary_size, wrap_saved
from finetune.recipe.schema import ModelSection

T = TypeVar("T")
# Where a quantized layer keeps what belongs to its weight.
_STATE = ("quant_state", "state")


class NotStreamableError(Exception):
    """A model that has to be loaded whole; the text says why."""


class StreamedModel:
    """`model` (a PeftModel, or `causal_lm` itself) whose weights are read when a forward pass comes to them."""

    def __init__(self, model: Any, causal_lm: Any, units: Sequence[Unit], device: torch.device) -> None:
        """Hook the modules of `units`; `device` is where everything computes."""
        self.model, self.causal_lm, self.device = model, causal_lm, device
        self.num_units = len(units)
        self._loaded: Unit | None = None
        self._steps: _Steps | None = None
        self._pass = threading.local()
        self._on_layer: Callable[[], object] = int
        for unit in units:
            module = causal_lm.get_submodule(unit.name)
            module.register_forward_pre_hook(partial(self._enter, unit))

    def run(
        self,
        calls: Sequence[Callable[[], T]],
        adapted: Sequence[bool] | None = None,
        on_layer: Callable[[], object] = int,
    ) -> list[T]:
        """What each of `calls` returns; all take a layer together, so that its weights are read once for all.

        They go layer by layer in threads, one computing at a time. `adapted` says for each whether adapters are on;
        `on_layer` is called whenever a layer has been read.
        """
        self._steps, self._on_layer = _Steps(len(calls)), on_layer
        flags = [True] * len(calls) if adapted is None else adapted
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                futures = [pool.submit(self._run_one, call, flag) for call, flag in zip(calls, flags, strict=True)]
                try:
                    return [future.result() for future in futures]
                except BaseException:
                    self._steps.stop()
                    raise
        finally:
            self._steps, self._on_layer = None, int
            self.set_adapters(True)

    def set_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off for modules that are called outside `run`, such as the head."""
        _set_adapters(self.causal_lm, enabled)

    def _run_one(self, call: Callable[[], T], adapted: bool) -> T:
        assert self._steps is not None
        with self._steps, torch.no_grad():
            self._pass.adapted = adapted
            return call()

    def _enter(self, unit: Unit, module: torch.nn.Module, _: Any) -> None:
        if self._steps is not None:
            self._steps.wait()
        if self._loaded is not unit:
            if self._loaded is not None:
                self._loaded.drop()
                trim_freed_memory()  # malloc would keep several layers
            self._loaded = unit
            unit.fill(self.device)
            self._on_layer()
        if self._steps is not None:
            _set_adapters(module, self._pass.adapted)


def _set_adapters(module: torch.nn.Module, enabled: bool) -> None:
    for each in module.modules():
        if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper):
            each.enable_adapters(enabled)


class _Steps:
    """Threads that take steps together; of those within it, one runs at a time."""

    def __init__(self, count: int) -> None:
        self._turn = threading.Condition()
        self._count, self._waiting, self._step = count, 0, 0
        self._stopped = False

    def __enter__(self) -> None:
        self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        self._go_on()
        self._turn.release()

    def wait(self) -> None:
        """Until every thread has come to its next step, or has left."""
        step = self._step
        self._waiting += 1
        self._go_on()
        self._turn.wait_for(lambda: self._step != step or self._stopped)
        if self._stopped:
            raise NotStreamableError("stopped")

    def stop(self) -> None:
        """Let all threads end at their next step."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def _go_on(self) -> None:
        if self._waiting and self._waiting == self._count:
            self._waiting, self._step = 0, self._step + 1
            self._turn.notify_all()


@dataclass
class _Weight:
    """A parameter of a module, and where its values come from."""

    module: torch.nn.Module
    name: str
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    empty: torch.nn.Parameter = field(init=False)
    state: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        empty = self.module._parameters[self.name]
        assert empty is not None
        self.empty = empty
        self.state = self._copy_state()

    def fill(self, device: torch.device) -> None:
        value = self.read()
        value = value.to(self.dtype) if value.is_floating_point() else value
        kind: Any = type(self.empty)
        if kind is torch.nn.Parameter:
            self.module._parameters[self.name] = kind(value.to(device), requires_grad=False)
            return
        # As transformers quantizes: Bnb4bitQuantize and Bnb8bitQuantize in integrations/bitsandbytes.py.
        value = value.T if self.module.source_cls.__name__ == "Conv1D" else value  # type: ignore[union-attr]
        settings = {name: each for name, each in vars(self.empty).items() if name not in ("SCB", "CB")}
        self.module._parameters[self.name] = kind(value, requires_grad=False, **settings).to(device)

    def drop(self) -> None:
        self.module._parameters[self.name] = self.empty
        vars(self.module).update(self.state)
        self.state = self._copy_state()

    def _copy_state(self) -> dict[str, Any]:
        return {name: copy.copy(value) for name, value in vars(self.module).items() if name in _STATE}


@dataclass
class Unit:
    """A module whose weights are in memory together: a decoder layer, or one outside of them."""

    name: str
    weights: list[_Weight]

    def fill(self, device: torch.device) -> None:
        """Read its weights."""
        for weight in self.weights:
            weight.fill(device)

    def drop(self) -> None:
        """Let go of them."""
        for weight in self.weights:
            weight.drop()


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, and what a run attaches it with."""

    folder: Path
    tokenizer: Any
    seed: int


Readers = Mapping[str, Callable[[], torch.Tensor]]


def build_streamed(
    causal_lm: Any,
    section: ModelSection,
    stored: Readers,
    *,
    precision: str,
    device: torch.device,
    adapter: SavedAdapter | None = None,
) -> StreamedModel:
    """The model that `build_skeleton` made, quantized as `section` says; `stored` reads a parameter by its name.

    `causal_lm` is changed. Raises:
        NotStreamableError: the model has to be loaded whole.
        ModelError: the adapter does not fit it.
    """
    if section.trust_remote_code:
        raise NotStreamableError("it runs code of its own")
    if device.type == "cpu":
        multiply_in_fp32()
    readers = _all_readers(causal_lm, stored)
    dtypes = _dtypes(causal_lm)
    _quantize_layers(causal_lm, section, precision)
    _fill_buffers(causal_lm, readers, device)
    if adapter is not None:
        _fit_vocabulary(causal_lm, adapter, readers, dtypes, device)
    units: dict[str, Unit] = {}
    layers = _layer_names(causal_lm)
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            unit = next((layer for layer in layers if name.startswith(f"{layer}.")), owner)
            weight = _Weight(causal_lm.get_submodule(owner), leaf, dtypes[name], readers[name])
            units.setdefault(unit, Unit(unit, [])).weights.append(weight)
    model = causal_lm if adapter is None else _attach(causal_lm, adapter, section, device)
    return StreamedModel(model, causal_lm, list(units.values()), device)


def _all_readers(causal_lm: Any, stored: Readers) -> Readers:
    """How to read every tensor of the model's state; a tied one that is not stored is read as its twin."""
    tensors = causal_lm.state_dict(keep_vars=True)
    twins = {id(tensor): name for name, tensor in tensors.items() if name in stored}
    names = {name: name if name in stored else twins.get(id(tensor)) for name, tensor in tensors.items()}
    missing = sorted(name for name, twin in names.items() if twin is None)
    if missing:
        raise NotStreamableError(f"{missing[0]} is not stored as one tensor ({len(missing)} such weights)")
    return {name: stored[twin] for name, twin in names.items() if twin is not None}


def _dtypes(causal_lm: Any) -> dict[str, torch.dtype]:
    """The dtype that transformers gives each tensor: the model's, or fp32 where its class asks for that."""
    kept = {*(causal_lm._keep_in_fp32_modules_strict or ())}
    if causal_lm.dtype == torch.float16:
        kept |= {*(causal_lm._keep_in_fp32_modules or ())}
    patterns = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in kept]
    return {
        name: torch.float32 if any(pattern.search(name) for pattern in patterns) else tensor.dtype
        for name, tensor in causal_lm.state_dict().items()
    }


def _quantize_layers(causal_lm: Any, section: ModelSection, precision: str) -> None:
    """Replace linear layers by quantized ones without weights."""
    settings = quantization_config(section, precision, shardable=False)
    if settings is not None:
        quantizer = AutoHfQuantizer.from_config(settings)
        quantizer.preprocess_model(model=causal_lm, dtype=causal_lm.dtype, device_map={"": "cpu"})
        quantizer.postprocess_model(causal_lm)  # marks the model, which tells PEFT the kind of its layers
        causal_lm.hf_quantizer = quantizer
        causal_lm.requires_grad_(False)


def _fill_buffers(causal_lm: Any, readers: Readers, device: torch.device) -> None:
    """Read the buffers that are stored, and compute the others as the model does when it is created."""
    for name, buffer in list(causal_lm.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        value = readers[name]().to(device, buffer.dtype) if name in readers else torch.empty_like(buffer, device=device)
        value._is_hf_initialized = name in readers  # type: ignore[attr-defined]
        causal_lm.get_submodule(owner)._buffers[leaf] = value
    for parameter in causal_lm.parameters():
        parameter._is_hf_initialized = True
    for module in causal_lm.modules():
        module._is_hf_initialized = False
    causal_lm.initialize_weights()


def _fit_vocabulary(
    causal_lm: Any, adapter: SavedAdapter, readers: Readers, dtypes: Mapping[str, torch.dtype], device: torch.device
) -> None:
    """Resize embedding and head for added tokens as a run does; they then stay in memory."""
    config, rows = read_config(adapter.folder), causal_lm.get_input_embeddings().weight.shape[0]
    fits = (vocabulary_size(causal_lm, adapter.folder, config) or max(rows, len(adapter.tokenizer))) == rows
    if fits and not base_tensors(causal_lm, adapter.folder, config):
        return
    ends = {id(causal_lm.get_input_embeddings()), id(causal_lm.get_output_embeddings())}
    filled: dict[int, torch.nn.Parameter] = {}
    for owner, module in causal_lm.named_modules():
        if id(module) in ends:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{owner}.{leaf}"
                if id(parameter) not in filled:
                    value = readers[name]().to(device, dtypes[name])
                    filled[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
                module._parameters[leaf] = filled[id(parameter)]
    fit_saved(causal_lm, adapter.folder, config, adapter.tokenizer, seed=adapter.seed)
    causal_lm.requires_grad_(False)


def _layer_names(causal_lm: Any) -> list[str]:
    layers = {id(layer) for layer in decoder_layers(causal_lm)}
    return [name for name, module in causal_lm.named_modules() if id(module) in layers]


def _attach(causal_lm: Any, adapter: SavedAdapter, section: ModelSection, device: torch.device) -> Any:
    """The model with the adapter's own weights in memory."""
    config = read_config(adapter.folder)
    if init := init_off_the_base(vars(config)):
        raise NotStreamableError(f"adapter.init {init} is taken off all of its weights")
    if config.use_dora and section.quantization != "none":
        raise NotStreamableError("PEFT measures quantized weights when it attaches DoRA")
    config.init_lora_weights = True  # other initial values need weights; shapes are the same
    with torch.device("meta"):
        model = wrap_saved(causal_lm, adapter.folder, config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                empty = torch.empty_like(parameter, device=device, dtype=torch.float32)
                module._parameters[name] = torch.nn.Parameter(empty)
    load_adapter(model, adapter.folder)
    return model
