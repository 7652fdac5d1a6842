"""What is known of a run before it starts, without weights: model, adapter, data, steps, memory, disk, time, habits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.data.prepare import PreparedData, prepare_data, prepare_rows
from finetune.data.template import ChatTemplate, encode_prompt, load_template, unprinted_date
from finetune.errors import FinetuneError
from finetune.findings import Finding, error, fact, warning
from finetune.machine import describe_machine
from finetune.models.adapters import token_indices
from finetune.models.attention import choose_attention
from finetune.models.footprint import ForwardPass, NoEstimateError
from finetune.models.load import load_config, load_tokenizer
from finetune.models.memory import Planner, chunk_bytes, format_bytes, largest_pass
from finetune.models.skeleton import check_names
from finetune.models.sources import ModelSource, describe_model
from finetune.models.start import find_start
from finetune.recipe.schema import Recipe
from finetune.training.context import too_long_completions, too_long_samples
from finetune.training.disk import find_room
from finetune.training.fitting import (
    Devices,
    cheapest_fit,
    estimate,
    fewest_recomputed,
    memory_of,
    settle_checkpointing,
    settle_strategy,
)
from finetune.training.habits import Planned, habits_of, why_bf16_is_slow
from finetune.training.out_of_memory import check_halving
from finetune.training.passes import Passes, look_at_passes
from finetune.training.steps import Packing, StepPlan, build_plan
from finetune.training.strategy import Placement, check_dora, resolve_placement, strategy_of
from finetune.training.train import choose_packing

# Below this share of supervised tokens, nearly all work is spent on prompts.
LOW_COVERAGE = 0.02

# A run's speed says nothing of another that differs in one of these.
SPEED_KEYS = (
    ("model", "name"),
    ("model", "quantization"),
    ("adapter", "rank"),
    ("adapter", "target_modules"),
    ("adapter", "use_dora"),
    ("data", "max_seq_len"),
    ("data", "packing"),
    ("training", "precision"),
    ("training", "micro_batch_size"),
    ("training", "gradient_checkpointing"),
    ("distributed", "devices"),
    ("distributed", "num_nodes"),
)


class Checkup:
    """A recipe and what follows from it, each worked out when a check first asks for it.

    `gpu_bytes` and `devices` stand for GPUs that are not here.
    """

    def __init__(self, recipe: Recipe, *, gpu_bytes: int | None = None, devices: int | None = None) -> None:
        self.recipe = recipe
        self._gpu_bytes = gpu_bytes
        self._devices = devices

    @property
    def imagines_gpus(self) -> bool:
        """Whether the GPUs are not those of this machine."""
        return self._gpu_bytes is not None

    @cached_property
    def source(self) -> ModelSource:
        """Where the base's configuration and tokenizer are; its weights need not be there."""
        return describe_model(self.recipe.model)

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        return load_config(self.recipe.model, self.source)

    @cached_property
    def planner(self) -> Planner:
        """Memory estimates of this model."""
        return Planner(self.config)

    @cached_property
    def attention(self) -> str:
        """The attention implementation."""
        return choose_attention(self.config, self.recipe.model, self.recipe.data)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, with the recipe's own tokens."""
        tokenizer = load_tokenizer(self.recipe.model, self.source)
        token_indices(self.recipe.adapter, tokenizer)
        return tokenizer

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return load_template(self.tokenizer, self.recipe.data)

    @cached_property
    def data(self) -> PreparedData:
        """The samples."""
        return prepare_data(self.recipe.data, self.tokenizer, self.template, seed=self.recipe.training.seed)

    @cached_property
    def plan(self) -> StepPlan:
        """Which samples make up which step."""
        return build_plan(len(self.data.train), self.recipe.training)

    @cached_property
    def packing(self) -> Packing:
        """How rows are filled."""
        return choose_packing(self.recipe, self.data.train, self.config, self.attention)

    @cached_property
    def resolved(self) -> tuple[Placement, Devices, str]:
        """Devices and strategy, what they hold, and why this strategy."""
        section = self.recipe.distributed
        if self._gpu_bytes is None and self._devices is None:
            placement = resolve_placement(section)
            memory = memory_of(placement)
        elif self._gpu_bytes is not None:
            count = self._devices or (section.devices if isinstance(section.devices, int) else 1)
            strategy = strategy_of(section, count * section.num_nodes)
            placement = Placement("cuda", count, section.num_nodes, strategy, section.cpu_offload)
            memory = self._gpu_bytes
        else:
            assert self._devices is not None
            changed = section.model_copy(update={"devices": self._devices})
            placement = resolve_placement(changed)
            memory = memory_of(placement)
        placement, why = settle_strategy(self.recipe, self.planner, placement, memory)
        return placement, Devices(placement.accelerator, memory, placement.world_size), why

    @cached_property
    def settled(self) -> tuple[Recipe, str]:
        """The recipe with gradient_checkpointing auto settled as a run does it, and why."""
        placement, devices, _ = self.resolved
        step = largest_pass(self.config, self.recipe, self.attention)
        return settle_checkpointing(self.recipe, self.planner, step, placement, devices.memory_bytes)

    @cached_property
    def passes(self) -> Passes:
        """The forward passes of the plan's first steps on one process."""
        return look_at_passes(self.plan, self.packing, self.data.train, self.resolved[0].world_size)

    @property
    def step(self) -> ForwardPass:
        """The largest forward pass: of the data where that could be read, else the largest that the recipe allows."""
        try:
            return self.passes.largest
        except FinetuneError:
            return largest_pass(self.config, self.recipe, self.attention)


