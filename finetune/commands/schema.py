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
    from finetune.files import require_own, write_atomic
    from finetune.recipe.json_schema import SCHEMA_MARK, schema_json

    if arguments.output is None:
        sys.stdout.write(schema_json())
        return EXIT_OK
    folder = arguments.output.parent
    if not folder.is_dir():
        raise BadInputError(f"--output {arguments.output}: cannot be written: there is no directory {folder}")
    require_own(arguments.output, "--output", SCHEMA_MARK)
    try:
        write_atomic(arguments.output, schema_json())
    except OSError as error:
        raise BadInputError(f"--output {arguments.output}: cannot be written: {error.strerror}") from None
    return EXIT_OK
