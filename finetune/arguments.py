"""Command-line arguments that verbs share, and types: what is accepted, in the words argparse puts behind an option."""

from __future__ import annotations

import argparse
import math


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let a verb that reads a recipe take `key.sub=value` behind it; in `overrides`, empty if there are none."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="replace any key of the recipe"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, None)


def seed(text: str) -> int:
    """A seed that random generators take, as the recipe's."""
    return _whole(text, 0, 2**63 - 1)


def not_negative(text: str) -> float:
    """A number of 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def unused_sampling(arguments: argparse.Namespace) -> str | None:
    """What to say where options of sampling were given and nothing is sampled; `top_p` and `seed` are the verb's."""
    given = [name for name, value in (("--top-p", arguments.top_p != 1), ("--seed", arguments.seed != 0)) if value]
    if not given or arguments.temperature > 0:
        return None
    verb = "have" if len(given) > 1 else "has"
    return f"{' and '.join(given)} {verb} no effect at --temperature 0, where the likeliest token is taken; raise it"


def _whole(text: str, least: int, most: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
    if most is not None and value > most:
        raise argparse.ArgumentTypeError(f"{text}: must be at most {most}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number") from None
