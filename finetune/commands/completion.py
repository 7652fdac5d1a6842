"""`finetune completion`: prints the script that lets a shell complete verbs, options and files."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from finetune.errors import EXIT_OK

# Arguments that name files or directories, by their names in the parsers.
_FILES = frozenset({"recipe", "data", "out", "output", "html", "json_file", "prompts", "prompt_file"})
_DIRECTORIES = frozenset({"run", "runs", "resume", "folder", "adapter", "dest", "dir"})


def configure(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that will read the script")


def run(arguments: Namespace) -> int:
    """Print the completion script of `arguments.parser`, the parser of every verb."""
    import shtab

    _mark_paths(arguments.parser)
    print(shtab.complete(arguments.parser, arguments.shell))
    return EXIT_OK


def _mark_paths(parser: ArgumentParser) -> None:
    """Tell shtab which arguments are paths: `complete` is the attribute that it reads."""
    import shtab

    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for below in action.choices.values():
                _mark_paths(below)
        elif action.choices is None and action.nargs != 0:
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest in _DIRECTORIES:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
