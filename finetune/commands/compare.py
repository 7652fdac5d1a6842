"""`finetune compare`: several runs side by side in the terminal, and their curves over each other as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.errors import EXIT_OK, BadInputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the directories of two runs or more")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with the curves of all runs")


def run(arguments: argparse.Namespace) -> int:
    """Print the numbers and what differs between the recipes; write the page where it is asked for."""
    from finetune.console import stdout
    from finetune.files import require_own
    from finetune.report.compare import compare_html, compare_table, differences_table
    from finetune.report.page import PAGE_MARK
    from finetune.report.run_files import open_run

    if len(arguments.runs) < 2:
        raise BadInputError(f"compare takes two runs or more, and was given {arguments.runs[0]} alone; name another")
    if arguments.html is not None:
        require_own(arguments.html, "--html", PAGE_MARK)
    runs = [open_run(path, hashes=False) for path in arguments.runs]
    stdout.print(compare_table(runs))
    differences = differences_table(runs)
    stdout.print("\nThe recipes are the same, names aside." if differences is None else "")
    if differences is not None:
        stdout.print(differences)
    if arguments.html is not None:
        write_page(arguments.html, compare_html(runs))
    return EXIT_OK


def write_page(path: Path, text: str) -> None:
    """Write a page and say where it is.

    Raises:
        BadInputError: the file cannot be written.
    """
    from finetune.console import say
    from finetune.files import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        raise BadInputError(f"--html {path}: cannot be written: {error.strerror}; name another file") from None
    say(f"page      {path}")
