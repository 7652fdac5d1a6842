"""`finetune export`: a run for other programs: GGUF files, an Ollama directory, or a server's check and command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import stdout, warn
from finetune.errors import EXIT_OK, BadInputError, FinetuneError, ModelError
from finetune.run_dir import RECIPE

if TYPE_CHECKING:
    from finetune.export.targets import Job, Target


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="a run's directory, an adapter's, a merged model's, or hf://ORG/NAME",
    )
    parser.add_argument("--to", metavar="TARGET", help="gguf, gguf-lora, ollama, vllm or tgi; see --list")
    parser.add_argument("--type", metavar="TYPE", help="f16 (default for models), bf16, q8_0; for gguf-lora f32, f16")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="file, or directory for ollama (default: in RUN/export; of a lone adapter in export/ beside it)",
    )
    parser.add_argument("--list", action="store_true", help="list the targets")


def run(arguments: argparse.Namespace) -> int:
    """Export a run, or list what it can be exported to."""
    from finetune.export.targets import TARGETS, choose_type

    if arguments.list:
        _list_targets(TARGETS)
        return EXIT_OK
    if arguments.run is None or arguments.to is None:
        raise BadInputError("name a run and a target: finetune export RUN --to TARGET; --list shows the targets")
    if arguments.to not in TARGETS:
        raise BadInputError(f"--to {arguments.to}: there is no such target; accepted are {', '.join(TARGETS)}")
    target = TARGETS[arguments.to]
    type_name = choose_type(arguments.to, arguments.type)
    if arguments.out is not None and not target.types:
        raise BadInputError(f"--out {arguments.out}: --to {arguments.to} writes nothing, it checks; leave --out out")

    from finetune.models.load import quiet_libraries

    quiet_libraries()
    job = _plan(arguments, target)
    try:
        lines = target.export(job, type_name)
    except OSError as error:
        raise FinetuneError(f"{job.out or job.folder}: cannot be written: {error.strerror or error}") from error
    for line in lines:
        stdout.print(line, markup=False)
    return EXIT_OK


def _list_targets(targets: dict[str, Target]) -> None:
    for name, target in targets.items():
        needs = "the merged model" if target.needs == "merged" else "the adapter"
        types = f"; --type {', '.join(target.types)}" if target.types else ""
        stdout.print(f"{name:10}{target.loads_into}", markup=False)
        stdout.print(f"{'':10}needs {needs}{types}", markup=False)
        stdout.print(f"{'':10}verified: {target.verified}", markup=False)


def _plan(arguments: argparse.Namespace, target: Target) -> Job:
    """The job, with the adapter or the merged model that the target needs."""
    from finetune.export.places import find_place, staleness
    from finetune.export.targets import Job
    from finetune.inference.load import find_run
    from finetune.models.foreign import derive_recipe
    from finetune.recipe.moved import load_moved_recipe

    place = find_place(arguments.run)
    path = place.folder
    if _is_model(path):
        if target.needs == "adapter":
            raise ModelError(f"{path}: is a whole model, and --to {arguments.to} takes an adapter; give the run")
        _require_usable(path)
        recipe_path = path / RECIPE
        recipe = load_moved_recipe(recipe_path) if recipe_path.is_file() else None
        return Job(path.resolve().name, place.given, path, arguments.out, place.exports, arguments.type, recipe)
    own, adapter = find_run(path)
    if own is None:
        assert adapter is not None
        recipe = derive_recipe(adapter)
    else:
        recipe = load_moved_recipe(own)
    if target.needs == "adapter":
        if adapter is None:
            raise ModelError(
                f"{place.given}: holds no adapter and no whole checkpoint; train first: finetune run RECIPE"
            )
        return Job(recipe.name, place.given, adapter, arguments.out, place.exports, arguments.type, recipe)
    if not _is_model(place.merged):
        raise ModelError(
            f"{place.given}: has not been merged yet, and --to {arguments.to} needs it; run: finetune merge "
            f"{place.given}. A model that was merged with --out DIR is exported by its own name: finetune export DIR"
        )
    _require_usable(place.merged)
    if (warning := staleness(place.merged, adapter)) is not None:
        warn(warning)
    return Job(recipe.name, place.given, place.merged, arguments.out, place.exports, arguments.type, recipe)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _require_usable(folder: Path) -> None:
    """Whether a merged model has passed its check."""
    from finetune.export.places import read_record

    record = read_record(folder)
    if not record.get("usable", True):
        raise BadInputError(f"{folder}: failed its check when it was merged ({record.get('fault')}); merge it again")
