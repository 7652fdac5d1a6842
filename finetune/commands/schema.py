"""`finetune schema`: the recipe's JSON schema, for editors and tools."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from finetune.errors import EXIT_OK, BadInputError


def configure(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to FILE instead of stdout")


def run(arguments: Namespace) -> int:
    """Write the schema."""
    from finetune.recipe.json_schema import schema_json

    if arguments.output is None:
        sys.stdout.write(schema_json())
        return EXIT_OK
    try:
        arguments.output.write_text(schema_json(), encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"--output {arguments.output}: cannot be written: {error.strerror}") from None
    return EXIT_OK
