"""`finetune preview`: the first rows as the model will see them, token by token; no weights are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.arguments import add_overrides, positive
from finetune.errors import EXIT_OK, BadInputError
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import find_recipe

if TYPE_CHECKING:
    from finetune.report.preview import Preview
    from finetune.report.tokens import RowView
    from finetune.training.train import Job

_DEFAULT_ROWS = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="a recipe's file, or the name of a shipped one")
    add_overrides(parser)
    parser.add_argument("--row", type=positive, metavar="N", help="only the N-th row, in the order of training")
    parser.add_argument("--rows", type=positive, metavar="K", help=f"so many rows (default: {_DEFAULT_ROWS})")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page instead")


def run(arguments: argparse.Namespace) -> int:
    """Prepare the data as `run` does and show its first rows, or the ones asked for."""
    recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)

    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.commands.compare import write_page
        from finetune.console import stdout
        from finetune.files import require_own
        from finetune.models.sources import describe_model
        from finetune.report.page import PAGE_MARK
        from finetune.report.preview import preview_html, print_preview
        from finetune.training.train import prepare_job

    if arguments.html is not None:
        require_own(arguments.html, "--html", PAGE_MARK)
    job = prepare_job(recipe, find=describe_model)
    first = arguments.row or 1
    count = arguments.rows or (1 if arguments.row else _DEFAULT_ROWS)
    preview = build_preview(job, first, count)
    if arguments.html is not None:
        write_page(arguments.html, preview_html(preview))
    else:
        print_preview(preview, stdout)
    return EXIT_OK


def build_preview(job: Job, first: int, count: int) -> Preview:
    """`count` rows from the `first` (1-based), as one device would compute them.

    Raises:
        BadInputError: there is no such row.
    """
    from finetune.data.ledger import SPLIT, TRUNCATED
    from finetune.report.preview import Preview

    data = job.recipe.data
    views = list(islice(_rows(job, first), count))
    if not views:
        total = sum(1 for _ in _rows(job, None))
        raise BadInputError(f"--row {first}: the run has {total:,} rows; give one of 1 to {total:,}")
    held = [dataset for dataset in (job.data.train, job.data.validation) if dataset is not None]
    cut, split = (
        list(dict.fromkeys(row for dataset in held for row in dataset.rows_of_fate(fate)))
        for fate in (TRUNCATED, SPLIT)
    )
    ledger = job.data.ledger
    summary = [
        f"{ledger.train_samples:,} samples, {ledger.train_tokens:,} tokens, {ledger.train_supervised_tokens:,} "
        f"supervised ({data.train_on}); {job.plan.num_steps:,} steps of {job.plan.global_batch_size} samples"
    ]
    return Preview(job.recipe.name, summary, views, ledger.rejected, cut, split, data.max_seq_len)


def _rows(job: Job, first: int | None) -> Iterator[RowView]:
    """The rows from the `first` on, in the order of training; for None all of them, empty, to be counted."""
    from finetune.report.tokens import RowView, Segment, TokenTexts, packed_row, padded_rows
    from finetune.training.steps import plan_batches, plan_rows

    dataset, texts, pad_id = job.data.train, TokenTexts(job.tokenizer), job.tokenizer.pad_token_id
    number = 0
    for step in range(job.plan.num_steps):
        samples = job.plan.samples(step).tolist()
        if job.packing.packed:
            for row in plan_rows(samples, dataset.lengths, job.packing, world_size=1)[0]:
                number += 1
                wanted = first is not None and number >= first
                if wanted or first is None:
                    segments = packed_row(dataset, row, texts, pad_id, job.packing.row_multiple) if wanted else []
                    yield RowView(number, step + 1, segments)
            continue
        for batch in plan_batches(samples, dataset.lengths, job.packing, world_size=1)[0]:
            shown: list[list[Segment]] = [[] for _ in batch]
            if first is not None and number + len(batch) >= first:
                shown = padded_rows(dataset, batch, texts, pad_id)
            for segments in shown:
                number += 1
                if first is None or number >= first:
                    yield RowView(number, step + 1, segments)
