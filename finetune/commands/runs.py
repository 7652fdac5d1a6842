"""`finetune runs`: the runs in a directory and their checkpoints, newest first."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from finetune.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="where runs are, or one of them (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print every run with its checkpoints; each checkpoint is read whole to tell whether it is damaged."""
    from finetune.console import stdout
    from finetune.report.listing import describe_run, find_runs, runs_table

    runs = find_runs(arguments.dir)
    if arguments.json:
        print(json.dumps([describe_run(each) for each in runs], indent=2, ensure_ascii=False))
    else:
        stdout.print(runs_table(runs))
    return EXIT_OK
