"""Whether the lengths of a recipe fit what its base was made for."""

from __future__ import annotations

from typing import Any

from finetune.data.prepare import PreparedData, Row, prepare_rows, prepare_validation_rows
from finetune.data.template import ChatTemplate, encode_prompt
from finetune.models.load import context_length
from finetune.recipe.schema import Recipe


def too_long_samples(recipe: Recipe, config: Any) -> str | None:
    """What to say where samples may be longer than the base's context."""
    longest = context_length(config)
    if longest is None or recipe.data.max_seq_len <= longest:
        return None
    return f"data.max_seq_len: {recipe.data.max_seq_len}, but the model was made for {longest}"


def too_long_completions(
    recipe: Recipe, config: Any, tokenizer: Any, template: ChatTemplate, data: PreparedData
) -> str | None:
    """What to say where a test row's prompt leaves too little of the base's context for `max_new_tokens`."""
    section, longest = recipe.evaluation, context_length(config)
    completes = bool(section.num_samples or section.task_metrics)
    if longest is None or not completes:
        return None
    rows: list[Row] = []
    if section.source is not None:
        rows = prepare_rows(section.source, recipe.data, tokenizer, template, max_rows=section.max_rows)
    # A prompt is shorter than its sample: rows are read again only where one could be too long.
    elif data.validation is not None and data.validation.lengths.max() + section.max_new_tokens > longest:
        seed = recipe.training.seed
        rows = prepare_validation_rows(recipe.data, tokenizer, template, seed=seed, max_rows=section.max_rows)
    lengths = [len(encode_prompt(tokenizer, template, row.messages, tools=row.tools)) for row in rows]
    prompt = max(lengths, default=0)
    if prompt + section.max_new_tokens <= longest:
        return None
    return (
        f"evaluation.max_new_tokens: {section.max_new_tokens} after a prompt of {prompt} tokens is more than the "
        f"model's context of {longest}: completions end there"
    )
