"""The `finetune` command: verbs and exit codes. A verb's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

from finetune import __version__
from finetune.distributed import global_rank, is_rank_zero
from finetune.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, FinetuneError, PreemptedError
from finetune.machine import naming_out_of_memory, refuse_telemetry


class Verb(NamedTuple):
    """One verb: its module in `finetune.commands`, its line of help, and an example that works."""

    module: str
    help: str
    example: str


VERBS: dict[str, Verb] = {
    "run": Verb(
        "run",
        "train, evaluate and report what a recipe says",
        "finetune run recipes/smollm2_135m_tickets.yaml",
    ),
    "new": Verb(
        "new",
        "write a recipe for a model and data of yours",
        "finetune new --model Qwen/Qwen3-8B --data rows.jsonl --hardware 24GB --epochs 3 --output my.yaml",
    ),
    "generate": Verb(
        "generate",
        "complete prompts with a model or adapter",
        "finetune generate runs/my-run --prompt 'Hello'",
    ),
    "chat": Verb("chat", "talk to a run's model", "finetune chat runs/my-run --compare"),
    "merge": Verb("merge", "add a run's adapter to its base model, and check the result", "finetune merge runs/my-run"),
    "export": Verb(
        "export",
        "write GGUF or Ollama files, or check it for a server",
        "finetune export runs/my-run --to gguf --type q8_0",
    ),
    "evaluate": Verb(
        "evaluate",
        "measure base, adapter and merged model side by side",
        "finetune evaluate runs/my-run",
    ),
    "push": Verb(
        "push",
        "publish an adapter on the Hub with a model card",
        "finetune push runs/my-run my-org/my-adapter",
    ),
    "recipes": Verb(
        "recipes",
        "list the shipped recipes, or copy one",
        "finetune recipes copy smollm2_135m_tickets my.yaml",
    ),
    "check": Verb(
        "check",
        "say what is wrong with a recipe, and what it will need",
        "finetune check recipes/falcon7b_alpaca.yaml --gpu 24GB",
    ),
    "preview": Verb(
        "preview",
        "show the first rows as the model will see them",
        "finetune preview recipes/smollm2_135m_tickets.yaml --rows 1",
    ),
    "watch": Verb("watch", "follow a run from another terminal", "finetune watch runs/my-run"),
    "runs": Verb("runs", "list runs and their checkpoints", "finetune runs runs"),
    "report": Verb("report", "write a run's report.html", "finetune report runs/my-run"),
    "bench": Verb(
        "bench",
        "measure how fast a recipe trains here",
        "finetune bench train recipes/smollm2_135m_tickets.yaml --variants recipe,nf4",
    ),
    "compare": Verb("compare", "set runs side by side", "finetune compare runs/one runs/two --html compare.html"),
    "completion": Verb(
        "completion",
        "print a shell completion script",
        "finetune completion bash > ~/.local/share/bash-completion/completions/finetune",
    ),
    "schema": Verb("schema", "print the recipe's JSON schema for editors", "finetune schema -o recipe.schema.json"),
}

# What other programs call them.
_OTHER_NAMES = {"train": "run", "sft": "run", "eval": "evaluate", "infer": "generate", "predict": "generate"}

_VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "datasets")
_BUG = (
    "error: this is a bug in finetune. Please open an issue in the project's repository with the "
    "lines above, the command, the recipe, and what `finetune --version` prints."
)

# Where the verb itself does not know better.
_LESS_MEMORY = (
    "Fewer prompts at once or shorter answers take less (evaluation.batch_size, evaluation.max_new_tokens, or options "
    "of the verb), and so does a base in fewer bits (model.quantization: nf4); or free memory that other programs hold."
)

# What lies in the machine and not here; any other failure of the system is looked at as a bug.
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_OF_THE_MACHINE = {
    *_NO_PATH,
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM),  # space and permission
    *(errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),  # a disk that fails, or goes away
    *(errno.EMFILE, errno.ENFILE, errno.EAGAIN),  # limits on open files and processes
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """argparse leaves out the verbs' indent when it looks for the widest name, and would wrap that one."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


