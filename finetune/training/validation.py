"""Validation while training: loss over the held-out samples, and completions of some of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist

from finetune.console import progress_bar, say
from finetune.data.dataset import TokenDataset
from finetune.files import naming, write_atomic
from finetune.inference.generate import Sampling, generate
from finetune.inference.mode import inference_mode
from finetune.machine import naming_out_of_memory
from finetune.recipe.schema import EvaluationSection, Recipe
from finetune.run_dir import RunDir
from finetune.training.module import FinetuneModule
from finetune.training.out_of_memory import LESS_FOR_VALIDATION
from finetune.training.state import RunState
from finetune.training.steps import StepDataset, evaluation_steps

# Samples that are planned together: enough to fill packed rows well, few enough to bound memory.
SAMPLES_PER_STEP = 64


@torch.no_grad()
def mean_loss(
    module: FinetuneModule, samples: StepDataset, *, on_samples: Callable[[int], None] | None = None
) -> float:
    """Mean cross-entropy (nats) over the supervised tokens of all samples, the same on every rank.

    `on_samples` is called with the number of samples done, as they are done.

    Dropout is off meanwhile; the model is left as it was. Memory does not grow with the number of batches.
    """
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    precision = module.trainer.precision_plugin
    with inference_mode(module.model), precision.forward_context():
        for step in evaluation_steps(samples, SAMPLES_PER_STEP):
            for micro in step.micro_batches:
                total += module.loss_of(micro.to(module.device)).double().cpu()
            count += step.num_supervised
            if on_samples is not None:
                on_samples(min(SAMPLES_PER_STEP, len(samples.dataset)))
    if module.placement.world_size > 1:
        shared = total.to(module.device, torch.float32) if module.device.type == "cuda" else total
        dist.all_reduce(shared)
        total = shared.double().cpu()
    return total.item() / max(1, count)


def write_samples(
    module: FinetuneModule,
    dataset: TokenDataset,
    stop_token_ids: tuple[int, ...],
    section: EvaluationSection,
    run: RunDir,
) -> list[dict[str, Any]]:
    """Complete the first held-out samples and append them to samples.jsonl (rank 0 writes)."""
    prompts, expected = [], []
    for index in range(min(section.num_samples, len(dataset))):
        prompt, answer = _last_turn(*dataset[index])
        prompts.append(prompt)
        expected.append(module.tokenizer.decode(answer, skip_special_tokens=True))
    if not prompts:
        return []
    sampling = Sampling(max_new_tokens=section.max_new_tokens)
    with module.gathered():
        completions = generate(
            module.model, module.tokenizer, prompts, stop_token_ids, sampling, batch_size=section.batch_size
        )
    rows = [
        {
            "step": module.step,
            "prompt": module.tokenizer.decode(prompt),
            "expected": answer,
            "completion": completion.text,
            "stopped": completion.stopped,
        }
        for prompt, answer, completion in zip(prompts, expected, completions, strict=True)
    ]
    if module.global_rank == 0:
        with naming(run.samples), run.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return rows


def read_samples(path: Path, step: int) -> list[dict[str, Any]]:
    """The completions of one step."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) == step]


def keep_samples(path: Path, last_step: int) -> None:
    """Cut samples.jsonl back to the steps up to `last_step`: a resumed run writes the later ones again."""
    if not path.is_file():
        return
    lines = [line for line in _lines(path) if _step_of(line) <= last_step]
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def _lines(path: Path) -> list[str]:
    # Not splitlines: it ends a line at U+2028 and the like, which stand as they are in JSON texts.
    return path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a line of samples.jsonl; infinite for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class _PutOff(Exception):
    """A validation is to be left for later."""


class Validation(L.Callback):
    """Validation loss, perplexity and sample completions every n steps; early stopping.

    A stop signal puts a validation off: the step's checkpoint is saved without it, and the next run begins with it.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        state: RunState,
        samples: StepDataset,
        stop_token_ids: tuple[int, ...],
        interrupts: Callable[[L.Trainer, FinetuneModule], bool],
    ) -> None:
        self._section = recipe.evaluation
        self._run, self._state, self._samples = run, state, samples
        self._stop_token_ids, self._interrupts = stop_token_ids, interrupts

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        """Make up for what a signal put off."""
        if module.step == self._state.put_off_at:
            if trainer.is_global_zero:
                keep_samples(self._run.samples, module.step - 1)
            self._validate(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: FinetuneModule, *_: Any) -> None:  # type: ignore[override]
        """Validate where it is due."""
        every = self._section.every_steps
        if every is not None and (module.step % every == 0 or module.step == module.num_steps):
            self._state.put_off_at = module.step
            if not self._state.is_preempted:
                self._validate(trainer, module)

    @naming_out_of_memory("in a validation", LESS_FOR_VALIDATION)
    def _validate(self, trainer: L.Trainer, module: FinetuneModule) -> None:
        def advance(count: int) -> None:
            bar.advance(count)
            if self._interrupts(trainer, module):
                raise _PutOff

        try:
            with progress_bar("validating", len(self._samples.dataset), line=False) as bar:
                loss = mean_loss(module, self._samples, on_samples=advance)
        except _PutOff:
            return
        write_samples(module, self._samples.dataset, self._stop_token_ids, self._section, self._run)
        state = self._state
        state.validation_loss, state.validated_at, state.put_off_at = loss, module.step, None
        if not math.isnan(loss) and (state.lowest_loss is None or loss < state.lowest_loss):
            state.lowest_loss, state.best_step = loss, module.step
        say(f"step {module.step}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 80)):.2f}")
        stopping = self._section.early_stopping
        margin = stopping.min_delta if stopping else 0.0
        if state.best_validation_loss is None or loss < state.best_validation_loss - margin:
            state.best_validation_loss, state.bad_validations = loss, 0
            return
        state.bad_validations += 1
        if stopping and state.bad_validations >= stopping.patience:
            state.stop_reason = "early_stopping"
            trainer.should_stop = True
            say(f"early stopping: no better validation loss in {state.bad_validations} validations")


def _last_turn(input_ids: np.ndarray, supervised: np.ndarray) -> tuple[list[int], list[int]]:
    """A sample's ids before its last supervised stretch, and that stretch."""
    last = int(np.flatnonzero(supervised)[-1])
    start = last
    while start > 0 and supervised[start - 1]:
        start -= 1
    return input_ids[: max(start, 1)].tolist(), input_ids[start : last + 1].tolist()
