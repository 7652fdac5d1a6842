"""`finetune push`: a run's adapter, merged model or GGUF file on the Hub, with a model card, in one commit."""

from __future__ import annotations

import argparse
from pathlib import Path

from finetune.console import say, stdout, warn
from finetune.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "run", metavar="RUN", help="a run's directory, an adapter's, a merged model's, or hf://ORG/NAME"
    )
    parser.add_argument(
        "repo", metavar="ORG/NAME", nargs="?", help="the repository (default: the recipe's hub.repo_id)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--merged", action="store_true", help="the merged model instead of the adapter")
    what.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file instead of the adapter")
    parser.add_argument("--public", action="store_true", help="for everyone to see (default: private)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace all files of a repository that holds other content"
    )
    parser.add_argument("--message", metavar="M", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list the files and sizes; nothing is sent or asked")


def run(arguments: argparse.Namespace) -> int:
    """Push, or say what would be pushed."""
    from finetune.export.hub_publish import PushOptions, plan_push, push_run

    options = PushOptions(
        merged=arguments.merged,
        gguf=arguments.gguf,
        public=arguments.public,
        overwrite=arguments.overwrite,
        message=arguments.message,
    )
    if arguments.dry_run:
        name, contents = plan_push(arguments.run, arguments.repo, options)
        for warning in contents.warnings:
            warn(warning)
        sizes = contents.sizes()
        width = max(map(len, sizes))
        for file, size in sizes.items():
            stdout.print(f"{file:{width}}  {size:>15,}", markup=False)
        stdout.print(f"{'total':{width}}  {sum(sizes.values()):>15,} bytes", markup=False)
        say(f"to {name}, {'public' if options.public else 'private'}, in one commit; nothing was sent")
        return EXIT_OK
    pushed = push_run(arguments.run, arguments.repo, options)
    if not pushed.changed:
        say("the repository already holds exactly this")
    stdout.print(f"{pushed.url}  commit {pushed.commit[:12]}", markup=False)
    return EXIT_OK
