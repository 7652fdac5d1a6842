"""Whether a run fits its devices, and the cheapest change of the recipe that would make it fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.console import say
from finetune.errors import FinetuneError
from finetune.kernels.layout import Group
from finetune.models.footprint import ForwardPass
from finetune.models.memory import MemoryEstimate, Planner, Spread, format_bytes, largest_pass
from finetune.recipe.schema import DistributedSection, Recipe
from finetune.training.strategy import Placement, resolve_placement

# Of a device's memory: the rest is for what the estimate does not know.
USABLE_SHARE = 0.95
CHECKPOINTING = "gradient_checkpointing"


@dataclass(frozen=True)
class Devices:
    """What a run computes on: processes that each have `memory_bytes`."""

    accelerator: str
    memory_bytes: int
    world_size: int

    @property
    def usable_bytes(self) -> int:
        """What a process may take."""
        return int(USABLE_SHARE * self.memory_bytes)


def memory_of(placement: Placement) -> int:
    """Bytes that one process of this machine can have: the smallest GPU's, or its part of the host's."""
    if placement.accelerator == "cuda":
        return min(torch.cuda.get_device_properties(i).total_memory for i in range(placement.devices))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // placement.devices


def place(recipe: Recipe, config: Any, memory_bytes: int | None = None) -> Placement:
    """`resolve_placement`, and for strategy auto on several processes: ddp where the whole model fits each, else fsdp.

    Says why in one line. `memory_bytes`: of one device, by default of those that are there.

    Raises:
        BadInputError: if the recipe asks for devices that are not there.
    """
    placement = resolve_placement(recipe.distributed)
    available = memory_of(placement) if memory_bytes is None else memory_bytes
    placement, why = settle_strategy(recipe, Planner(config), placement, available)
    if why:
        say(f"distributed.strategy: auto is {placement.strategy}: {why}")
    return placement


def settle_strategy(recipe: Recipe, planner: Planner, placement: Placement, memory_bytes: int) -> tuple[Placement, str]:
    """`placement` with strategy auto settled for several processes, and why; no reason where the recipe says which."""
    if recipe.distributed.strategy != "auto" or placement.world_size == 1:
        return placement, ""
    strategy, why = choose_strategy(recipe, planner, placement, memory_bytes)
    return replace(placement, strategy=strategy), why


def choose_strategy(recipe: Recipe, planner: Planner, placement: Placement, memory_bytes: int) -> tuple[str, str]:
    """`ddp` or `fsdp` for several processes, and why."""
    if recipe.model.quantization == "int8":
        return "ddp", "int8 weights cannot be sharded"
    devices = Devices(placement.accelerator, memory_bytes, placement.world_size)
    try:
        need = planner.estimate(recipe, Spread("ddp", placement.world_size, placement.accelerator)).total
    except FinetuneError as error:
        return "ddp", f"no estimate of its memory: {error}"
    there = f"{format_bytes(need)} a process, {format_bytes(memory_bytes)} a device"
    if need <= devices.usable_bytes:
        return "ddp", f"the whole model fits ({there})"
    return "fsdp", f"the whole model does not fit ({there})"


def with_checkpointing(recipe: Recipe, config: Any, attention: str, placement: Placement) -> Recipe:
    """`recipe` with gradient_checkpointing auto settled for its largest forward pass on the devices that are there.

    Says what was chosen, and why, in one line.
    """
    if recipe.training.gradient_checkpointing != "auto":
        return recipe
    step = largest_pass(config, recipe, attention)
    recipe, why = settle_checkpointing(recipe, Planner(config), step, placement, memory_of(placement))
    chosen = recipe.training.gradient_checkpointing
    say(f"training.gradient_checkpointing: auto is {str(chosen).lower()}: {why}")
    return recipe


def settle_checkpointing(
    recipe: Recipe, planner: Planner, step: ForwardPass, placement: Placement, memory_bytes: int
) -> tuple[Recipe, str]:
    """`recipe` with gradient_checkpointing auto settled: as few layers as fit, and why; "" where the recipe says which.

    All layers where even they do not fit, or the model has no estimate.
    """
    if recipe.training.gradient_checkpointing != "auto":
        return recipe, ""
    devices = Devices(placement.accelerator, memory_bytes, placement.world_size)
    every = _training(_State(recipe, step, placement.strategy), CHECKPOINTING, True)[1]
    there = f"{format_bytes(memory_bytes)} a device"
    try:
        fewest = _fewest_layers(planner, every, devices)
        if fewest is None:
            needed = format_bytes(_total(planner, every, devices))
            return (
                every.recipe,
                f"with fewer than all {planner.num_layers} layers it does not fit ({needed} of {there})",
            )
    except FinetuneError as error:
        return every.recipe, f"no estimate of its memory: {error}"
    _, state, total = fewest
    layers = state.recipe.training.gradient_checkpointing or "none"
    return state.recipe, f"{layers} of {planner.num_layers} layers ({format_bytes(total)} of {there})"


def _fewest_layers(planner: Planner, start: _State, devices: Devices) -> tuple[str, _State, int] | None:
    """The least number of recomputed layers that fits, below all of them: as override, state and bytes."""
    for count in range(planner.num_layers):
        text, state = _training(start, CHECKPOINTING, count or False)
        total = _total(planner, state, devices)
        if total <= devices.usable_bytes:
            return text, state, total
    return None


@dataclass(frozen=True)
class Fit:
    """A recipe's changes, as overrides, and what it takes with them."""

    overrides: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class _State:
    recipe: Recipe
    step: ForwardPass
    strategy: str


