"""`finetune merge`: a run's adapter and its base become one model, checked against the adapter before it stands."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.console import say, stdout, warn
from finetune.errors import EXIT_OK, BadInputError, FinetuneError, ModelError, first_line
from finetune.files import new_directory, replace_directory, sha256_file
from finetune.run_dir import FINGERPRINTS, MERGE_RECORD, RECIPE, UNUSABLE

if TYPE_CHECKING:
    import torch

    from finetune.export.check_merge import CheckSample, Drift, MergeCheck
    from finetune.export.merge import Base, Merge
    from finetune.export.merge_plan import MergePlan
    from finetune.export.places import RunPlace
    from finetune.recipe.schema import ModelSection, Recipe


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run's directory, an adapter's, or hf://ORG/NAME")
    parser.add_argument(
        "--base",
        choices=("auto", "original", "dequantized"),
        help="what the adapter is added to: the published weights, or those that a quantized run has seen "
        "(default: the recipe's merge.base)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), help="of the merged weights (default: the recipe's)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: RUN/merged; of an adapter without its run NAME-merged"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, check, and say where the model is."""
    from finetune.machine import limit_kernel_cache
    from finetune.models.load import quiet_libraries

    limit_kernel_cache()
    quiet_libraries()
    folder = merge_run(arguments.run, base=arguments.base, dtype=arguments.dtype, out=arguments.out)
    stdout.print(f"merged    {folder}", markup=False)
    if not (folder / RECIPE).is_file():  # its adapter has none
        stdout.print(f"export    finetune export {shlex.quote(str(folder))} --to gguf", markup=False)
        return EXIT_OK
    measure = ["finetune", "evaluate", str(arguments.run), "--merged", str(folder)]
    stdout.print(f"measure   {shlex.join(measure)}", markup=False)
    stdout.print(f"publish   finetune push {shlex.quote(str(folder))} ORG/NAME", markup=False)
    return EXIT_OK


def merge_run(given: str | Path, *, base: str | None = None, dtype: str | None = None, out: Path | None = None) -> Path:
    """Merge the adapter of a run into its base; returns the directory of a model that has passed the check.

    `given` is the run's directory, an adapter's, or hf://ORG/NAME. `base` and `dtype` default to the recipe's. What
    stood in the directory is replaced when the new model is whole.

    Raises:
        BadInputError: there is no adapter, it does not fit the base, or the directory holds something else.
        FinetuneError: the disk is too small, or the merged model failed the check; it then stands in its
            directory, or in one beside a merged model that had passed, with a file UNUSABLE.md that says why.
    """
    from finetune.export.check_merge import find_fault, held_out_samples
    from finetune.export.places import find_place

    place = find_place(given)
    merge, template = _prepare(place, base, dtype)
    folder = place.merged if out is None else out
    _require_replaceable(folder)
    _say_plan(merge)
    merge.check_disk(folder)
    samples, rows = held_out_samples(merge.recipe, merge.tokenizer, template)
    if not rows.startswith(("validation", "evaluation")):
        warn(f"the merged model is checked on {rows}")
    reference, merge = _reference(place.folder, merge, samples)
    new = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        with new_directory(new) as temporary:
            plan = merge.write(temporary)
            check = _check(merge, temporary, reference, samples, rows)
            fault = find_fault(check, merge.recipe.merge)
            _record(temporary, merge, plan, check, fault, place)
            _copy_origin(temporary, merge)
        target = folder
        if fault is not None and _is_usable(folder):
            target = folder.with_name(f"{folder.name}-unusable")
            _require_replaceable(target)
        replace_directory(new, target)
    except OSError as error:
        raise FinetuneError(f"{folder}: cannot be written: {error.strerror or error}") from error
    _say_check(check)
    if fault is not None:
        kept = "" if target == folder else f"; {folder} is as it was"
        raise FinetuneError(f"{target}: must not be used: {fault}; see {target / UNUSABLE}{kept}")
    return folder


def _is_usable(folder: Path) -> bool:
    return (folder / MERGE_RECORD).is_file() and not (folder / UNUSABLE).is_file()


def _prepare(place: RunPlace, base: str | None, dtype: str | None) -> tuple[Merge, Any]:
    """The planned merge and the chat template, nothing of the model loaded."""
    from finetune.export.merge import Merge, choose_base
    from finetune.inference.load import find_run, load_run_recipe, load_saved_template

    recipe_path, adapter = find_run(place.folder)
    if adapter is None:
        raise ModelError(f"{place.given}: holds no adapter and no whole checkpoint; train first: finetune run RECIPE")
    recipe, source = load_run_recipe(recipe_path, adapter)
    tokenizer, template = load_saved_template(recipe, source, adapter)
    chosen = choose_base(recipe, base or recipe.merge.base)
    merge = Merge(recipe, source, adapter, tokenizer, template.stop_token_ids, chosen, dtype or recipe.merge.dtype)
    return merge, template


