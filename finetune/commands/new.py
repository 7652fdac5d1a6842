"""`finetune new`: five questions, or their answers as options, a look at the data, and a commented recipe."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from finetune.console import say, stdout, warn
from finetune.errors import EXIT_OK, BadInputError, DataError, FinetuneError, ModelError, first_line
from finetune.files import write_atomic
from finetune.recipe.compose import Choices, compose_recipe
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DataSection, ModelSection, SourceSection

if TYPE_CHECKING:
    from finetune.data.formats import Conversation
    from finetune.data.survey import Survey

Answer = TypeVar("Answer")

# Rows from which on some are held out for validation, and the most of them.
_ROWS_TO_SPLIT = 100
_MOST_VALIDATION_ROWS = 500
# Of the card's memory, what weights may take: activations, the loss and CUDA itself need the rest.
_SHARE_FOR_WEIGHTS = 0.6
_BYTES = {"none": 2.0, "nf4": 0.6}  # a weight; nf4 with its scales, and embeddings in 16 bits


class _Hardware(NamedTuple):
    """Where a run will be: GPUs with so much memory each, or the CPU."""

    num_gpus: int
    memory_bytes: float

    def __str__(self) -> str:
        if not self.num_gpus:
            return "a CPU"
        many = "one GPU" if self.num_gpus == 1 else f"{self.num_gpus} GPUs"
        return f"{many} with {self.memory_bytes / 1e9:.0f} GB"


@dataclass(frozen=True)
class _Model:
    """What could be learned of the base model without its weights."""

    name: str
    num_parameters: float | None
    context: int | None
    tokenizer: Any
    """None where the model cannot be reached from here."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = "Write a commented recipe. What is not given as an option is asked at a terminal."
    parser.add_argument("--model", metavar="NAME", help="base model: a hub id, a directory or a GGUF file")
    parser.add_argument("--data", metavar="PATH", help="a file, folder or glob of rows, or a hub data set's id")
    parser.add_argument("--hardware", metavar="WHERE", help="auto (this machine), cpu, 24GB, 8x80GB (default: auto)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", metavar="NUMBER", help="how long: passes over the data (default: 3)")
    length.add_argument("--steps", metavar="NUMBER", help="how long: optimizer steps")
    parser.add_argument("--output", "-o", metavar="FILE", help="the recipe's file (default: the data's name)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")


def run(arguments: argparse.Namespace) -> int:
    """Ask, look, write, and say what to do next."""
    model = _answer(
        arguments.model, "--model", "Which base model? (hub id, directory, GGUF file)", None, _look_at_model
    )
    data_path, survey = _answer(
        arguments.data,
        "--data",
        "Which data? (file, folder, hub data set)",
        None,
        lambda text: _look_at_data(text, model),
    )
    _say_survey(data_path, survey)
    where = "Where does it run? (auto, cpu, 24GB, 8x80GB)"
    hardware = _answer(arguments.hardware, "--hardware", where, "auto", _parse_hardware)
    given = f"{arguments.steps} steps" if arguments.steps is not None else arguments.epochs
    length = _answer(given, "--epochs", "How long? (epochs, or e.g. 200 steps)", "3", _parse_length)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data_path).stem).strip("-._*") or "my-run"
    output = _answer(
        arguments.output,
        "--output",
        "Where does it go?",
        f"{stem}.yaml",
        lambda text: _parse_output(text, arguments.force),
    )
    choices = _choose(model, data_path, survey, hardware, length, output)
    write_atomic(output, compose_recipe(choices))
    load_recipe(output)
    stdout.print(f"wrote     {output}", markup=False)
    for word, verb in (("check", "check"), ("look", "preview"), ("train", "run")):
        stdout.print(f"{word:<10}finetune {verb} {shlex.quote(str(output))}", markup=False)
    return EXIT_OK