def cheapest_fit(planner: Planner, recipe: Recipe, step: ForwardPass, strategy: str, devices: Devices) -> Fit | None:
    """The first change that makes the run fit: one alone where that does, else several; None where none does."""
    start = _State(recipe, step, strategy)
    together, texts = start, ()
    for change in CHANGES:
        for text, state in change(planner, start, devices):
            total = _total(planner, state, devices)
            if total <= devices.usable_bytes:
                return Fit((text,), total)
    for change in CHANGES:
        best = None
        for text, state in change(planner, together, devices):
            best = (text, state)
            total = _total(planner, state, devices)
            if total <= devices.usable_bytes:
                return Fit((*texts, text), total)
        if best is not None:
            texts, together = (*texts, best[0]), best[1]  # type: ignore[assignment]
    return None


def fewest_recomputed(
    planner: Planner, recipe: Recipe, step: ForwardPass, strategy: str, devices: Devices
) -> Fit | None:
    """For a run that recomputes every layer, the fewest of them with which it fits; None where it needs all of them.

    None too where activations are offloaded: the estimate does not count what the host would then keep.
    """
    training = recipe.training
    if training.gradient_checkpointing is not True or (training.activation_offload and devices.accelerator == "cuda"):
        return None
    fewest = _fewest_layers(planner, _State(recipe, step, strategy), devices)
    return None if fewest is None else Fit((fewest[0],), fewest[2])


def _total(planner: Planner, state: _State, devices: Devices) -> int:
    return estimate(planner, state.recipe, state.step, state.strategy, devices).total


def estimate(planner: Planner, recipe: Recipe, step: ForwardPass, strategy: str, devices: Devices) -> MemoryEstimate:
    """The estimate of one process on `devices`."""
    spread = Spread(strategy, devices.world_size, devices.accelerator, recipe.distributed.cpu_offload)
    return planner.estimate(recipe, spread, step)


Changes = Iterator[tuple[str, _State]]


def _smaller_optimizer(_planner: Planner, state: _State, _: Devices) -> Changes:
    if state.recipe.training.optimizer.name == "adamw":
        yield _training(state, "optimizer.name", "paged_adamw_8bit")


