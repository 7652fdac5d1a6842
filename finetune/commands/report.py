"""`finetune report`: writes the self-contained report.html of a run, finished or not."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.errors import EXIT_OK
from finetune.run_dir import RunDir


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory, finished or not")


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from finetune.report.html import write_report

    print(write_report(RunDir(arguments.run)))
    return EXIT_OK