def _answer(
    given: str | None, option: str, question: str, default: str | None, parse: Callable[[str], Answer]
) -> Answer:
    """What the option says, else what the user types, else the default.

    Raises:
        BadInputError: the option is wrong; or it is absent, has no default, and nobody can be asked.
    """
    if given is not None:
        return parse(given)
    if not sys.stdin.isatty():
        if default is None:
            raise BadInputError(f"{option} is missing, and there is no terminal to ask at; give {option}")
        return parse(default)
    while True:
        try:
            text = input(f"{question}{f' [{default}]' if default else ''} ").strip() or default
        except EOFError:
            raise BadInputError(f"no answer; give {option}") from None
        try:
            if text:
                return parse(text)
        except FinetuneError as error:
            say(f"  {error}")


def _is_local(text: str) -> bool:
    return text.startswith(("package://", ".", "/", "~")) or text.endswith(".gguf") or Path(text).exists()


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.absolute()) if _is_local(text) and "://" not in text else text


def _look_at_model(text: str) -> _Model:
    """Size, context and tokenizer of a model; little of one that cannot be reached from here."""
    from finetune.models.load import load_config, load_tokenizer, quiet_libraries
    from finetune.models.sources import describe_model

    quiet_libraries()
    section = ModelSection(name=_absolute(text))
    try:
        source = describe_model(section)
        config = load_config(section, source)
        tokenizer = load_tokenizer(section, source)
    except ModelError as error:
        if _is_local(text):
            raise
        warn(f"{first_line(error).rstrip('.')}; its size is taken from its name, lengths of rows are estimated")
        said = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", text.lower())
        size = float(said[1]) * (1e9 if said[2] == "b" else 1e6) if said else None
        return _Model(text, size, None, None)
    return _Model(text, _count_parameters(config), getattr(config, "max_position_embeddings", None), tokenizer)


def _count_parameters(config: Any) -> float | None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # code of the model's own, or a kind that generates no text: `run` says so
        return None
    return float(sum(parameter.numel() for parameter in model.parameters()))


def _look_at_data(text: str, model: _Model) -> tuple[str, Survey]:
    from finetune.data.survey import survey_source

    source = SourceSection(path=_absolute(text))
    return text, survey_source(source, "--data", _token_counter(source, model))