def _smaller_pass(_planner: Planner, state: _State, _: Devices) -> Changes:
    """Halves down to one sample, or to rows of the longest sample."""
    recipe, step = state.recipe, state.step
    data, rows = recipe.data, recipe.training.micro_batch_size
    tokens = data.max_tokens or rows * data.max_seq_len
    packed = step.layout is not None
    while tokens >= 2 * data.max_seq_len if packed else rows >= 2:
        tokens, rows, step = tokens // 2, rows // 2, _half(step)
        if packed:
            changed = recipe.model_copy(update={"data": data.model_copy(update={"max_tokens": tokens})})
            yield f"data.max_tokens={tokens}", replace(state, recipe=changed, step=step)
        else:
            text, smaller = _training(state, "micro_batch_size", rows)
            yield text, replace(smaller, step=step)


def _half(step: ForwardPass) -> ForwardPass:
    supervised = max(1, step.supervised // 2)
    if step.layout is None:
        return ForwardPass(max(1, step.rows // 2), step.tokens, supervised)
    limit, tokens = step.tokens // 2, 0
    kept: list[Group] = []
    for group in step.layout:
        used = tokens + group.prefix_len
        own: list[int] = []
        for length in group.suffix_lens:
            if (kept or own) and used + length > limit:
                break
            own.append(length)
            used += length
        if own:
            kept.append(Group(group.prefix_len, tuple(own)))
            tokens = used
    return ForwardPass(1, max(limit, tokens), supervised, tuple(kept))


def _checkpointing(planner: Planner, state: _State, _: Devices) -> Changes:
    """The first layer, the first two, and so on to all."""
    wanted = state.recipe.training.gradient_checkpointing
    if wanted is True or wanted == "auto":
        return
    for count in range(int(wanted) + 1, planner.num_layers):
        yield _training(state, CHECKPOINTING, count)
    yield _training(state, CHECKPOINTING, True)


def _activation_offload(_planner: Planner, state: _State, devices: Devices) -> Changes:
    if devices.accelerator == "cuda" and not state.recipe.training.activation_offload:
        yield _training(state, "activation_offload", True)


def _can_shard(recipe: Recipe, devices: Devices) -> bool:
    """Whether `recipe.checks` lets fsdp stand beside the rest of the recipe."""
    halves = recipe.training.on_out_of_memory == "halve"
    return devices.world_size > 1 and recipe.model.quantization != "int8" and not halves


def _fsdp(_planner: Planner, state: _State, devices: Devices) -> Changes:
    if state.strategy != "fsdp" and _can_shard(state.recipe, devices):
        yield _distributed(state, {"strategy": "fsdp"})


def _nf4(_planner: Planner, state: _State, _: Devices) -> Changes:
    if state.recipe.model.quantization == "none" and state.recipe.adapter.init not in ("olora", "pissa"):
        model = state.recipe.model.model_copy(update={"quantization": "nf4"})
        yield "model.quantization=nf4", replace(state, recipe=state.recipe.model_copy(update={"model": model}))


def _offload(_planner: Planner, state: _State, devices: Devices) -> Changes:
    offloads = state.recipe.distributed.cpu_offload
    if devices.accelerator == "cuda" and not offloads and _can_shard(state.recipe, devices):
        yield _distributed(state, {"strategy": "fsdp", "cpu_offload": True})


def _training(state: _State, key: str, value: Any) -> tuple[str, _State]:
    training = state.recipe.training
    if key == "optimizer.name":
        training = training.model_copy(update={"optimizer": training.optimizer.model_copy(update={"name": value})})
    else:
        training = training.model_copy(update={key: value})
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"training.{key}={shown}", replace(state, recipe=state.recipe.model_copy(update={"training": training}))


def _distributed(state: _State, values: dict[str, Any]) -> tuple[str, _State]:
    section: DistributedSection = state.recipe.distributed.model_copy(update=values)
    text = " ".join(f"distributed.{key}={str(value).lower()}" for key, value in values.items())
    recipe = state.recipe.model_copy(update={"distributed": section})
    return text, replace(state, recipe=recipe, strategy="fsdp")


# In order of what they cost: nothing, a little speed, a third more work, traffic (twice), precision of the base, much
# speed.
CHANGES: tuple[Callable[[Planner, _State, Devices], Changes], ...] = (
    _smaller_optimizer,
    _smaller_pass,
    _checkpointing,
    _activation_offload,
    _fsdp,
    _nf4,
    _offload,
)
