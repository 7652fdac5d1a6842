"""Tasks of the lm-eval package (EleutherAI's LM Evaluation Harness) on a model that is loaded already."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from finetune.errors import BadInputError, FinetuneError, first_line
from finetune.inference.dense import dense_weights
from finetune.inference.mode import base_of, inference_mode


def require_harness(tasks: Sequence[str], folder: Path | None = None) -> None:
    """Before anything is loaded: is the package there, is a task named?

    Raises:
        BadInputError: no, or `folder` is none.
    """
    if not tasks:
        raise BadInputError("--lm-eval: name one or several tasks, e.g. --lm-eval arc_easy,hellaswag")
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInputError("--lm-eval: the lm-eval package is not installed; install it: pip install 'lm-eval>=0.4'")
    if folder is not None and not folder.is_dir():
        raise BadInputError(f"--lm-eval-tasks {folder}: no such directory; give one that holds tasks' YAML files")


def run_tasks(
    model: torch.nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    max_rows: int | None = None,
    batch_size: int = 1,
) -> dict[str, float]:
    """`TASK METRIC` to value for each of the tasks; their standard errors are left out.

    Prompts are the tasks' own, without chat template. `folder` holds further tasks. The model is left as it was.

    Raises:
        FinetuneError: lm-eval does not know a task, cannot load its data, or fails.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = _task_manager(folder)
        # Twice: HFLM sets the model's mode, and the inner one keeps 4-bit weights from being repacked.
        with inference_mode(model), _harness_model(model, tokenizer, batch_size) as wrapped, inference_mode(model):
            found = importlib.import_module("lm_eval").simple_evaluate(
                model=wrapped, tasks=list(tasks), limit=max_rows, task_manager=manager, bootstrap_iters=0
            )
    except Exception as error:  # tasks are programs of others: they may raise anything
        raise FinetuneError(
            f"--lm-eval {','.join(tasks)}: lm-eval failed: {type(error).__name__}: {first_line(error)}\n"
            "  `lm-eval ls tasks` lists the tasks that it knows; most fetch their data from the Hub"
        ) from error
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }


@cache
def _task_manager(folder: Path | None) -> Any:
    """The index of all tasks: thousands of files are read for it."""
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=None if folder is None else str(folder))


@contextmanager
def _harness_model(model: Any, tokenizer: Any, batch_size: int) -> Iterator[Any]:
    # The layers carry the adapter, so the model inside a PeftModel is the adapted one.
    causal_lm = base_of(model)
    # HFLM ties the head to the embeddings again, also where an adapter has trained one of them.
    causal_lm.tie_weights = lambda *_, **__: None
    try:
        with dense_weights(model):
            yield importlib.import_module("lm_eval.models.huggingface").HFLM(
                pretrained=causal_lm, tokenizer=tokenizer, batch_size=batch_size
            )
    finally:
        del causal_lm.tie_weights