def _require_replaceable(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MERGE_RECORD).is_file():
        raise BadInputError(f"{folder}: holds something that no merge has written; give another directory by --out")
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"{folder}: is a file; give a directory by --out")


def _say_plan(merge: Merge) -> None:
    weights = merge.plan.weights
    kinds: dict[str, int] = {}
    for weight in weights:
        for step in weight.steps:
            kinds[step.kind] = kinds.get(step.kind, 0) + 1
    parts = ", ".join(f"{count} by {kind}" for kind, count in kinds.items())
    size = merge.plan.num_bytes / 1e9
    dtype = str(merge.torch_dtype).removeprefix("torch.")
    say(f"{len(weights)} weights, {size:.2f} GB in {dtype}, base {merge.base}; changed: {parts}")


@dataclass(frozen=True)
class _Reference:
    """The adapter on the base that it was trained on."""

    log_probs: list[torch.Tensor]
    bare: Drift
    device: torch.device
    attention: str


def _reference(path: Path, merge: Merge, samples: list[CheckSample]) -> tuple[_Reference, Merge]:
    """What the adapter gives, and the merge with what only the loaded model knows."""
    from finetune.export.check_streamed import measure_adapter, stream_adapter
    from finetune.inference.load import placement
    from finetune.inference.mode import inference_mode

    attention, device = placement(merge.recipe)
    merge = replace(merge, device=device)
    say(f"reading {merge.source.name} layer by layer, with the adapter and without")
    try:
        streamed = stream_adapter(merge, attention_name=attention, device=device)
        with inference_mode(streamed.model):
            wanted, bare = measure_adapter(streamed, samples)
    except Exception as error:
        _say_whole(merge.source.name, error)
        return _whole_reference(path, merge, samples)
    return _Reference(wanted, bare, device, attention), merge


def _say_whole(name: str, error: Exception) -> None:
    """Why a model is loaded whole for the check; errors that loading it would not mend are raised again."""
    import torch

    if isinstance(error, FinetuneError | OSError | MemoryError | torch.OutOfMemoryError):
        raise error
    say(f"{name} is loaded whole for the check, because {first_line(error)}")


def _whole_reference(path: Path, merge: Merge, samples: list[CheckSample]) -> tuple[_Reference, Merge]:
    from finetune.export.check_merge import log_probs, measure_drift
    from finetune.export.merge import residual_weights
    from finetune.inference.load import load_run
    from finetune.inference.mode import base_of, inference_mode

    loaded = load_run(path)
    model: Any = loaded.model
    with inference_mode(model):
        wanted = list(log_probs(base_of(model), samples))
    rewrites = merge.recipe.adapter.rewrites_base
    if rewrites:
        merge = residual_weights(merge, model)
        model = load_run(path, base_only=True).model
    with inference_mode(model), nullcontext() if rewrites else model.disable_adapter():
        bare = measure_drift(wanted, log_probs(base_of(model), samples))
    attention = str(base_of(model).config._attn_implementation)
    device = base_of(model).get_input_embeddings().weight.device
    del loaded, model
    gc.collect()
    return _Reference(wanted, bare, device, attention), merge


