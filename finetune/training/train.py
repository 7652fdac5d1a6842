"""The main flow of training, on one screen: prepare, build, resume, fit, save the adapter."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

import lightning as L
from torch.utils.data import DataLoader

from finetune.console import say, warn
from finetune.data.dataset import TokenDataset
from finetune.data.packing import find_prefixes, no_prefixes
from finetune.data.prepare import PreparedData, prepare_data
from finetune.data.template import ChatTemplate, load_template, unprinted_date
from finetune.distributed import global_rank, is_rank_zero
from finetune.errors import FinetuneError, PreemptedError
from finetune.files import replace_directory
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, adapter_state, config_text, save_weights, token_indices
from finetune.models.attention import choose_attention, stretched_rope, why_not_packed
from finetune.models.load import load_config, load_tokenizer
from finetune.models.skeleton import check_names
from finetune.models.sources import ModelSource, find_model, fingerprint
from finetune.models.start import Start, find_start
from finetune.models.tokenizer_files import save_tokenizer
from finetune.recipe.load import dump_recipe, read_document
from finetune.recipe.schema import ModelSection, Recipe
from finetune.run_dir import FINGERPRINTS, RECIPE, RunDir
from finetune.stop_signals import StopRequested, StopSignals, blocked, leave_to_parent
from finetune.training.agreement import check_agreement
from finetune.training.auto_micro_batch import AutoMicroBatch, check_placement
from finetune.training.best import take_best
from finetune.training.callbacks import Meter, NonFiniteStop
from finetune.training.checkpoint import Checkpoint, restore, write_parts
from finetune.training.checkpoint_writer import CheckpointWriter
from finetune.training.context import too_long_samples
from finetune.training.fitting import place, with_checkpointing
from finetune.training.module import FinetuneModule
from finetune.training.out_of_memory import Halving, check_halving
from finetune.training.preemption import Preemption, requeue
from finetune.training.resume import recorded_start
from finetune.training.state import RunState, is_stopped_early
from finetune.training.steps import Packing, StepDataset, StepPlan, build_plan, rank_imbalance
from finetune.training.strategy import (
    Placement,
    build_trainer,
    check_launch,
    ending_others,
    leave_together,
    resolve_placement,
)
from finetune.training.turns import in_turn, of_rank_zero
from finetune.training.validation import Validation


class Measure(Protocol):
    """Measuring the model on rows."""

    fingerprint: str  # of the rows

    def before(self, module: FinetuneModule) -> None:
        """Called ahead of the first step of a fresh run."""

    def after(self, module: FinetuneModule) -> None:
        """Called when the last step is done."""


@dataclass(frozen=True)
class Job:
    """A recipe with everything that follows from it before a model is loaded."""

    recipe: Recipe
    source: ModelSource
    tokenizer: Any
    template: ChatTemplate
    data: PreparedData
    plan: StepPlan
    packing: Packing
    placement: Placement
    attention: str
    start: Start | None = None

    @cached_property
    def rank_imbalance(self) -> float:
        """See `steps.rank_imbalance`."""
        return rank_imbalance(self.plan, self.data.train.lengths, self.packing, self.placement.world_size)

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """What the run is made from: base model, data and the adapter that it starts from, by hash."""
        validation = self.data.validation
        start = {} if self.start is None else {"start": self.start.sha256}
        return {
            **start,
            "base": fingerprint(self.source),
            "data": {
                "train": self.data.train.fingerprint,
                "validation": None if validation is None else validation.fingerprint,
            },
        }

    def steps_of(self, dataset: TokenDataset, *, rank: int, world_size: int) -> StepDataset:
        """This rank's view of a data set, packed as the recipe says."""
        packing = self.packing if dataset is self.data.train else _without_prefixes(self.packing, len(dataset))
        return StepDataset(
            dataset, self.plan, packing, rank=rank, world_size=world_size, pad_id=self.tokenizer.pad_token_id
        )


