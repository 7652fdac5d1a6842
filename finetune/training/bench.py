"""Benchmarks of training: variants of a recipe in turns, each in a process of its own, medians and ratios.

This module starts the processes and reads their results; it never imports torch, so that a child's memory is its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import BadInputError, FinetuneError
from finetune.machine import KERNEL_SWITCH, limit_kernel_cache
from finetune.recipe.load import dump_recipe, load_recipe

PHASES = ("data", "forward", "backward", "optimizer")
WARMUP_STEPS = 2
# Of what a failed process wrote: a library's error may say the cause a few lines before its last.
SHOWN_LINES = 15
UNFUSED = "unfused"
# A CPU's native kernels switched off.
TORCH_KERNELS = "torch_kernels"

# Overrides of what a variant's name says; `key.sub=value` is a variant too, and + joins several.
VARIANTS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "none": ("data.packing=none",),
    "isolated": ("data.packing=isolated",),
    "shared_prefix": ("data.packing=shared_prefix",),
    "bf16": ("model.quantization=none",),
    "nf4": ("model.quantization=nf4",),
    "checkpointing": ("training.gradient_checkpointing=true",),
    "compile": ("training.compile=true",),
    UNFUSED: (),
    TORCH_KERNELS: (),
}
DEFAULT_VARIANTS = ("recipe", "none", "isolated", "shared_prefix", "bf16", "nf4", "checkpointing", UNFUSED)

Progress = Callable[[str], None]


@dataclass
class VariantResult:
    """What the rounds of one variant measured."""

    name: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def median(self, value: Callable[[dict[str, Any]], float]) -> float:
        """The median over the rounds; NaN where none ran."""
        return statistics.median(map(value, self.rounds)) if self.rounds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over whole steps: padding left out, a shared prefix counted for each of its samples."""
        return self.median(lambda one: one["real_tokens"] / one["seconds"])

    @property
    def flops_per_second(self) -> float:
        """Needed operations (see `models.flops`) over whole steps."""
        return self.median(lambda one: one["flops"] / one["seconds"])

    def summary(self, first: VariantResult) -> dict[str, Any]:
        """The variant's row: medians, and speed in relation to `first` and to the peak of the same round."""
        if not self.rounds:
            return {"variant": self.name, "failure": self.failure}
        speeds = [one["real_tokens"] / one["seconds"] for one in self.rounds]
        steps = self.rounds[0]["steps"]
        return {
            "variant": self.name,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_range": [min(speeds), max(speeds)],
            "speed_ratio": self.tokens_per_second / first.tokens_per_second,
            "computed_ratio": self.median(lambda one: one["computed_tokens"] / one["real_tokens"]),
            "flops_per_second": self.flops_per_second,
            "peak_share": self.median(lambda one: one["flops"] / one["seconds"] / one["peak_flops_per_second"]),
            "peak_memory_bytes": self.median(lambda one: one["peak_memory_bytes"]),
            "step_seconds": self.median(lambda one: one["seconds"] / steps),
            "samples_per_second": self.median(lambda one: one["samples"] / one["seconds"]),
            "phase_seconds": {
                phase: self.median(lambda one, phase=phase: one["phases"][phase] / steps)  # type: ignore[misc]
                for phase in PHASES
            },
            "mean_loss": self.median(lambda one: statistics.fmean(one["losses"])),
            "failure": self.failure,
        }


