"""The parts of the report that one looks up: how to use the adapter, checkpoints, environment and recipe."""

from __future__ import annotations

import platform
import shlex
from html import escape
from importlib import metadata
from typing import Any

from finetune.recipe.keys import flatten
from finetune.recipe.lines import KeyPath, YamlError, parse_yaml
from finetune.recipe.schema import Recipe
from finetune.report import numbers
from finetune.report.page import code, pairs_table, table
from finetune.report.run_files import RunFiles, folder_bytes

_SET = ' class="set"'
_VERSIONED = ("finetune", "torch", "transformers", "peft", "bitsandbytes", "lightning", "datasets")


def adapter_section(run: RunFiles) -> str:
    """Commands and code that use the adapter; of an unfinished run, its newest whole checkpoint."""
    folder = run.run_dir.adapter
    if folder.is_dir():
        lead = f"<p>The adapter is {numbers.size(folder_bytes(folder))}, in PEFT's own format.</p>"
    else:
        whole = [checkpoint for checkpoint in run.checkpoints if checkpoint.damage is None]
        if not whole:
            return '<p class="empty">There is no adapter yet, and no whole checkpoint.</p>'
        folder = whole[-1].path
        lead = f"<p>There is no final adapter yet; the checkpoint of step {whole[-1].step:,} is one too.</p>"
    shown = run.shown_path / folder.relative_to(run.run_dir.root)
    argument = run.shown_path if folder == run.run_dir.adapter else shown
    command = f"finetune generate {shlex.quote(str(argument))} --prompt 'your text'"
    return lead + code(command) + _python(run, str(shown))


def _python(run: RunFiles, folder: str) -> str:
    """The same in Python, for bases that transformers finds by their name."""
    name = run.key("model.name")
    if not isinstance(name, str) or "://" in name or name.endswith(".gguf") or run.key("model.gguf_file"):
        return '<p class="note">The base comes from a GGUF file, which finetune loads for it.</p>'
    revision = run.key("model.revision")
    pinned = "" if revision is None else f", revision={revision!r}"
    text = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({name!r}{pinned}, dtype="auto", device_map="auto")\n'
        f"model = PeftModel.from_pretrained(base, {folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
    )
    return code(text.rstrip())


def checkpoints_section(run: RunFiles) -> str:
    """Every checkpoint with its step, losses and size, whole or not."""
    rows = []
    for checkpoint in reversed(run.checkpoints):
        whole = '<span class="good">whole</span>'
        state = whole if checkpoint.damage is None else f'<span class="bad">damaged: {escape(checkpoint.damage)}</span>'
        rows.append(
            [
                f'<span class="key">{escape(checkpoint.path.name)}</span>',
                numbers.decimal(checkpoint.loss),
                numbers.decimal(checkpoint.validation_loss),
                numbers.size(checkpoint.size_bytes),
                state,
            ]
        )
    if not rows:
        return '<p class="empty">No checkpoint has been saved.</p>'
    head = ["checkpoint", "loss", "validation loss", "size", "state"]
    return table(head, rows, text_columns=(0, 4))


def environment_section(run: RunFiles) -> str:
    """The machine that trained, and the versions of what decides results."""
    training = run.results.get("training")
    training = training if isinstance(training, dict) else {}
    machine = training.get("machine")
    rows = [] if not isinstance(machine, dict) else _machine_rows(machine)
    versions = training.get("versions")
    if isinstance(versions, dict):
        rows += [(str(name), str(version)) for name, version in versions.items()]
        return pairs_table(rows)
    rows += _versions_here(with_python=not rows)
    note = '<p class="note">Versions are those installed where this report was written.</p>'
    return pairs_table(rows) + note


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    gpus = machine.get("gpus")
    names = [str(name) for name in gpus] if isinstance(gpus, list) else []
    unique = dict.fromkeys(names)
    shown = ", ".join(name if names.count(name) == 1 else f"{names.count(name)} × {name}" for name in unique)
    rows = [("GPUs", shown or "none")]
    if "cpu_cores" in machine:
        rows.append(("CPU cores", str(machine["cpu_cores"])))
    if isinstance(machine.get("memory_bytes"), int):
        rows.append(("memory", numbers.size(machine["memory_bytes"])))
    known = ("gpus", "cpu_cores", "memory_bytes")
    return rows + [(name.replace("_", " "), str(value)) for name, value in machine.items() if name not in known]


def _versions_here(*, with_python: bool) -> list[tuple[str, str]]:
    rows = [("python", platform.python_version())] if with_python else []
    for name in _VERSIONED:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return rows


def recipe_section(run: RunFiles) -> str:
    """The whole recipe; keys that differ from the schema's defaults stand out."""
    if not run.recipe_text:
        return '<p class="empty">recipe.yaml is absent.</p>'
    lines = run.recipe_text.splitlines()
    changed = _changed_lines(run)
    chosen = "\n".join(line for number, line in enumerate(lines, 1) if number in changed)
    whole = "".join(
        f"<span{_SET if number in changed else ''}>{escape(line) or ' '}</span>" for number, line in enumerate(lines, 1)
    )
    return (
        (f"<p>What differs from the defaults:</p>{code(chosen)}" if chosen else "")
        + "<details><summary>The whole recipe, every default written out</summary>"
        + f'<pre class="recipe">{whole}</pre></details>'
    )


def _changed_lines(run: RunFiles) -> set[int]:
    """Lines of recipe.yaml whose key differs from its default, and those of the sections around them."""
    try:
        lines = parse_yaml(run.recipe_text).lines
    except YamlError:
        return set()
    known = default_values()
    changed: set[int] = set()
    for path, value in flatten(run.recipe).items():
        pieces = tuple(path.split("."))
        generic = ".".join("0" if piece.isdecimal() else piece for piece in pieces)
        if generic in known and known[generic] == value:
            continue
        # A name of the recipe's own may hold dots: all of the mapping is taken then.
        while pieces and pieces not in lines:
            pieces = pieces[:-1]
        if pieces:
            changed.update(lines[pieces[:depth]] for depth in range(1, len(pieces)))
            changed.update(_lines_of(pieces, lines, num_lines=len(run.recipe_text.splitlines())))
    return changed


def _lines_of(path: KeyPath, lines: dict[KeyPath, int], *, num_lines: int) -> range:
    """All lines of one value: up to the next key that does not stand below it."""
    others = (line for other, line in lines.items() if other[: len(path)] != path and line > lines[path])
    return range(lines[path], min(others, default=num_lines + 1))


def default_values() -> dict[str, Any]:
    """The default of every key that has one, by its dotted name; those within sections that may be null too."""
    source = {"path": "x"}
    needed: dict[str, Any] = {"name": "x", "model": {"name": "x"}, "data": {"sources": [source]}, "training": {}}
    optional = {
        **needed,
        "data": {"sources": [source], "validation": {"source": source}},
        "evaluation": {"source": source, "early_stopping": {}},
    }
    values = {
        key: value
        for recipe in (optional, needed)
        for key, value in flatten(Recipe.model_validate(recipe).model_dump(mode="json")).items()
    }
    return {key: value for key, value in values.items() if key != "name" and not key.endswith((".path", "model.name"))}