class _VersionAction(argparse.Action):
    """Prints the versions of what matters in a report; read from metadata, so that nothing is imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(describe_version())
        parser.exit()


def describe_version() -> str:
    """The versions of finetune, Python and the libraries that decide results, on one line."""
    parts = [f"python {platform.python_version()}"]
    for name in _VERSIONED:
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{name} not installed")
    return f"finetune {__version__} ({', '.join(parts)})"


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser of every verb's name and help, with the arguments of `verb` alone; of all for `completion`."""
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="LoRA and QLoRA fine-tuning: one YAML recipe in, a measured, servable adapter out.",
        epilog=_epilog(VERBS["run"].example),
        formatter_class=_Help,
    )
    parser.add_argument("--version", action=_VersionAction, nargs=0, help="print versions and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, row in VERBS.items():
        one = verbs.add_parser(
            name,
            help=row.help,
            description=f"{row.help[0].upper()}{row.help[1:]}.",
            epilog=_epilog(row.example),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb in (name, "completion"):
            load_command(row.module).configure(one)
    return parser


def load_command(module: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"finetune.commands.{module}")


def _epilog(example: str) -> str:
    return f"example:\n  {example}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 1 failed, 2 bad input, 75 run the same command again."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    # Before any library that reads them is imported.
    refuse_telemetry()
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks is shown as `?`, and ends nothing.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would fill a log
    try:
        return _run(given)
    except PreemptedError as error:
        if is_rank_zero():
            _report(str(error))
        return error.exit_code
    except FinetuneError as error:
        _report(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_PREEMPTED
    except BrokenPipeError:
        # The reader of a pipe has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno == errno.ENOENT and _has_lost_directory():
            _report("error: the working directory is gone; change to one that exists, then run the same command again")
            return EXIT_BAD_INPUT
        if error.errno not in _OF_THE_MACHINE:
            return _report_bug()
        what = f"{error.filename or 'a file'}: {error.strerror}"
        _report(f"error: cannot read or write {what}; mend that, then run the same command again")
        return EXIT_BAD_INPUT if error.errno in _NO_PATH else EXIT_FAILURE
    except Exception:
        return _report_bug()


def _has_lost_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _open_closed_streams() -> None:
    """A stream that is closed at the start (`2>&-`) would be the next file that is opened, and be written to."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number and not os.path.exists(f"/dev/fd/{number}"):
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8"))


def _report_bug() -> int:
    traceback.print_exc()
    _report(_BUG)
    return EXIT_FAILURE


def _run(given: list[str]) -> int:
    verb = given[0] if given and given[0] in VERBS else None
    if given and verb is None and not given[0].startswith("-"):
        near = [_OTHER_NAMES[given[0]]] if given[0] in _OTHER_NAMES else get_close_matches(given[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"accepts {', '.join(VERBS)}"
        _report(f"error: unknown verb {given[0]}; {hint}")
        return EXIT_BAD_INPUT
    parser = build_parser(verb)
    if not given:
        parser.print_help()
        return EXIT_BAD_INPUT
    arguments, rest = parser.parse_known_args(given)
    # argparse gives up a list of positional arguments at the first option: `run RECIPE --fresh key=value`.
    late = (
        rest if hasattr(arguments, "overrides") and all(re.match(r"[a-z_][\w.\[\]]*=", word) for word in rest) else []
    )
    if len(late) < len(rest):
        keys = "; a recipe's keys stand behind it without dashes: training.optimizer.lr=1e-4"
        hint = keys if hasattr(arguments, "overrides") else ""
        _report(f"error: unrecognized arguments: {' '.join(rest)}{hint}; `finetune {verb} --help` lists the options")
        return EXIT_BAD_INPUT
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    arguments.parser = parser
    with naming_out_of_memory(f"in finetune {arguments.verb}", _LESS_MEMORY):
        code = load_command(VERBS[arguments.verb].module).run(arguments)
    sys.stdout.flush()
    return int(code)


def _report(message: str) -> None:
    # Not the shared console: it is silent on ranks above 0, and their errors must be seen.
    rank = global_rank()
    print(f"[rank {rank}] {message}" if rank else message, file=sys.stderr)