def split_outside(text: str, separator: str) -> list[str]:
    """`text` cut at every `separator` that stands in no brackets or braces: a list is one value."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def variant_overrides(name: str) -> tuple[list[str], bool]:
    """The overrides of a variant, and whether it runs the fused layers.

    Raises:
        BadInputError: for a name that means nothing.
    """
    overrides: list[str] = []
    parts = split_outside(name, "+")
    for part in parts:
        if part not in VARIANTS and "=" not in part:
            raise BadInputError(f"--variants: {part} is none of {', '.join(VARIANTS)}, and no key.sub=value")
        overrides.extend(VARIANTS.get(part, (part,)))
    return overrides, UNFUSED not in parts


def bench_training(
    recipe: Path,
    overrides: Sequence[str],
    variants: Sequence[str],
    *,
    steps: int,
    rounds: int,
    profile: Path | None = None,
    minutes: float = math.inf,
    say: Progress = lambda _: None,
    after_round: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Time `steps` optimizer steps of each variant `rounds` times, in turns; no new round after `minutes`.

    `profile` is a directory for one torch profiler trace a variant, taken after the rounds. `after_round` is given the
    report so far after every round that is not the last.

    Raises:
        BadInputError: for a variant that is unknown or does not fit the recipe.
        FinetuneError: if no variant ran.
    """
    tasks = {name: _task(recipe, overrides, name, steps) for name in variants}
    # For the processes that are started below: read when torch is imported.
    limit_kernel_cache()
    started = time.monotonic()
    first = tasks[variants[0]]
    say("preparing the data")
    _work({**first, "steps": 0})
    results = {name: VariantResult(name) for name in variants}
    for number in range(rounds):
        if number and time.monotonic() - started > 60 * minutes:
            break
        for name in variants:
            if results[name].failure is None:
                say(f"round {number + 1} of {rounds}: {name}")
                _try(results[name], tasks[name], say)
        if number + 1 < rounds and any(result.rounds for result in results.values()):
            after_round(_report(load_recipe(recipe, overrides), results, steps))
    if profile is not None:
        _write_traces(profile, results, tasks, say)
    if not any(result.rounds for result in results.values()):
        raise FinetuneError(f"bench: no variant ran; {variants[0]}: {results[variants[0]].failure}")
    return _report(load_recipe(recipe, overrides), results, steps)


def _task(recipe: Path, overrides: Sequence[str], name: str, steps: int) -> dict[str, Any]:
    own, fused = variant_overrides(name)
    every = [
        *overrides,
        *own,
        f"training.max_steps={WARMUP_STEPS + steps}",
        "training.epochs=null",
        "training.schedule.warmup_steps=0",  # the recipe's may be longer than what is timed
        "distributed.strategy=single",
        "distributed.devices=1",
    ]
    load_recipe(recipe, every)
    task = {"recipe": str(recipe), "overrides": every, "fused": fused, "steps": steps, "warmup": WARMUP_STEPS}
    return {**task, "environment": {KERNEL_SWITCH: "0"} if TORCH_KERNELS in split_outside(name, "+") else {}}


def _work(task: dict[str, Any]) -> dict[str, Any]:
    """The result of one task in a process of its own.

    Raises:
        FinetuneError: with the last lines of a process that failed.
    """
    command = [sys.executable, "-m", "finetune.training.bench_worker"]
    environment = {**os.environ, **task["environment"]}
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[-SHOWN_LINES:]
        if not lines or done.returncode < 0:
            lines.append(f"exit code {done.returncode}")
        raise FinetuneError("\n".join(lines))
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _try(result: VariantResult, task: dict[str, Any], say: Progress) -> None:
    try:
        result.rounds.append(_work(task))
    except FinetuneError as error:
        say(f"{result.name} did not run:\n{error}")
        result.failure = str(error).splitlines()[-1]  # a cell of a table


def _write_traces(
    folder: Path, results: dict[str, VariantResult], tasks: dict[str, dict[str, Any]], say: Progress
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        if result.failure is None:
            path = folder / f"{name.replace('/', '_')}.json"
            say(f"trace     {path}")
            short = [f"training.max_steps={WARMUP_STEPS + 1}"]
            _work({**tasks[name], "trace": str(path), "overrides": [*tasks[name]["overrides"], *short], "steps": 1})


def _report(recipe: Any, results: dict[str, VariantResult], steps: int) -> dict[str, Any]:
    ran = [result for result in results.values() if result.rounds]
    some = ran[0].rounds[0]
    shared = {key: some[key] for key in ("machine", "threads", "versions")}
    rounds = {
        name: [{key: value for key, value in one.items() if key not in shared} for one in result.rounds]
        for name, result in results.items()
    }
    return {
        "recipe": dump_recipe(recipe),
        "steps": steps,
        "warmup_steps": WARMUP_STEPS,
        **shared,
        "peak_flops_per_second": statistics.median(
            one["peak_flops_per_second"] for result in ran for one in result.rounds
        ),
        "peak_dtype": some["peak_dtype"],
        "variants": [result.summary(ran[0]) for result in results.values()],
        "rounds": rounds,
    }


# What `_report`'s keys make a file of figures open with.
REPORT_MARK = re.compile(rb'\{\n  "recipe": ')


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report beside the tables that are made from it.

    Raises:
        BadInputError: if it cannot be written.
    """
    from finetune.files import write_atomic

    try:
        write_atomic(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise BadInputError(f"--json {path}: cannot be written: {error.strerror}; name another file") from None