def _check_model(checkup: Checkup) -> Iterator[Finding]:
    config, recipe = checkup.config, checkup.recipe
    text = config.get_text_config()
    weights = checkup.planner.weights(recipe)
    yield fact(
        "model",
        f"{recipe.model.name}: {config.model_type}, {weights.num_parameters / 1e6:,.0f} M parameters, "
        f"{text.num_hidden_layers} layers, base in {recipe.model.quantization} "
        f"({format_bytes(weights.base + weights.constants)}), attention {checkup.attention}",
        location=checkup.source.location,
        num_parameters=weights.num_parameters,
        num_layers=text.num_hidden_layers,
    )
    if (problem := too_long_samples(recipe, config)) is not None:
        yield warning("model", problem)


def _check_adapter(checkup: Checkup) -> Iterator[Finding]:
    recipe = checkup.recipe
    check_names(checkup.config, recipe.model, recipe.adapter, precision=recipe.training.precision)
    if (start := find_start(recipe.adapter, checkup.tokenizer)) is not None:
        yield fact("adapter", f"starts from the adapter in {start.folder}", start=str(start.folder))
    weights = checkup.planner.weights(checkup.recipe)
    targets = checkup.planner.targets(checkup.recipe)
    trained = weights.num_trainable
    shown = ", ".join(f"{name} ×{count}" for name, count in targets.items())
    yield fact(
        "adapter",
        f"rank {checkup.recipe.adapter.rank} on {sum(targets.values())} layers ({shown}): {trained:,} trained "
        f"parameters, {trained / max(1, weights.num_parameters + trained):.2%}",
        targets=targets,
        trainable_parameters=trained,
        share=trained / max(1, weights.num_parameters + trained),
    )


def _check_template(checkup: Checkup) -> Iterator[Finding]:
    template, tokenizer, data = checkup.template, checkup.tokenizer, checkup.recipe.data
    pad, stops = tokenizer.pad_token_id, template.stop_token_ids
    yield fact(
        "template",
        f"{template.name}: one BOS at most; a turn ends with {template.terminator!r}, which is supervised; "
        + ("padding is that token too, and never supervised" if pad == stops[0] else "padding is another token"),
        name=template.name,
        terminator=template.terminator,
        stop_token_ids=list(stops),
        pad_token_id=pad,
    )
    if data.system is not None and not template.system_role:
        yield fact("template", "it has no system role: data.system opens the first user turn")
    if (unprinted := unprinted_date(template, data)) is not None:
        yield warning("template", unprinted)
    yield from _check_prompt(checkup)


