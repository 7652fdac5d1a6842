"""`finetune evaluate`: the recipe's metrics of base, adapter and merged model in one table, kept in results.json."""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments import positive
from finetune.console import progress_bar, say, stdout, warn
from finetune.errors import EXIT_OK, BadInputError, DataError
from finetune.files import write_atomic
from finetune.run_dir import UNUSABLE, RunDir, read_results

if TYPE_CHECKING:
    from finetune.data.dataset import TokenDataset
    from finetune.data.prepare import Row
    from finetune.export.places import RunPlace
    from finetune.inference.load import LoadedRun

Metrics = dict[str, float]

# Logits of so many positions at once: 0.2 GB for a vocabulary of 150,000.
_POSITIONS_AT_ONCE = 256


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run's directory, an adapter's, or hf://ORG/NAME")
    parser.add_argument(
        "--merged", type=Path, metavar="DIR", help="a merged model (default: what finetune merge RUN wrote)"
    )
    parser.add_argument("--rows", type=positive, metavar="N", help="only the first test rows (default: the recipe's)")
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="tasks of the lm-eval package, separated by commas, instead of the recipe's metrics; "
        "--rows limits the rows of each",
    )
    parser.add_argument(
        "--lm-eval-tasks", type=Path, metavar="DIR", help="a directory of further lm-eval tasks (YAML files)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure every model, print the table and append it to results.json."""
    tasks = [task.strip() for task in (arguments.lm_eval or "").split(",") if task.strip()]
    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.evaluation.harness import require_harness
        from finetune.export.places import find_place
        from finetune.inference.load import find_run

    if arguments.lm_eval is not None or arguments.lm_eval_tasks is not None:
        require_harness(tasks, arguments.lm_eval_tasks)
    place = find_place(arguments.run)
    if not tasks and not place.is_merged and find_run(place.folder)[0] is None:
        raise BadInputError(
            f"{place.given}: was trained by another program, and its files name no rows to measure it on; give "
            "--lm-eval TASKS, or write a recipe.yaml beside it that names base and data"
        )
    merged = _merged_folder(place, arguments.merged)
    measure = _LmEval(tasks, arguments.lm_eval_tasks, arguments.rows) if tasks else _Task(arguments.rows)
    start = time.time()
    results: dict[str, Metrics] = {}
    for name, loaded in _models(place.folder, merged):
        results[name] = measure(loaded, name)
        del loaded  # the next model needs the room
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
        "metrics": results,
        "num_rows": measure.num_rows,
        "lm_eval_tasks": tasks,
        "merged": None if merged is None else str(merged),
    }
    # Printed first: they took long, and a colleague's run may be read-only.
    _print(results)
    if place.run is not None:
        _append(place.run, record)
    else:
        say("these figures are not kept: only a run's directory holds results.json")
    return EXIT_OK


def _merged_folder(place: RunPlace, given: Path | None) -> Path | None:
    from finetune.export.places import staleness
    from finetune.inference.load import find_run

    folder = place.merged if given is None else given
    if not (folder / "config.json").is_file():
        if given is not None:
            raise BadInputError(f"{folder}: holds no merged model; make one: finetune merge {place.given}")
        return None
    if (folder / UNUSABLE).is_file():
        warn(f"{folder} has failed its check (see {folder / UNUSABLE}); it is measured all the same")
    if (warning := staleness(folder, find_run(place.folder)[1])) is not None:
        warn(warning)
    return folder


def _models(run_path: Path, merged: Path | None) -> Iterator[tuple[str, LoadedRun]]:
    """Base, adapter and merged model, one in memory at a time."""
    from finetune.commands.merge import load_merged
    from finetune.inference.load import LoadedRun, load_run

    loaded = load_run(run_path)
    model: Any = loaded.model
    rewrites = loaded.recipe.adapter.rewrites_base
    with nullcontext() if rewrites else model.disable_adapter():
        bare = load_run(run_path, base_only=True).model if rewrites else model
        yield "base", replace(loaded, model=bare)
        del bare
    yield "adapter", loaded
    if merged is not None:
        device, attention = _placement(model)
        tokenizer, template, recipe = loaded.tokenizer, loaded.template, loaded.recipe
        del loaded, model
        gc.collect()
        whole = load_merged(merged, recipe, device=device, attention=attention)
        yield "merged", LoadedRun(whole, tokenizer, template, recipe, None)