def prepare_job(recipe: Recipe, *, find: Callable[[ModelSection], ModelSource] = find_model) -> Job:
    """Tokenizer, template, data, plan and placement; no weights are loaded.

    `find` is `describe_model` for who will not train: the job's `source` may then lack weights.

    Raises:
        BadInputError: whatever is wrong with the model's name, the data or the devices.
    """
    first = resolve_placement(recipe.distributed)
    check_launch(first)
    if recipe.training.auto_micro_batch:
        check_placement(first)
    with in_turn():
        source = find(recipe.model)
        config = load_config(recipe.model, source)
        if (problem := too_long_samples(recipe, config)) is not None:
            warn(problem)
        check_names(config, recipe.model, recipe.adapter, precision=recipe.training.precision)
        attention = choose_attention(config, recipe.model, recipe.data)
        tokenizer = load_tokenizer(recipe.model, source)
        trained = token_indices(recipe.adapter, tokenizer)
        start = find_start(recipe.adapter, tokenizer, recorded=recorded_start(resolve_run(recipe)))
        template, recipe = _load_dated_template(recipe, tokenizer)
        data = prepare_data(recipe.data, tokenizer, template, seed=recipe.training.seed)
        names = zip(recipe.adapter.trainable_tokens, trained, strict=True)
        if unseen := [str(name) for name, token_id in names if data.train.lacks(token_id)]:
            warn(f"adapter.trainable_tokens: {', '.join(unseen)}: in no row of data.sources, so none trains it")
    # Only strategy auto looks at the model; a larger micro-batch is not looked for where the model hardly fits.
    placement = first if recipe.training.auto_micro_batch else place(recipe, config)
    check_halving(recipe, placement)
    if recipe.training.activation_offload and placement.accelerator == "cpu":
        say("training.activation_offload changes nothing on a CPU: activations are in host memory as they are")
    plan = build_plan(len(data.train), recipe.training)
    packing = choose_packing(recipe, data.train, config, attention)
    recipe = with_checkpointing(recipe, config, attention, placement)
    return Job(recipe, source, tokenizer, template, data, plan, packing, placement, attention, start)


def _load_dated_template(recipe: Recipe, tokenizer: Any) -> tuple[ChatTemplate, Recipe]:
    """The chat template, and the recipe with the date that it prints, if any: on another day a run goes on with it."""
    data, path = recipe.data, resolve_run(recipe).recipe
    if data.date is None and path.is_file():
        recorded = read_document(path).value.get("data", {}).get("date")
        data = data.model_copy(update={"date": recorded and datetime.date.fromisoformat(recorded)})
    # Of one process: at midnight another may have the next day.
    date = of_rank_zero("date", str(data.date or datetime.date.today()))
    data = data.model_copy(update={"date": datetime.date.fromisoformat(date)})
    template = load_template(tokenizer, data)
    if template.date is None:
        if (unprinted := unprinted_date(template, recipe.data)) is not None:
            warn(unprinted)
        return template, recipe
    if recipe.data.date is None:
        say(f"the chat template prints the date: {template.date} (data.date)")
    return template, recipe.model_copy(update={"data": data.model_copy(update={"date": template.date})})


def train(job: Job, run: RunDir, checkpoint: Checkpoint | None, *, measure: Measure, signals: StopSignals) -> RunState:
    """Train from `checkpoint`, or from the start; leaves checkpoints and the final adapter in `run`.

    Raises:
        PreemptedError: if a signal ended the run early; everything is saved.
        StopRequested: by a signal while it is measured.
        FinetuneError: for a loss that is not finite, or a disk that is full.
    """
    recipe, placement = job.recipe, job.placement
    state = RunState()
    module = FinetuneModule(recipe, job.source, job.tokenizer, placement, job.attention, job.plan.num_steps, job.start)
    guard = NonFiniteStop(job.data.train)
    preemption = Preemption(state, signals, recipe.checkpoint.grace_seconds)
    meter = Meter(recipe, run, state, job.plan, job.data.train.lengths)
    writer = CheckpointWriter(
        recipe, dump_recipe(recipe), run, state, job.fingerprints, guard, signals, resumed=checkpoint
    )
    callbacks: list[L.Callback] = [_Flow(job, run, checkpoint, state, measure), preemption, guard]
    if job.data.validation is not None and recipe.evaluation.every_steps is not None:
        held_out = job.steps_of(job.data.validation, rank=global_rank(), world_size=placement.world_size)
        stops = job.template.stop_token_ids
        callbacks.append(Validation(recipe, run, state, held_out, stops, preemption.interrupts))
    callbacks += [meter, writer, _LastMeasuring(run, state, meter, measure, signals)]
    trainer = build_trainer(placement, recipe.training, callbacks)
    steps = job.steps_of(job.data.train, rank=trainer.global_rank, world_size=placement.world_size)
    if checkpoint is not None:
        steps.first_step = job.plan.num_steps if is_trained(job, checkpoint) else checkpoint.step
    if recipe.training.on_out_of_memory == "halve":
        module.halving = Halving(steps)
    if recipe.training.auto_micro_batch:
        trainer.callbacks.insert(0, AutoMicroBatch(steps))  # type: ignore[attr-defined]
    with ending_others(trainer), _requeueing(state, signals, checkpoint):
        trainer.fit(module, build_loader(steps, recipe, placement))
        if len(steps) == 0:
            _finish_trained(trainer, module, callbacks, meter)
    if state.is_preempted:
        if trainer.is_global_zero:
            requeue(state.stop_reason)
        leave_together(trainer)
        raise PreemptedError(signals.last_line(f"at step {module.step} of {job.plan.num_steps}"))
    return state