def _check_prompt(checkup: Checkup) -> Iterator[Finding]:
    """The first row's prompt as a server would send it must open the first sample."""
    recipe = checkup.recipe
    rows = prepare_rows(
        recipe.data.sources[0], recipe.data, checkup.tokenizer, checkup.template, max_rows=1, where="data.sources[0]"
    )
    train = checkup.data.train
    index = next((i for i in range(len(train)) if rows and train.origin(i) == rows[0].origin), None)
    if index is None:
        return
    (input_ids, supervised), row = train[index], rows[0]
    served = encode_prompt(checkup.tokenizer, checkup.template, row.messages, recipe.data.system, row.tools)
    if input_ids[: len(served)].tolist() == served:
        yield fact("template", "the prompt in training is, token for token, the one that is served")
    elif len(input_ids) > len(served):
        yield warning("template", f"{rows[0].origin}: the prompt in training is not the one that would be served")
    ends = set(input_ids[supervised].tolist()) & set(checkup.template.stop_token_ids)
    if not ends:
        yield warning("template", f"{rows[0].origin}: no end of turn is supervised: cut by data.over_length?")


def _check_data(checkup: Checkup) -> Iterator[Finding]:
    ledger = checkup.data.ledger
    for source in ledger.sources:
        if source.role == "train" and source.label_coverage < LOW_COVERAGE:
            yield warning(
                "data",
                f"{source.path}: only {source.label_coverage:.1%} of its tokens are supervised; see data.train_on",
            )
    if ledger.duplicate_rows > 0.1 * max(1, ledger.train_samples):
        yield warning("data", f"{ledger.duplicate_rows:,} rows repeat another one")
    cut = too_long_completions(checkup.recipe, checkup.config, checkup.tokenizer, checkup.template, checkup.data)
    if cut is not None:
        yield warning("data", cut)
    lines = ledger.summary_lines()
    for line in lines[:-1]:
        yield fact("data", line.strip())
    yield fact("data", lines[-1], ledger=ledger.to_json())


def _check_steps(checkup: Checkup) -> Iterator[Finding]:
    plan, passes = checkup.plan, checkup.passes
    tokens = int(checkup.data.train.lengths.sum() * plan.total_samples / plan.num_samples)
    yield fact(
        "steps",
        f"{plan.num_steps:,} steps of {plan.global_batch_size} samples, {plan.epoch(plan.num_steps):.2f} epochs, "
        f"about {tokens:,} tokens",
        num_steps=plan.num_steps,
        epochs=plan.epoch(plan.num_steps),
        tokens=tokens,
    )
    kind = "packed rows" if checkup.packing.packed else "padded batches"
    yield fact(
        "packing",
        f"{kind}: {passes.efficiency:.1%} of the computed tokens are real, "
        f"{passes.num_passes / passes.num_steps:.1f} forward passes a step over all processes, the largest "
        f"{passes.largest.rows} x {passes.largest.tokens} tokens",
        packed=checkup.packing.packed,
        efficiency=passes.efficiency,
    )
    every = checkup.recipe.checkpoint.every_steps
    if every is not None and every >= plan.num_steps and checkup.recipe.checkpoint.every_minutes is None:
        yield warning("steps", f"checkpoint.every_steps: {every}, so nothing is saved before the last of the steps")


def _check_devices(checkup: Checkup) -> Iterator[Finding]:
    placement = checkup.resolved[0]
    slow = None if checkup.imagines_gpus else why_bf16_is_slow(checkup.recipe, placement)
    if slow is not None:
        yield warning("devices", slow)
    check_halving(checkup.recipe, placement)
    check_dora(checkup.recipe, placement)