def _placement(model: Any) -> tuple[Any, str]:
    from finetune.inference.mode import base_of

    base = base_of(model)
    return base.get_input_embeddings().weight.device, str(base.config._attn_implementation)


@dataclass
class _Task:
    """The recipe's metrics on its test rows."""

    max_rows: int | None
    num_rows: int = 0
    data: tuple[list[Row], TokenDataset | None] | None = field(default=None, repr=False)

    def __call__(self, loaded: LoadedRun, name: str) -> Metrics:
        from finetune.evaluation.task import evaluate_task

        section = loaded.recipe.evaluation
        if self.max_rows is not None:
            section = section.model_copy(update={"max_rows": self.max_rows})
        # Completions that are only shown are not measured.
        section = section.model_copy(update={"num_samples": 0})
        if self.data is None:
            self.data = self._load(loaded, section)
        rows, tokens = self.data
        metrics: Metrics = {}
        if rows:
            with progress_bar(f"{name}: completing", len(rows)) as bar:
                result = evaluate_task(
                    loaded.model, loaded.tokenizer, loaded.template, rows, section, on_batch=bar.advance
                )
            metrics.update(result.metrics)
            if result.num_cut:
                say(f"{name}: {result.cut_note(section.max_new_tokens)}")
        if tokens is not None:
            metrics["perplexity"] = perplexity(loaded.model, tokens, name)
        return metrics

    def _load(self, loaded: LoadedRun, section: Any) -> tuple[list[Row], TokenDataset | None]:
        from finetune.evaluation.task import load_rows

        recipe = loaded.recipe.model_copy(update={"evaluation": section})
        rows, tokens = load_rows(recipe, loaded.tokenizer, loaded.template)
        self.num_rows = max(len(rows), 0 if tokens is None else len(tokens.row_hashes()))
        if not self.num_rows:
            raise DataError(
                "evaluation: there is nothing to measure: set evaluation.source or data.validation.size, "
                "and evaluation.metrics, in the run's recipe.yaml"
            )
        return rows, tokens


def perplexity(model: Any, tokens: TokenDataset, name: str = "model") -> float:
    """exp of the mean cross-entropy over the supervised tokens."""
    import torch

    from finetune.inference.mode import base_of, inference_mode
    from finetune.models.heads import decoder_of, head_logits

    causal_lm = base_of(model)
    device = causal_lm.get_input_embeddings().weight.device
    total, count = 0.0, 0
    with inference_mode(model), progress_bar(f"{name}: perplexity", len(tokens)) as bar:
        for index in range(len(tokens)):
            ids, supervised = tokens[index]
            input_ids = torch.as_tensor(ids, dtype=torch.int64, device=device)[None]
            positions = torch.as_tensor(supervised[1:], device=device).nonzero()[:, 0]
            hidden = decoder_of(causal_lm)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            for part in positions.split(_POSITIONS_AT_ONCE):
                logits = head_logits(causal_lm, hidden[part]).float()
                loss = torch.nn.functional.cross_entropy(logits, input_ids[0, part + 1], reduction="sum")
                total += loss.item()
            count += len(positions)
            bar.advance()
    return math.exp(min(total / max(1, count), 80.0))


@dataclass
class _LmEval:
    """Tasks of the lm-eval package."""

    tasks: list[str]
    folder: Path | None
    limit: int | None
    num_rows: int | None = None

    def __call__(self, loaded: LoadedRun, name: str) -> Metrics:
        from finetune.evaluation.harness import run_tasks

        say(f"{name}: lm-eval {', '.join(self.tasks)}")
        self.num_rows = self.limit
        return run_tasks(
            loaded.model,
            loaded.tokenizer,
            self.tasks,
            folder=self.folder,
            max_rows=self.limit,
            batch_size=loaded.recipe.evaluation.batch_size,
        )


def _append(run: RunDir, record: dict[str, Any]) -> None:
    try:
        results = read_results(run)
        results.setdefault("evaluations", []).append(record)
        write_atomic(run.results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        warn(f"these figures are not kept: cannot write {run.results}: {error.strerror}")
    except BadInputError as error:
        warn(f"these figures are not kept: {error}")


def _print(results: dict[str, Metrics]) -> None:
    from finetune.evaluation.tables import models_table

    stdout.print(models_table(results))
