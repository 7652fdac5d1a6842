"""`finetune run`: a recipe in, a measured adapter out. Composes the stages and knows no details of them."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments import add_overrides
from finetune.console import outlive_readers, progress_bar, say, stdout, warn
from finetune.distributed import end_with_rank_zero, is_rank_zero
from finetune.errors import EXIT_OK, BadInputError, PreemptedError
from finetune.files import recover_directory, sole_owner, write_atomic
from finetune.machine import (
    describe_machine,
    library_versions,
    naming_out_of_memory,
    peak_memory_bytes,
    release_freed_memory,
)
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.shipped import find_recipe
from finetune.run_dir import RunDir, read_results
from finetune.stop_signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from finetune.evaluation.task import TaskResult
    from finetune.export.hub_provenance import Provenance
    from finetune.recipe.schema import Recipe
    from finetune.training.checkpoint import Checkpoint
    from finetune.training.module import FinetuneModule
    from finetune.training.state import RunState
    from finetune.training.train import Job


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "recipe", help="a recipe's file, the name of a shipped one, an adapter's directory, or hf://ORG/NAME"
    )
    add_overrides(parser)
    parser.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this checkpoint")
    parser.add_argument(
        "--accept-changes", action="store_true", help="continue although the recipe, data or base has changed"
    )
    parser.add_argument("--fresh", action="store_true", help="put earlier work of this run aside and start anew")


def run(arguments: argparse.Namespace) -> int:
    """Train, measure and save; continue where an earlier call was stopped."""
    end_with_rank_zero()
    outlive_readers()
    with StopSignals(_continuing_command(arguments)) as signals:
        try:
            return _run(arguments, signals)
        except StopRequested:
            raise PreemptedError(signals.last_line()) from None


def _continuing_command(arguments: argparse.Namespace) -> str:
    """What goes on with a stopped run: not --fresh, which would put it aside, and not --resume, which goes back."""
    accept = ["--accept-changes"] if arguments.accept_changes else []
    return shlex.join(["finetune", "run", arguments.recipe, *arguments.overrides, *accept])


def _run(arguments: argparse.Namespace, signals: StopSignals) -> int:
    recipe, provenance = _read_recipe(arguments)
    _check_cheap_things(recipe)

    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.models.start import keep_start
        from finetune.training.resume import keep_outside
        from finetune.training.train import resolve_run

    run_dir = resolve_run(recipe)
    with ExitStack() as stack:
        if is_rank_zero():
            if arguments.fresh:
                keep_outside(run_dir, arguments.resume)
            made = [folder for folder in (run_dir.root, *run_dir.root.parents) if not folder.exists()]
            _own(run_dir, stack)
            stack.callback(_leave_nothing, run_dir, made)
            for folder in (run_dir.root, run_dir.checkpoints, *run_dir.checkpoints.glob("step-*")):
                recover_directory(folder, spare=(f".{run_dir.merged.name}",))  # `finetune merge` may be at work there
            if arguments.fresh:
                keep_start(recipe.adapter, run_dir.root)
                _put_aside(run_dir)
        return _run_recipe(recipe, run_dir, provenance, arguments, signals)


def _read_recipe(arguments: argparse.Namespace) -> tuple[Recipe, Provenance | None]:
    """The recipe of a file, or the one that an adapter carries."""
    from finetune.export.hub_provenance import is_provenance, load_provenance

    if not is_provenance(arguments.recipe):
        return load_recipe(find_recipe(arguments.recipe), arguments.overrides), None
    provenance = load_provenance(arguments.recipe, arguments.overrides)
    return load_recipe(provenance.recipe, [*provenance.overrides, *arguments.overrides]), provenance


def _check_cheap_things(recipe: Recipe) -> None:
    """What `finetune check --no-model` would call an error; the rest is met on the way."""
    from finetune.findings import run_checks
    from finetune.recipe.idle import find_idle
    from finetune.recipe.preflight import BEFORE_RUN, CHECKS

    rows = {topic: CHECKS[topic] for topic in BEFORE_RUN}
    problems = [finding.text for finding in run_checks(rows, recipe) if finding.level == "error"]
    if problems:
        raise BadInputError("\n".join(problems))
    for line in find_idle(recipe):
        warn(line)


def _own(run_dir: RunDir, stack: ExitStack) -> None:
    try:
        stack.enter_context(sole_owner(run_dir.lock))
    except BlockingIOError as error:
        raise BadInputError(
            f"{run_dir.root} is in use by {error}; wait for it, or give this run another name"
        ) from None
    except OSError as error:
        raise BadInputError(f"output_dir: cannot write to {run_dir.root}: {error.strerror}") from error


def _leave_nothing(run_dir: RunDir, made: list[Path]) -> None:
    """Remove the directories that were `made` for a run, the innermost first, which was refused before it wrote."""
    with suppress(OSError):
        if [path.name for path in run_dir.root.iterdir()] == [run_dir.lock.name]:
            run_dir.lock.unlink()
            for folder in made:
                folder.rmdir()


def _put_aside(run_dir: RunDir) -> None:
    # The checkpoints last: a kill in between leaves a run that goes on, or is put aside as well.
    paths = sorted((path for path in run_dir.root.iterdir() if path != run_dir.lock), key=run_dir.checkpoints.__eq__)
    if not paths:
        return
    aside = run_dir.root.with_name(f"{run_dir.root.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    say(f"earlier work put aside in {aside}")


def _run_recipe(
    recipe: Recipe,
    run_dir: RunDir,
    provenance: Provenance | None,
    arguments: argparse.Namespace,
    signals: StopSignals,
) -> int:
    from finetune.export.hub_provenance import check_fingerprints
    from finetune.export.hub_publish import check_push, push_recipe
    from finetune.models.start import compare_base
    from finetune.report.html import write_report
    from finetune.training.resume import find_checkpoint, put_later_aside
    from finetune.training.strategy import check_dora
    from finetune.training.trackers import check_trackers
    from finetune.training.train import prepare_job, train

    check_trackers(recipe.logging)
    if recipe.hub.push and is_rank_zero():
        check_push(recipe.hub, run_dir.root)
    job = prepare_job(recipe)
    recipe = job.recipe
    if provenance is not None and is_rank_zero():
        check_fingerprints(provenance, job.fingerprints, arguments.overrides)
    check_dora(recipe, job.placement)
    if job.start is not None and job.start.folder is not None and is_rank_zero():
        say(f"starting from the adapter in {job.start.folder}")
        compare_base(job.start.folder, job.fingerprints["base"])
    checkpoint = find_checkpoint(
        run_dir, arguments.resume, dump_recipe(recipe), job.fingerprints, accept_changes=arguments.accept_changes
    )
    if is_rank_zero():
        write_atomic(run_dir.recipe, dump_recipe(recipe))
        job.data.ledger.write(run_dir)
        put_later_aside(run_dir, 0 if checkpoint is None else checkpoint.step)
    for line in job.data.ledger.summary_lines():
        say(line)
    _say_plan(job, checkpoint)
    if checkpoint is not None:
        signals.doing = "before training went on"
        signals.saved = f"step {checkpoint.step} is saved in {checkpoint.path}"
    measure = _Measure(job, run_dir)
    if _is_finished(job, run_dir, checkpoint):
        say("this run is finished; --fresh starts it anew")
    else:
        if is_rank_zero():
            _forget_training(run_dir)
        state = train(job, run_dir, checkpoint, measure=measure, signals=signals)
        if is_rank_zero():
            _record_training(run_dir, job, state)
    signals.doing, signals.saved = "after training", f"everything is saved in {run_dir.root}"
    if is_rank_zero():
        try:
            write_report(run_dir)
        except Exception as error:
            # The run is done and saved: a page about it must not make it look failed.
            warn(f"report.html was not written: {error!r}")
        _summarize(run_dir)
        if recipe.hub.push:
            say(f"pushed to {push_recipe(recipe.hub, run_dir.root).url}")
    return EXIT_OK


def _say_plan(job: Job, checkpoint: Checkpoint | None) -> None:
    from finetune.training.habits import why_bf16_is_slow

    plan = job.plan
    text = f"{plan.num_steps} steps of {plan.global_batch_size} samples, {plan.epoch(plan.num_steps):.2f} epochs"
    if checkpoint is not None:
        loss = checkpoint.progress.get("loss")
        shown = "" if loss is None else f", where the loss was {loss:.4f}"
        text = f"continuing from step {checkpoint.step} of {plan.num_steps}{shown}"
    placement = job.placement
    say(f"{text}; {placement.world_size} x {placement.accelerator}, {placement.strategy}, attention {job.attention}")
    if placement.cpu_offload and placement.accelerator == "cpu":
        say("distributed.cpu_offload changes nothing on a CPU: the base is in host memory as it is")
    if placement.world_size > 1:
        say(f"work per step: the slowest of {placement.world_size} ranks has {job.rank_imbalance:.1%} over the mean")
    if (slow := why_bf16_is_slow(job.recipe, placement)) is not None:
        warn(slow)


class _Measure:
    """Task metrics and perplexity of the model, before and after, into results.json."""

    def __init__(self, job: Job, run_dir: RunDir) -> None:
        from finetune.evaluation.task import fingerprint_of_rows, load_rows

        self._job, self._run_dir = job, run_dir
        self._rows, self._tokens = load_rows(job.recipe, job.tokenizer, job.template)
        self.fingerprint = fingerprint_of_rows(self._rows, self._tokens)
        self._num_trained: int | None = None
        if job.recipe.evaluation.source is not None:
            self._compare(job)

    def _compare(self, job: Job) -> None:
        """Test rows that are trained on make the figures look better than they are."""
        from finetune.evaluation.task import count_trained

        count = self._num_trained = count_trained(self._rows, self._tokens, job.data.train)
        if count:
            warn(f"{count:,} test rows are also in the training data")
            job.data.ledger.test_rows_in_train = count
            if is_rank_zero():
                job.data.ledger.write(self._run_dir)

    def before(self, module: FinetuneModule) -> None:
        """The bare base: a fresh adapter changes nothing, and one that training starts from is switched off."""
        if self._job.recipe.evaluation.before:
            with nullcontext() if self._job.start is None else module.model.disable_adapter():
                self._measure(module, "before")

    def after(self, module: FinetuneModule) -> None:
        """The trained adapter."""
        self._measure(module, "after")

    def _measure(self, module: FinetuneModule, when: str) -> None:
        from finetune.training.out_of_memory import LESS_FOR_VALIDATION

        what = "the bare base" if when == "before" else "the trained adapter"
        with naming_out_of_memory(f"while {what} was measured", LESS_FOR_VALIDATION):
            self._measure_model(module, when, what)

    def _measure_model(self, module: FinetuneModule, when: str, what: str) -> None:
        from finetune.evaluation.task import evaluate_task
        from finetune.training.validation import mean_loss

        # What training leaves behind would stand beside what generation needs.
        release_freed_memory()
        result: TaskResult | None = None
        metrics: dict[str, float] = {}
        section = self._job.recipe.evaluation
        if self._rows:
            with module.gathered(), progress_bar(f"measuring {what}: completions", len(self._rows)) as bar:
                result = evaluate_task(
                    module.model,
                    self._job.tokenizer,
                    self._job.template,
                    self._rows,
                    section,
                    on_batch=bar.advance,
                )
            metrics.update(result.metrics)
            if result.num_cut:
                say(result.cut_note(section.max_new_tokens, f"completions of {what}"))
        if self._tokens is not None and "perplexity" in section.metrics:
            placement = self._job.placement
            steps = self._job.steps_of(self._tokens, rank=module.global_rank, world_size=placement.world_size)
            with progress_bar(f"measuring {what}: perplexity", len(self._tokens)) as bar:
                metrics["perplexity"] = math.exp(min(mean_loss(module, steps, on_samples=bar.advance), 80.0))
        release_freed_memory()
        if module.global_rank == 0:
            _record(self._run_dir, when, metrics, result, self._num_trained)


def _record(
    run_dir: RunDir, when: str, metrics: dict[str, float], result: TaskResult | None, num_trained: int | None
) -> None:
    results = read_results(run_dir)
    results[when] = {"metrics": metrics, "samples": [vars(sample) for sample in result.samples] if result else []}
    if result is not None:
        results[when] |= {"num_rows": result.num_rows, "num_cut": result.num_cut}
    if num_trained is not None:
        results[when]["test_rows_in_train"] = num_trained
    _write_results(run_dir, results)


def _is_finished(job: Job, run_dir: RunDir, checkpoint: Checkpoint | None) -> bool:
    """Whether the last record is there, of the weights that the recipe asks for, by rank 0, who alone may see it."""
    from finetune.training.train import is_trained
    from finetune.training.turns import of_rank_zero

    training, ending = read_results(run_dir).get("training"), _ending(job.recipe)
    is_measured = run_dir.adapter.is_dir() and training is not None and training.get("ends_with", ending) == ending
    finished = is_measured and checkpoint is not None and is_trained(job, checkpoint)
    return bool(of_rank_zero("finished", finished, until_heard=True))


def _ending(recipe: Recipe) -> str:
    return "best" if recipe.ends_with_best else "last"


def _record_training(run_dir: RunDir, job: Job, state: RunState) -> None:
    results = read_results(run_dir)
    results["training"] = {
        "steps": state.step,
        "planned_steps": job.plan.num_steps,
        "adapter_step": state.adapter_step,
        "ends_with": _ending(job.recipe),
        "skipped_steps": state.num_skipped_steps,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / max(1e-9, state.seconds), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "world_size": job.placement.world_size,
        "strategy": job.placement.strategy,
        "rank_imbalance": round(job.rank_imbalance, 4),
        "machine": describe_machine(),
        "versions": library_versions(),
    }
    _write_results(run_dir, results)


def _forget_training(run_dir: RunDir) -> None:
    """Take out what an earlier, shorter run of this directory measured: it is being trained further."""
    results = read_results(run_dir)
    kept = {key: value for key, value in results.items() if key not in ("after", "training")}
    if kept != results:
        _write_results(run_dir, kept)


def _write_results(run_dir: RunDir, results: dict[str, Any]) -> None:
    write_atomic(run_dir.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _summarize(run_dir: RunDir) -> None:
    from finetune.evaluation.tables import comparison_table, samples_table
    from finetune.evaluation.task import Sample

    results = read_results(run_dir)
    before, after = results.get("before"), results.get("after")
    if after is not None:
        old = [Sample(**sample) for sample in before["samples"]] if before else None
        new = [Sample(**sample) for sample in after["samples"]]
        if new:
            stdout.print(samples_table(old, new))
        if after["metrics"]:
            stdout.print(comparison_table(before["metrics"] if before else None, after["metrics"]))
    if (training := results.get("training")) is not None:
        skipped = training.get("skipped_steps", 0)
        left_out = f" ({skipped} of them left out: not finite)" if skipped else ""
        stdout.print(
            f"{training['steps']} steps{left_out}, {training['tokens']:,} tokens in {training['seconds']:.0f} s: "
            f"{training['tokens_per_second']:,.0f} tokens/s, peak memory {training['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    here = Path.cwd()
    shown = RunDir(run_dir.root.relative_to(here)) if run_dir.root.is_relative_to(here) else run_dir
    stdout.print(f"adapter   {shown.adapter}{_other_step(training)}", markup=False)
    stdout.print(f"report    {shown.report}", markup=False)
    stdout.print(f"try it    finetune generate {shlex.quote(str(shown.root))} --prompt 'your text'", markup=False)


def _other_step(training: dict[str, Any] | None) -> str:
    """Which step the adapter is from, where that is not the last."""
    step = (training or {}).get("adapter_step")
    is_last = training is None or step in (None, training["steps"])
    return "" if is_last else f" (of step {step}, where validation loss was lowest)"