def _check_memory(checkup: Checkup) -> Iterator[Finding]:
    placement, devices, why = checkup.resolved
    recipe, chosen = checkup.settled
    step = checkup.step
    try:
        found = estimate(checkup.planner, recipe, step, placement.strategy, devices)
    except NoEstimateError as problem:
        yield warning("memory", str(problem))
        return
    unit = "GPU" if devices.accelerator == "cuda" else "process"
    placed = f"{placement.world_size} x {devices.accelerator}, {placement.strategy}"
    there = format_bytes(devices.memory_bytes)
    values = {
        "strategy": placement.strategy,
        "world_size": placement.world_size,
        "device_bytes": devices.memory_bytes,
        "total_bytes": found.total,
        "parts": found.parts,
        "fits": found.total <= devices.usable_bytes,
    }
    if found.total > devices.usable_bytes:
        fit = cheapest_fit(checkup.planner, recipe, step, placement.strategy, devices)
        advice = "no change of the recipe makes it fit; take a smaller model or more devices"
        if fit is not None:
            values |= {"cheapest_change": list(fit.overrides), "total_bytes_then": fit.total}
            advice = f"cheapest change: {' '.join(fit.overrides)} ({format_bytes(fit.total)})"
        yield error("memory", f"{format_bytes(found.total)} a {unit}, but it has {there}; {advice}", **values)
    else:
        reason = f" ({why})" if why else ""
        yield fact("memory", f"about {format_bytes(found.total)} of {there} a {unit}: {placed}{reason}", **values)
        fewest = fewest_recomputed(checkup.planner, recipe, step, placement.strategy, devices)
        if fewest is not None:
            advice = f"fewer than its {checkup.planner.num_layers} layers need to be computed again, which is faster"
            yield fact("memory", f"{advice}: {fewest.overrides[0]} ({format_bytes(fewest.total)})")
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.parts.items() if size)
    yield fact("memory", f"of that {parts}")
    vocabulary = checkup.config.get_text_config().vocab_size
    if chosen:
        yield fact("memory", f"training.gradient_checkpointing: auto is {chosen}")
    other = recipe.training.gradient_checkpointing
    training = recipe.training.model_copy(update={"gradient_checkpointing": not other})
    changed = recipe.model_copy(update={"training": training})
    kept = checkup.planner.estimate(changed, found.spread, step).parts["activations"]
    yield fact(
        "memory",
        f"activations {'without' if other else 'with'} checkpointing: {format_bytes(kept)}; "
        f"logits chunk {format_bytes(chunk_bytes(vocabulary, step.supervised, devices.accelerator))}",
    )


def _check_disk(checkup: Checkup) -> Iterator[Finding]:
    weights = checkup.planner.weights(checkup.recipe)
    yield from find_room(checkup.recipe, checkup.source, weights, checkup.resolved[0])


def _check_time(checkup: Checkup) -> Iterator[Finding]:
    """From earlier runs of the same model on a machine like this one."""
    speed = known_speed(checkup.recipe)
    if speed is None:
        yield fact("time", "unknown: no earlier run in output_dir with this model, machine and settings")
        return
    plan = checkup.plan
    tokens = float(checkup.data.train.lengths.sum()) * plan.total_samples / plan.num_samples
    seconds = tokens / speed
    yield fact("time", f"about {seconds / 60:,.0f} min at the {speed:,.0f} tokens/s of an earlier run", seconds=seconds)


def known_speed(recipe: Recipe) -> float | None:
    """Tokens per second of the newest run in `output_dir` that agrees in SPEED_KEYS, on a machine like this one."""
    import yaml

    machine, wanted = describe_machine(), recipe.model_dump(mode="json")
    for results in sorted(Path(recipe.output_dir).glob("*/results.json"), key=lambda p: -p.stat().st_mtime):
        try:
            training = json.loads(results.read_text(encoding="utf-8"))["training"]
            found = yaml.safe_load(results.with_name("recipe.yaml").read_text(encoding="utf-8"))
            same = all(found[section][key] == wanted[section][key] for section, key in SPEED_KEYS)
            if same and training["machine"] == machine:
                return float(training["tokens_per_second"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _check_habits(checkup: Checkup) -> Iterator[Finding]:
    placement, passes = checkup.resolved[0], checkup.passes
    passes_a_step = passes.num_passes / (passes.num_steps * placement.world_size)
    run = Planned(checkup.settled[0], placement, checkup.attention, checkup.packing, passes_a_step)
    for habit in habits_of(run):
        mark = "yes" if habit.active else "no"
        yield fact("habits", f"{habit.name}: {mark}; {habit.why}", name=habit.name, active=habit.active)


CHECKS: dict[str, Callable[[Checkup], Iterator[Finding]]] = {
    "model": _check_model,
    "adapter": _check_adapter,
    "data": _check_data,
    "template": _check_template,
    "steps": _check_steps,
    "devices": _check_devices,
    "memory": _check_memory,
    "disk": _check_disk,
    "time": _check_time,
    "habits": _check_habits,
}