@contextmanager
def _requeueing(state: RunState, signals: StopSignals, checkpoint: Checkpoint | None) -> Iterator[None]:
    """Where a signal ends the block while the model is loaded or measured, queue the job again if anything is saved."""
    try:
        yield
    except StopRequested:
        has_saved = checkpoint is not None or state.adapter_step is not None
        if has_saved and is_rank_zero() and signals.received is not None:
            requeue(signals.received.name)
        raise


def is_trained(job: Job, checkpoint: Checkpoint) -> bool:
    """Whether no step is left: all are done, or the run has stopped early by the recipe as it is now."""
    if checkpoint.step >= job.plan.num_steps:
        return True
    return is_stopped_early(checkpoint.progress, job.recipe.evaluation)


def _finish_trained(trainer: L.Trainer, module: FinetuneModule, callbacks: list[L.Callback], meter: Meter) -> None:
    """For a run killed behind its last checkpoint: Lightning runs no hooks around an empty loader."""
    try:
        for callback in callbacks:
            callback.on_train_start(trainer, module)
        for callback in callbacks:
            callback.on_train_end(trainer, module)
    finally:
        meter.close()


class _Flow(L.Callback):
    """Processes that disagree are refused; resume at the start, or measure the bare base; the final adapter."""

    def __init__(self, job: Job, run: RunDir, checkpoint: Checkpoint | None, state: RunState, measure: Measure) -> None:
        self._job, self._run, self._checkpoint, self._state = job, run, checkpoint, state
        self._measure = measure

    def setup(self, trainer: L.Trainer, module: FinetuneModule, stage: str) -> None:  # type: ignore[override]
        job, packing = self._job, self._job.packing
        settled = {
            "steps in all": job.plan.num_steps,
            "step to go on from": 0 if self._checkpoint is None else self._checkpoint.step,
            # By each machine's memory and libraries, where the recipe leaves it open.
            "distributed.strategy": job.placement.strategy,
            "model.attention": job.attention,
            f"{packing.unit} of a forward pass": packing.size,
        }
        check_agreement(job.recipe, {**job.fingerprints, "test": self._measure.fingerprint}, settled)

    def on_train_start(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        if self._checkpoint is None:
            self._measure.before(module)
            return
        optimizer = module.optimizers(use_pl_optimizer=False)
        name = module.recipe.training.optimizer.name
        saved = restore(self._checkpoint, module.model, optimizer, name)  # type: ignore[arg-type]
        if saved["scaler"]:  # empty where the precision had none
            trainer.precision_plugin.load_state_dict(saved["scaler"])
        self._state.load(self._checkpoint.progress)
        module.step = self._state.step = self._checkpoint.step
        module.num_skipped_steps = self._state.num_skipped_steps
        # Callbacks of others read Lightning's own counter.
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.completed = progress.total.ready = module.step

    def on_train_end(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        if self._state.is_preempted:
            return
        if module.placement.sharded:
            # A validation leaves the root whole, and what rank 0 alone does with the state would split it there alone.
            root: Any = module.loss_model
            root.reshard()
        self._state.adapter_step = module.step
        if module.recipe.ends_with_best:
            take_best(trainer, module, self._run, self._state)
        if trainer.is_global_zero:
            save_final_adapter(self._job, self._run, module)


class _LastMeasuring(L.Callback):
    """What comes after training, when everything is saved and a signal may end the run at once again."""

    def __init__(self, run: RunDir, state: RunState, meter: Meter, measure: Measure, signals: StopSignals) -> None:
        self._run, self._state, self._meter, self._measure, self._signals = run, state, meter, measure, signals

    def on_train_end(self, trainer: L.Trainer, module: FinetuneModule) -> None:  # type: ignore[override]
        if self._state.is_preempted:
            return
        self._meter.close()
        self._signals.saved = f"training is done and the adapter saved in {self._run.adapter}"
        self._signals.doing = "while the trained adapter was measured"
        self._signals.end_deferral()
        self._measure.after(module)


def save_final_adapter(job: Job, run: RunDir, module: FinetuneModule) -> None:
    """Write `adapter/`: PEFT's files, the tokenizer with the template it was trained with, recipe and fingerprints.

    Raises:
        FinetuneError: if it cannot be written; an adapter that stood there still does.
    """
    new = run.adapter.with_name(".adapter-new")
    parts: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_NAME: lambda file: save_weights(adapter_state(module.model), file),
        CONFIG_NAME: lambda file: file.write_text(config_text(module.model), encoding="utf-8"),
        "tokenizer": lambda file: save_tokenizer(job.tokenizer, file.parent),
        RECIPE: lambda file: file.write_text(dump_recipe(job.recipe), encoding="utf-8"),
        FINGERPRINTS: lambda file: file.write_text(json.dumps(job.fingerprints, indent=2) + "\n", encoding="utf-8"),
    }
    try:
        write_parts(new, parts)
        replace_directory(new, run.adapter)
    except OSError as error:
        raise FinetuneError(
            f"cannot write the adapter {run.adapter}: {error}; training is done and its last checkpoint whole: "
            "free some space, then run the same command again"
        ) from error


def build_loader(steps: StepDataset, recipe: Recipe, placement: Placement) -> DataLoader[Any]:
    """The loader of a rank's steps: one item is one optimizer step."""
    workers = recipe.training.num_workers
    if workers:
        # The loader's processes and their server would die of a signal that a terminal or SLURM sends to all of a run.
        with blocked():
            forkserver.ensure_running()
    return DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=placement.accelerator == "cuda",
        prefetch_factor=4 if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=leave_to_parent if workers else None,
    )