def merged_section(folder: Path, recipe: Recipe) -> ModelSection:
    """A merged model as a recipe names it: its files alone, in their dtype."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    changes = {
        "name": str(folder.absolute()),
        "revision": None,
        "gguf_file": None,
        "quantization": "none",
        "dtype": names.get(dtype, "auto"),
    }
    return recipe.model.model_copy(update=changes)


def load_merged(folder: Path, recipe: Recipe, *, device: Any, attention: str) -> Any:
    """A merged model from its files alone, on `device`, in the dtype of its files."""
    from finetune.models.load import load_base
    from finetune.models.sources import find_model

    section = merged_section(folder, recipe)
    precision = recipe.training.precision
    return load_base(section, find_model(section), precision=precision, attention_name=attention, device=device)


def _check(merge: Merge, folder: Path, reference: _Reference, samples: list[CheckSample], rows: str) -> MergeCheck:
    from finetune.export.check_merge import MergeCheck

    is_quantized = merge.recipe.model.quantization != "none"
    other_base: Base | None = None
    if is_quantized:
        other_base = "original" if merge.base == "dequantized" else "dequantized"
    say("reading the merged model back, layer by layer")
    try:
        merged, other = _measure_streamed(merge, folder, reference, samples, other_base)
    except Exception as error:
        _say_whole("the merged model", error)
        merged, other = _measure_whole(merge, folder, reference, samples, other_base)
    num_positions = sum(len(sample.positions) for sample in samples)
    is_own = (merge.base == "dequantized") == is_quantized
    return MergeCheck(rows, len(samples), num_positions, merge.base, is_own, merged, reference.bare, other_base, other)


def _measure_streamed(
    merge: Merge, folder: Path, reference: _Reference, samples: list[CheckSample], other_base: Base | None
) -> tuple[Drift, Drift | None]:
    """How far the merged model is from the adapter, and what merging into the other base would have given."""
    from finetune.export.check_streamed import measure_streamed, stream_merged
    from finetune.inference.mode import inference_mode

    section = merged_section(folder, merge.recipe)

    def measure(base: Base) -> Drift:
        streamed = stream_merged(merge, section, attention_name=reference.attention, device=reference.device, base=base)
        with inference_mode(streamed.model):
            return measure_streamed(reference.log_probs, streamed, samples)

    return measure(merge.base), None if other_base is None else measure(other_base)


def _measure_whole(
    merge: Merge, folder: Path, reference: _Reference, samples: list[CheckSample], other_base: Base | None
) -> tuple[Drift, Drift | None]:
    from finetune.export.check_merge import log_probs, measure_drift
    from finetune.inference.mode import inference_mode

    model = load_merged(folder, merge.recipe, device=reference.device, attention=reference.attention)
    with inference_mode(model):
        merged = measure_drift(reference.log_probs, log_probs(model, samples))
        if other_base is None:
            return merged, None
        for parameter, value in merge.rounded_weights(other_base):
            model.get_parameter(parameter).copy_(value)
        return merged, measure_drift(reference.log_probs, log_probs(model, samples))


def _say_check(check: MergeCheck) -> None:
    say(f"checked on {check.num_samples} {check.rows}, {check.num_positions} positions, against the adapter:")
    lines = [(f"merged ({check.base})", check.merged), (f"merged ({check.other_base})", check.other)]
    for name, drift in (*lines, ("bare base", check.bare)):
        if drift is not None:
            say(f"  {name:22} KL {drift.kl:.2e}   top-1 agreement {drift.agreement:.1%}")


def _record(folder: Path, merge: Merge, plan: MergePlan, check: MergeCheck, fault: str | None, place: RunPlace) -> None:
    from finetune.models.adapters import WEIGHTS_NAME

    text = _recipe_text(merge)
    weights = [
        {
            "name": weight.info.name,
            "shape": list(weight.info.shape),
            "from": weight.source,
            "rounded": weight.quantized and merge.base == "dequantized",
            "rows_added": weight.resized,
            "steps": [
                {"kind": step.kind, "tensors": list(step.tensors), "scale": step.scale, "rank": step.rank}
                for step in weight.steps
            ],
        }
        for weight in plan.weights
        if weight.is_touched or weight.quantized
    ]
    values = {
        "usable": fault is None,
        "fault": fault,
        "base": merge.base,
        "base_model": {"name": merge.source.name, "revision": merge.source.revision},
        "dtype": str(merge.torch_dtype).removeprefix("torch."),
        "tied_embeddings": plan.tied,
        "run": None if place.run is None else str(place.run.root.absolute()),
        "adapter_sha256": sha256_file(merge.adapter / WEIGHTS_NAME),
        "recipe_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        "check": check.to_json(),
        "finetune_version": __version__,
        "weights": weights,
    }
    (folder / MERGE_RECORD).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if fault is not None:
        (folder / UNUSABLE).write_text(
            f"# Do not use this model\n\nIt was merged, and then failed its check: {fault}.\n\n"
            f"The figures are in {MERGE_RECORD} under `check`. The adapter itself is as good as it was.\n",
            encoding="utf-8",
        )


def _copy_origin(folder: Path, merge: Merge) -> None:
    """What the model can be pushed, exported and trained again from, wherever it is moved: recipe and fingerprints."""
    text, fingerprints = _recipe_text(merge), merge.adapter / FINGERPRINTS
    if text is not None:
        (folder / RECIPE).write_text(text, encoding="utf-8")
    if fingerprints.is_file():
        shutil.copyfile(fingerprints, folder / FINGERPRINTS)


def _recipe_text(merge: Merge) -> str | None:
    """The adapter's recipe; None for one that another program trained."""
    from finetune.recipe.load import dump_recipe

    return None if merge.recipe.is_derived else dump_recipe(merge.recipe)
