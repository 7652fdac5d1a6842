"""Measuring a model on rows: its completions, their metrics, and the first ones to look at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.prepare import Row, prepare_data, prepare_rows, prepare_test, prepare_validation_rows
from finetune.data.template import ChatTemplate, encode_prompt
from finetune.errors import DataError
from finetune.evaluation.metrics import METRICS
from finetune.inference.generate import Sampling, generate
from finetune.recipe.schema import EvaluationSection, Recipe

if TYPE_CHECKING:
    import torch

    from finetune.data.dataset import TokenDataset


@dataclass(frozen=True)
class Sample:
    """A completion beside what was asked and expected."""

    prompt: str
    expected: str
    completion: str
    stopped: bool


@dataclass(frozen=True)
class TaskResult:
    """What a model did on the rows."""

    metrics: dict[str, float]
    samples: list[Sample]
    num_rows: int  # completed
    num_cut: int  # of them, ended by max_new_tokens
    seconds: float
    new_tokens: int

    def cut_note(self, max_new_tokens: int, which: str = "completions") -> str:
        """How many the limit has ended, in words: an answer that is cut may count as a wrong one."""
        counts = f"{self.num_cut:,} of {self.num_rows:,}"
        return f"{counts} {which} were cut at evaluation.max_new_tokens: {max_new_tokens}"


def load_rows(recipe: Recipe, tokenizer: Any, template: ChatTemplate) -> tuple[list[Row], TokenDataset | None]:
    """The test rows of a recipe, for completions and as tokens for perplexity; [] and None if not asked for.

    They come from `evaluation.source`, else from the validation rows.

    Raises:
        DataError: the source is missing, empty or of unknown shape, or has no answers for a metric that needs them.
    """
    section, data, seed = recipe.evaluation, recipe.data, recipe.training.seed
    if section.source is None and not data.validation.has_rows:
        return [], None
    rows: list[Row] = []
    limit = _num_completed(section)
    if limit != 0 and section.source is not None:
        rows = prepare_rows(section.source, data, tokenizer, template, max_rows=limit)
    elif limit != 0:
        rows = prepare_validation_rows(data, tokenizer, template, seed=seed, max_rows=limit)
    if section.task_metrics and not rows:
        raise DataError(
            f"evaluation.metrics: {', '.join(section.task_metrics)} compares answers, and the test rows have none, "
            "as text rows; use perplexity, or set evaluation.source to rows with answers."
        )
    if "perplexity" not in section.metrics:
        return rows, None
    if section.source is None:
        tokens = prepare_data(data, tokenizer, template, seed=seed).validation
    else:
        tokens = prepare_test(section.source, data, tokenizer, template, seed=seed)
    return rows, tokens.first_rows(section.max_rows) if tokens is not None and section.max_rows else tokens


def fingerprint_of_rows(rows: Sequence[Row], tokens: TokenDataset | None) -> str:
    """A hash of the test rows, as `load_rows` gives them."""
    parts = [*(str(row.digest) for row in rows), "" if tokens is None else tokens.fingerprint]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def count_trained(rows: Sequence[Row], tokens: TokenDataset | None, train: TokenDataset) -> int:
    """How many of the test rows (as `load_rows` gives them) are rows of `train`, word for word."""
    trained = train.row_hashes()
    tested = [np.array([row.digest for row in rows], np.uint64)]
    tested += [] if tokens is None else [tokens.row_hashes()]
    return max(int(np.isin(hashes, trained).sum()) for hashes in tested)


def evaluate_task(
    model: torch.nn.Module,
    tokenizer: Any,
    template: ChatTemplate,
    rows: list[Row],
    section: EvaluationSection,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> TaskResult:
    """Greedy completions of `rows` (at most `section.max_rows`) and the section's metrics of them.

    Without a task metric only the samples are completed. Samples are the first rows, the same every time.
    What the template opens an answer with is taken off its completion (see `Row.opening`).
    The model is left as it was found. Perplexity is not among the metrics: it is measured on tokens.
    """
    rows = rows[: _num_completed(section)]
    start = time.perf_counter()
    prompts = [encode_prompt(tokenizer, template, row.messages, tools=row.tools) for row in rows]
    sampling = Sampling(max_new_tokens=section.max_new_tokens)
    completions = generate(
        model,
        tokenizer,
        prompts,
        template.stop_token_ids,
        sampling,
        batch_size=section.batch_size,
        on_batch=on_batch,
    )
    texts = [completion.text.removeprefix(row.opening) for row, completion in zip(rows, completions, strict=True)]
    metrics = {name: METRICS[name](rows, texts) for name in section.task_metrics} if rows else {}
    samples = [
        Sample(prompt_text(row.messages), row.expected, text, completion.stopped)
        for row, text, completion in list(zip(rows, texts, completions, strict=True))[: section.num_samples]
    ]
    return TaskResult(
        metrics,
        samples,
        num_rows=len(rows),
        num_cut=sum(not completion.stopped for completion in completions),
        seconds=time.perf_counter() - start,
        new_tokens=sum(len(completion.token_ids) for completion in completions),
    )


def _num_completed(section: EvaluationSection) -> int | None:
    """How many rows are completed; None for all of them."""
    if section.task_metrics:
        return section.max_rows
    return min(section.num_samples, section.max_rows or section.num_samples)


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a reader needs of a prompt: the user's message, or a conversation's turns, without system text."""
    turns = [message for message in messages if message["role"] != "system"] or messages
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
