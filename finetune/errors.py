"""Errors that a user can cause and mend, and the exit codes of the command line.

A `FinetuneError` is shown as its message alone, never as a traceback. Its message names the recipe key
or the file and row, the value given, what is accepted and what to do.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class FinetuneError(Exception):
    """Something failed while running: exit code 1."""

    exit_code = EXIT_FAILURE


class BadInputError(FinetuneError):
    """A recipe, data file, model or argument cannot be used as given: exit code 2."""

    exit_code = EXIT_BAD_INPUT


class RecipeError(BadInputError):
    """A recipe is wrong; the message opens with `file:line`."""


class DataError(BadInputError):
    """A data file or row is wrong; the message names the file and, where there is one, the row."""


class ModelError(BadInputError):
    """A base model, tokenizer or adapter cannot be used as given."""


class OutOfMemory(FinetuneError):
    """A device's or the host's memory was not enough; the message names the phase and what takes less."""


class PreemptedError(FinetuneError):
    """The run was asked to stop and can be continued by the same command: exit code 75."""

    exit_code = EXIT_PREEMPTED


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
