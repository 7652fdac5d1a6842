"""The table of export targets: what each needs, what loads it, how that was tried, and the function that does it.

Adding a target is one function and one row.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import BadInputError
from finetune.files import require_own

if TYPE_CHECKING:
    from finetune.models.sources import ModelSource
    from finetune.recipe.schema import Recipe


@dataclass(frozen=True)
class Job:
    """One export."""

    name: str  # of the run
    run: str  # as the user gave it
    source: Path  # the adapter's directory, or the merged model's, whichever the target needs
    out: Path | None  # a file or a directory, as the target writes; None: `folder`, and a name of its own
    folder: Path
    type_name: str | None  # one of the target's types; None: its first
    recipe: Recipe | None  # None for a merged model without its run

    def path(self, default: str) -> Path:
        """Where to write."""
        return self.folder / default if self.out is None else self.out


@dataclass(frozen=True)
class Target:
    """A row of the table."""

    needs: Literal["adapter", "merged"]
    loads_into: str
    verified: str
    types: tuple[str, ...]  # accepted by --type, the default first; empty: the target writes no weights
    export: Callable[[Job, str], list[str]]  # (job, type) -> lines for the user: what was written, how to start


def export_gguf(job: Job, type_name: str) -> list[str]:
    """Write the merged model as one GGUF file."""
    from finetune.export.gguf_file import own_mark
    from finetune.export.gguf_model import write_model

    path = job.path(f"{job.name}-{type_name}.gguf")
    require_own(path, "--out", own_mark("model", job.name), streams=False)
    write_model(job.source, path, type_name, job.name)
    return [f"wrote     {path}", f"start     llama-server --jinja -m {_quote(path)}"]


def export_gguf_lora(job: Job, type_name: str) -> list[str]:
    """Write the adapter as a GGUF LoRA for the GGUF file of its base."""
    from finetune.export.gguf_file import own_mark
    from finetune.export.gguf_lora import write_lora
    from finetune.models.load import load_config

    recipe, source = _base(job)
    path = job.path(f"{job.name}-lora-{type_name}.gguf")
    require_own(path, "--out", own_mark("adapter", job.name), streams=False)
    write_lora(job.source, load_config(recipe.model, source), path, type_name, job.name)
    name = recipe.model.name.removeprefix("package://").rpartition("/")[2]
    base = shlex.quote(name) if name.endswith(".gguf") else "BASE.gguf"
    return [f"wrote     {path}", f"start     llama-server --jinja -m {base} --lora {_quote(path)}"]


def export_ollama(job: Job, type_name: str) -> list[str]:
    """Write a directory for `ollama create`: the merged model as GGUF, and its Modelfile."""
    from finetune.export.gguf_file import own_mark
    from finetune.export.gguf_model import write_model
    from finetune.export.ollama import MODEL_FILE, MODELFILE, MODELFILE_MARK, write_modelfile

    folder = job.path(f"{job.name}-ollama")
    require_own(folder / MODEL_FILE, "--out", own_mark("model", job.name), streams=False)
    require_own(folder / MODELFILE, "--out", MODELFILE_MARK)
    # The template first: it may be refused, and weights take minutes.
    text = _modelfile(job)
    write_model(job.source, folder / MODEL_FILE, type_name, job.name)
    path = write_modelfile(folder, text)
    name = job.name.lower()
    return [f"wrote     {folder}", f"start     ollama create {name} -f {_quote(path)} && ollama run {name}"]


def export_vllm(job: Job, _: str) -> list[str]:
    """Check the adapter against what vLLM serves, and give the command."""
    return _serve(job, "vllm")


def export_tgi(job: Job, _: str) -> list[str]:
    """Check the adapter against what Text Generation Inference serves, and give the command."""
    return _serve(job, "tgi")


_MODEL_TYPES = ("f16", "bf16", "q8_0")
_BY_CONVERTER = "equal to llama.cpp's own converter, byte by byte"

TARGETS: dict[str, Target] = {
    "gguf": Target(
        "merged", "llama.cpp, LM Studio", f"{_BY_CONVERTER}; loaded by llama.cpp", _MODEL_TYPES, export_gguf
    ),
    "gguf-lora": Target(
        "adapter",
        "llama.cpp, on the GGUF of the base",
        f"{_BY_CONVERTER}; loaded by llama.cpp",
        ("f32", "f16"),
        export_gguf_lora,
    ),
    "ollama": Target(
        "merged",
        "Ollama",
        "its GGUF as above; its template filled by Go's library, equal to the chat template; not run in Ollama",
        _MODEL_TYPES,
        export_ollama,
    ),
    "vllm": Target(
        "adapter",
        "vLLM",
        "rules read from its source, on good and bad adapters; vLLM 0.32 answered as trained, on a CPU",
        (),
        export_vllm,
    ),
    "tgi": Target(
        "adapter", "Text Generation Inference", "rules read from its source, on good and bad adapters", (), export_tgi
    ),
}


def choose_type(target: str, wanted: str | None) -> str:
    """The type of number to write.

    Raises:
        BadInputError: the target has no such type.
    """
    accepted = TARGETS[target].types
    if wanted is None:
        return accepted[0] if accepted else ""
    if wanted not in accepted:
        what = f"accepted are {', '.join(accepted)}" if accepted else "it writes no weights, so leave --type out"
        raise BadInputError(f"--type {wanted}: not for --to {target}; {what}")
    return wanted


def _serve(job: Job, server: str) -> list[str]:
    from finetune.export.servers import SERVERS, read_facts, require_clean
    from finetune.models.load import load_config

    recipe, source = _base(job)
    title, lint, command = SERVERS[server]
    facts = read_facts(job.source, load_config(recipe.model, source))
    require_clean(title, job.source, job.run, lint(facts))
    start = command(source.location, source.revision, job.name, job.source, facts)
    return [f"checked   {job.source}: {title} serves it", f"start     {start}"]


def _base(job: Job) -> tuple[Recipe, ModelSource]:
    from finetune.models.sources import find_model

    assert job.recipe is not None, "a target that needs an adapter gets its run's recipe"
    return job.recipe, find_model(job.recipe.model)


def _modelfile(job: Job) -> str:
    from finetune.data.template import print_date, render
    from finetune.export.gguf_tokenizer import END_OF_TURN, load_tokenizer, read_special
    from finetune.export.ollama import derive_template, modelfile

    tokenizer = load_tokenizer(job.source)
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise BadInputError(f"{job.source}: its tokenizer has no chat template; export --to gguf instead")
    if job.recipe is not None and job.recipe.data.date is not None:
        source = print_date(source, job.recipe.data.date)
    tokens = dict(tokenizer.special_tokens_map)

    def render_messages(messages: list[dict[str, Any]], ask: bool) -> str:
        return render(source, tokens, messages, add_generation_prompt=ask)

    special = read_special(job.source, tokenizer)
    template = derive_template(render_messages)
    if special.add_bos:
        template = template.without_bos(str(tokenizer.bos_token))
    stops = [str(tokenizer.convert_ids_to_tokens(special.ids[name])) for name in END_OF_TURN if name in special.ids]
    return modelfile(template, stops, job.recipe.data.system if job.recipe is not None else None)


def _quote(path: Path) -> str:
    return shlex.quote(str(path))