def _token_counter(source: SourceSection, model: _Model) -> Callable[[Conversation], int]:
    """Tokens of a conversation as it will be trained; estimated from its characters without a tokenizer."""
    from finetune.data.survey import CHARACTERS_PER_TOKEN
    from finetune.data.template import apply_system, load_template, render

    tokenizer = model.tokenizer

    def estimate(row: Conversation) -> int:
        shown = len(json.dumps(row.tools)) // CHARACTERS_PER_TOKEN if row.tools else 0
        return shown + sum(8 + len(str(turn["content"])) // CHARACTERS_PER_TOKEN for turn in row.messages)

    if tokenizer is None:
        return estimate
    named = "auto" if tokenizer.chat_template else "alpaca"
    own = tokenizer.chat_template
    template = load_template(tokenizer, DataSection(sources=[source], template=named))
    tokenizer.chat_template = own  # loading sets it

    special_tokens = dict(tokenizer.special_tokens_map)

    def count(row: Conversation) -> int:
        if row.messages[0]["role"] == "text":
            return len(tokenizer(row.messages[0]["content"]).input_ids)
        turns = apply_system(row.messages, None, template.system_role)
        try:
            shown = render(template.source, special_tokens, turns, row.tools, add_generation_prompt=False)
        except DataError:  # a row that the template refuses; training will name it
            return estimate(row)
        return len(tokenizer(shown, add_special_tokens=False).input_ids)

    return count


def _say_survey(path: str, survey: Survey) -> None:
    renamed = "".join(f", {field} from {column}" for field, column in survey.columns.items())
    unused = f"; not used: {', '.join(survey.unused)}" if survey.unused else ""
    say(f"{path}: {survey.num_rows:,} rows, format {survey.format}{renamed}{unused}")
    say("tokens of a row: " + ", ".join(f"{name} {value:,}" for name, value in survey.lengths.items()))
    if survey.num_bad:
        warn(f"{survey.num_bad:,} of {survey.num_looked_at:,} rows cannot be used; the first: {survey.first_bad}")


def _parse_hardware(text: str) -> _Hardware:
    word = text.strip().lower()
    if word == "cpu":
        return _cpu()
    if word == "auto":
        import torch

        count = torch.cuda.device_count()
        if not count:
            return _cpu()
        return _Hardware(count, min(torch.cuda.get_device_properties(index).total_memory for index in range(count)))
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*gi?b?", word)
    if found is None or found[1] == "0" or float(found[2]) == 0:
        raise BadInputError(f"--hardware {text}: accepts auto, cpu, a GPU's memory such as 24GB, or 8x80GB")
    return _Hardware(int(found[1] or 1), float(found[2]) * 1e9)


def _cpu() -> _Hardware:
    import psutil

    return _Hardware(0, psutil.virtual_memory().total)


def _parse_length(text: str) -> tuple[float | None, int | None]:
    """(epochs, steps), one of them None."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epochs?|steps?)?", text.strip().lower())
    value = float(found[1]) if found else 0.0
    in_steps = found is not None and (found[2] or "").startswith("step")
    if value <= 0 or (in_steps and value % 1):
        option = "--steps" if "step" in text else "--epochs"
        raise BadInputError(f"{option} {text}: accepts a number above 0, such as 3 or 0.5 epochs, or 200 steps")
    return (None, int(value)) if in_steps else (value, None)


def _parse_output(text: str, force: bool) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        raise BadInputError(f"--output {text}: is a directory; name a file in it, such as {path / 'my-run.yaml'}")
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(f"{path.name}.yaml")
    if path.exists() and not force:
        raise BadInputError(f"--output {path}: exists; name another file, or pass --force to overwrite it")
    if not path.parent.is_dir():
        raise BadInputError(f"--output {path}: there is no directory {path.parent}")
    return path


def _choose(
    model: _Model, data: str, survey: Survey, hardware: _Hardware, length: tuple[float | None, int | None], output: Path
) -> Choices:
    """Every key of the recipe, and why it is what it is."""
    quantization, strategy, why_quantization = _fit(model.num_parameters, hardware)
    size = 0.05 * survey.num_rows
    validation: float = 0.0 if survey.num_rows < _ROWS_TO_SPLIT else 0.05 if size <= _MOST_VALIDATION_ROWS else 500
    num_rows = survey.num_rows - round(validation if validation > 1 else validation * survey.num_rows)
    epochs, steps = length
    batch = min(16 if num_rows >= 800 else 8, num_rows)
    total = steps or max(1, math.ceil((epochs or 1) * num_rows / batch))
    max_seq_len, over_length, cut, why_length = _longest(survey, model, hardware)
    is_large = (model.num_parameters or 7e9) > 1e9
    template, why_template = _template(survey, model)
    bad = survey.num_bad / survey.num_looked_at
    why = {
        "model.quantization": why_quantization,
        "data.sources.format": "guessed from the columns' names" if survey.columns else "told from the columns",
        "data.template": why_template,
        "data.max_seq_len": why_length,
        "data.max_rejected_share": f"some rows cannot be used, e.g. {survey.first_bad}",
        "data.max_over_length_share": f"{cut:.0%} of the rows looked at are cut",
        "training.epochs": f"passes over {num_rows:,} rows: {total:,} steps",
        "training.max_steps": f"{total * batch / num_rows:.2g} passes over {num_rows:,} rows",
        "training.global_batch_size": "samples an optimizer step",
        "training.micro_batch_size": "samples a forward pass: speed and memory, not the result",
        "training.gradient_checkpointing": "less memory, about a third slower",
        "training.optimizer.lr": "the peak; lower it if the loss jumps",
        "distributed.strategy": "fsdp splits the frozen base" if strategy == "fsdp" else "every GPU holds the base",
        "data.validation.size": "held out, never trained on",
        "evaluation.every_steps": "validation loss, and samples to read",
    }
    return Choices(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-._") or "my-run",
        file=str(output),
        hardware=str(hardware),
        model=_beside(model.name, output),
        quantization=quantization,
        data=_beside(data, output),
        format=survey.format,
        columns=survey.columns,
        template=template,
        max_seq_len=max_seq_len,
        over_length=over_length,
        validation_size=validation,
        max_rejected_share=_allowed(bad, "max_rejected_share"),
        max_over_length_share=_allowed(cut, "max_over_length_share"),
        epochs=epochs,
        steps=steps,
        global_batch_size=batch,
        micro_batch_size=min(batch, 4 if max_seq_len <= 2048 else 1),
        gradient_checkpointing=is_large and hardware.num_gpus > 0,
        lr=2e-4 if is_large else 1e-3,
        accelerator="auto" if hardware.num_gpus else "cpu",
        strategy=strategy,
        devices=hardware.num_gpus if hardware.num_gpus > 1 else None,
        every_steps=max(1, min(100, total // 5)),
        why={key: text for key, text in why.items() if text},
    )


def _fit(num_parameters: float | None, hardware: _Hardware) -> tuple[str, str, str]:
    """(quantization, strategy, why): 16 bits where they fit, else 4 bits, else 4 bits over all GPUs."""
    strategy = "ddp" if hardware.num_gpus > 1 else "auto"
    if num_parameters is None:
        return ("nf4" if hardware.num_gpus else "none"), strategy, ""
    room = _SHARE_FOR_WEIGHTS * hardware.memory_bytes
    for quantization, many in (("none", 1), ("nf4", 1), ("nf4", max(1, hardware.num_gpus))):
        weights = num_parameters * _BYTES[quantization]
        if weights / many <= room:
            break
    else:
        warn(f"the model's weights take about {weights / 1e9:,.0f} GB in 4 bits, which is much for {hardware}")
    kept = "in 16 bits" if quantization == "none" else "in 4 bits (QLoRA)"
    why = f"the frozen base {kept}: about {max(0.1, weights / 1e9):,.1f} GB"
    return quantization, "fsdp" if many > 1 else strategy, why


def _allowed(share: float, key: str) -> float:
    """Twice a share of the rows looked at, for those that were not; 0 where the default allows for it."""
    wanted = min(1.0, math.ceil(200 * share) / 100)
    return wanted if wanted > DataSection.model_fields[key].default else 0.0


def _longest(survey: Survey, model: _Model, hardware: _Hardware) -> tuple[int, str, float, str]:
    """(max_seq_len, over_length, share of the rows that are cut, why)."""
    limit = min(model.context or 8192, 4096 if hardware.num_gpus else 1024)
    if survey.format == "text":
        return min(1024, limit), "drop", 0.0, "tokens of a sample; longer texts are split"
    sure = 1.0 if model.tokenizer is not None else 1.3
    wanted = max(128, 64 * math.ceil(sure * survey.lengths["p99"] / 64))
    rows = f"the first {survey.num_looked_at:,} rows" if survey.num_rows > survey.num_looked_at else "the rows"
    spread = f"half of {rows} have up to {survey.lengths['p50']:,} tokens, 99 % up to {survey.lengths['p99']:,}"
    if wanted <= limit:
        return wanted, "drop", 0.0, spread
    cut = sum(sure * length > limit for length in survey.all_lengths) / len(survey.all_lengths)
    return limit, "truncate", cut, f"{spread}; longer ones are cut"


def _template(survey: Survey, model: _Model) -> tuple[str, str]:
    if survey.format == "text":
        return "auto", ""
    if model.tokenizer is None:
        return "auto", "the tokenizer's own chat template; alpaca or chatml for a base model that has none"
    if model.tokenizer.chat_template:
        return "auto", "the tokenizer's own chat template"
    named = "alpaca" if survey.format in ("alpaca", "prompt_completion") else "chatml"
    return named, "the tokenizer has none of its own"


def _beside(text: str, output: Path) -> str:
    """A local path as the recipe writes it: relative to itself where that is short."""
    if not _is_local(text) or "://" in text:
        return text
    path = Path(text).expanduser().absolute()
    relative = os.path.relpath(path, output.absolute().parent)
    if relative.count("../") > 2:
        return str(path)
    return relative if relative.startswith(".") else f"./{relative}"
