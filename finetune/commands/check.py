"""`finetune check`: what is known of a run before it starts, errors first; no weights are loaded."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from finetune.arguments import add_overrides, positive
from finetune.errors import EXIT_BAD_INPUT, EXIT_OK, BadInputError, RecipeError
from finetune.findings import Finding, error, in_order, run_checks, warning
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import find_recipe

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

_UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_STYLES = {"error": "bold red", "warning": "yellow", "fact": ""}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="a recipe's file, or the name of a shipped one")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gpu", type=_size, metavar="SIZE", help="as if there were GPUs of this size, e.g. 24GB")
    parser.add_argument("--devices", type=positive, metavar="N", help="as if there were so many devices")
    parser.add_argument("--no-model", action="store_true", help="only what needs neither model nor data: under 2 s")


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and say by the exit code whether the run can work."""
    from finetune.console import console

    for option in ("gpu", "devices"):
        if arguments.no_model and getattr(arguments, option) is not None:
            raise BadInputError(f"--{option}: --no-model leaves out what depends on devices; leave out one of the two")

    quiet = console.quiet
    console.quiet = quiet or arguments.json
    try:
        return _run(arguments)
    finally:
        console.quiet = quiet


def _run(arguments: argparse.Namespace) -> int:
    try:
        recipe = load_recipe(find_recipe(arguments.recipe), arguments.overrides)
    except RecipeError as problem:
        if not arguments.json:
            raise
        found = [error("recipe", line) for line in str(problem).splitlines()]
    else:
        found = in_order(unique(_findings(recipe, arguments)))
    _print(found, as_json=arguments.json)
    return EXIT_BAD_INPUT if any(one.level == "error" for one in found) else EXIT_OK


def _findings(recipe: Recipe, arguments: argparse.Namespace) -> Iterator[Finding]:
    from finetune.recipe import preflight

    yield from run_checks(preflight.CHECKS, recipe)
    if arguments.no_model:
        return
    if arguments.gpu is not None and recipe.distributed.accelerator == "cpu":
        yield warning(
            "devices",
            "distributed.accelerator: cpu, so no run of this recipe is on the GPUs of --gpu; add "
            "distributed.accelerator=cuda",
        )
    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.export import base_terms
        from finetune.training import checkup

    subject = checkup.Checkup(recipe, gpu_bytes=arguments.gpu, devices=arguments.devices)
    yield from run_checks(checkup.CHECKS, subject)
    yield from run_checks(base_terms.CHECKS, recipe)


def unique(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Each text once: checks that need the same thing fail in the same words."""
    seen = set()
    for finding in findings:
        if finding.text not in seen:
            seen.add(finding.text)
            yield finding


def _print(found: list[Finding], *, as_json: bool) -> None:
    from finetune.console import stdout

    counts = {level: sum(one.level == level for one in found) for level in _STYLES}
    if as_json:
        print(json.dumps({"ok": not counts["error"], "counts": counts, "findings": [vars(one) for one in found]}))
        return
    width = max((len(one.topic) for one in found), default=0)
    for one in found:
        mark = "" if one.level == "fact" else f"{one.level}: "
        stdout.print(f"{one.topic:<{width}}  {mark}{one.text}", style=_STYLES[one.level] or None, markup=False)
    verdict = "cannot work as it is" if counts["error"] else "nothing keeps it from running"
    numbers = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in ("error", "warning"))
    stdout.print(f"{numbers}: {verdict}", markup=False)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    unit = "" if match is None else match[2].upper()
    unit = unit if not unit or unit.endswith("B") else f"{unit}B"
    if match is None or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text}: give a size such as 24GB")
    return int(float(match[1]) * _UNITS[unit])