def choose_packing(recipe: Recipe, train: TokenDataset, config: Any, attention: str) -> Packing:
    """How the training samples are packed; says what `auto` has chosen, and why not if they cannot be."""
    data, training = recipe.data, recipe.training
    mode = data.packing
    why_not, rope = why_not_packed(config, attention, data.max_seq_len), stretched_rope(config, data.max_seq_len)
    if mode == "auto":
        mode = "shared_prefix" if why_not is None else "none"
        if why_not is not None:
            idle = "" if data.max_tokens is None else "; data.max_tokens, of packed rows, has no effect"
            say(f"packing: none ({why_not}){idle}")
    prefixes = find_prefixes(train) if mode == "shared_prefix" else no_prefixes(len(train))
    if data.packing == "auto" and mode == "shared_prefix":
        shared = sum(prefixes.of(sample) for sample in range(len(train)))
        mode = "shared_prefix" if shared >= 0.05 * int(train.lengths.sum()) else "isolated"
        if mode == "isolated":
            prefixes = no_prefixes(len(train))
        say(f"packing: {mode} ({shared / max(1, int(train.lengths.sum())):.0%} of the tokens open alike)")
    max_tokens = data.max_tokens or training.micro_batch_size * data.max_seq_len
    limit = None if rope is None else rope.limit
    if rope is not None and rope.kind != "longrope":
        say(
            f"rotary embedding: {rope.kind}: a sample of more than {limit} tokens gets the frequencies of the longest "
            f"since one of fewer, so its loss depends on their order; data.max_seq_len: {limit} keeps to one set"
        )
    return Packing(mode != "none", training.micro_batch_size, max_tokens, prefixes, data.row_multiple, limit)


def _without_prefixes(packing: Packing, num_samples: int) -> Packing:
    return replace(packing, prefixes=no_prefixes(num_samples))


def resolve_run(recipe: Recipe) -> RunDir:
    """The recipe's run directory, made absolute: processes may be started elsewhere."""
    return RunDir(Path(recipe.run_path).resolve())
