"""The sections of a model card, each a function of what is known; an empty text leaves its section out."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.export.hub_contents import Contents
from finetune.export.model_card_licence import Licences
from finetune.export.places import ADAPTER_WEIGHTS
from finetune.privacy import redact
from finetune.recipe.load import dump_recipe
from finetune.recipe.paths import path_values
from finetune.recipe.schema import LoraSection, Recipe, SourceSection

_VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "tokenizers")
_MISSING = "–"
_MAX_CHARS = 600
_MARKUP = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_[]|~$"}
# Any other metric is a share of the rows, and more is better.
_LESS_IS_BETTER = ("perplexity", "loss")


def opening(contents: Contents) -> str:
    """Title and one paragraph."""
    recipe, base = contents.recipe, contents.base
    adapter = recipe.adapter
    low_bit = {"none": "", "int8": ", trained on the 8-bit base"}
    quantized = low_bit.get(recipe.model.quantization, f", trained on the {recipe.model.quantization} base (QLoRA)")
    what = {
        "adapter": f"A LoRA adapter (rank {adapter.rank}, alpha {adapter.alpha:g}{quantized}) for `{base.name}`.",
        "merged": f"`{base.name}` with a LoRA adapter (rank {adapter.rank}) merged into its weights{quantized}.",
        "gguf": f"A GGUF file of a LoRA fine-tune of `{base.name}` (rank {adapter.rank}{quantized}).",
        "gguf-lora": f"A LoRA adapter (rank {adapter.rank}{quantized}) for `{base.name}`, as a GGUF file.",
    }
    return f"# {recipe.name}\n\n{what[contents.kind]} Made with `finetune` {__version__} from the recipe below."


def results(contents: Contents, found: Mapping[str, Any]) -> str:
    """Every metric before and after training."""
    after = (found.get("after") or {}).get("metrics") or {}
    before = (found.get("before") or {}).get("metrics") or {}
    if not after:
        return ""
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        rows.append((name, _value(name, old), _value(name, new), _change(name, old, new)))
    note = "Perplexity: less is better. " if any(name in _LESS_IS_BETTER for name in after) else ""
    tuned = "with the adapter, before merging" if contents.is_merged else "with this adapter"
    where = f"on held-out rows: the bare base (before), and {tuned} (after)"
    return f"## Results\n\n{note}Measured {where}.\n\n" + _table(("metric", "before", "after", "change"), rows)


def samples(contents: Contents, found: Mapping[str, Any]) -> str:
    """Completions of the bare base and with the adapter, side by side."""
    before = (found.get("before") or {}).get("samples") or []
    after = (found.get("after") or {}).get("samples") or []
    if not after:
        return ""
    headings = ["prompt", "expected", *(["before"] if before else []), "after"]
    rows = []
    for index, sample in enumerate(after):
        row = [_cell(sample["prompt"]), _cell(sample["expected"])]
        if before:
            row.append(_cell(before[index]["completion"]) if index < len(before) else _MISSING)
        rows.append([*row, _cell(sample["completion"])])
    merging = " After: with the adapter, before merging." if contents.is_merged else ""
    return f"## Samples\n\nNot chosen: the first held-out rows.{merging}\n\n" + _table(headings, rows)


def usage(contents: Contents, repo_id: str) -> str:
    """How programs load it."""
    name = repo_id.split("/")[1]
    if contents.kind in ("gguf", "gguf-lora"):
        file = next(file for file in contents.files if file.endswith(".gguf"))
        served = f"llama-server --jinja -hf {repo_id} --hf-file {file}"
        if contents.kind == "gguf-lora":
            served = f"hf download {repo_id} {file} --local-dir .\nllama-server --jinja -m BASE.gguf --lora {file}"
        return "## Use\n\n" + _code("sh", f"# llama.cpp\n{served}")
    if contents.kind == "merged":
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")'
        )
        return "## Use\n\n" + _code("python", load) + "\n\nvLLM:\n\n" + _code("sh", f"vllm serve {repo_id}")
    parts = ["## Use", "PEFT:", _code("python", _peft(contents, repo_id))]
    parts += ["vLLM:", _vllm(contents, repo_id, name)]
    parts += ["llama.cpp:", _code("sh", _llama_cpp(contents, repo_id, name))]
    own = f"finetune generate hf://{repo_id} --prompt 'your text'"
    return "\n\n".join([*parts, "`finetune`:", _code("sh", own)])


def data(contents: Contents, ledger: Mapping[str, Any], licences: Licences) -> str:
    """Sources, what became of their rows, and the hashes of what was trained."""
    recipe = contents.recipe
    counted = [row for row in ledger.get("sources", ()) if isinstance(row, dict)]
    rows = []
    for index, (source, original) in enumerate(zip(recipe.data.sources, contents.original.data.sources, strict=True)):
        row: Mapping[str, Any] = next((one for one in counted if one.get("where") == f"data.sources[{index}]"), {})
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in row.get("dropped", {}).items())
        rows.append(
            (
                f"`{_source_name(source)}`",
                row.get("format", source.format),
                _count(row.get("rows_read")),
                _count(row.get("rows_kept")),
                dropped or ("0" if row else _MISSING),
                _count(row.get("supervised_tokens")),
                licences.data.get(original.path) or "not known",
            )
        )
    headings = ("source", "format", "rows read", "rows kept", "dropped", "supervised tokens", "licence")
    lines = ["## Data", "", _table(headings, rows), ""]
    if "train_samples" in ledger:
        lines.append(
            f"- training: {ledger['train_samples']:,} samples, {ledger['train_tokens']:,} tokens, "
            f"{ledger['train_supervised_tokens']:,} of them supervised (`train_on: {recipe.data.train_on}`)"
        )
        if ledger.get("validation_samples"):
            lines.append(
                f"- validation: {ledger['validation_samples']:,} samples, {ledger['validation_tokens']:,} tokens"
            )
        if ledger.get("duplicate_rows"):
            lines.append(f"- {ledger['duplicate_rows']:,} rows repeat another row")
        if ledger.get("validation_rows_in_train"):
            lines.append(f"- {ledger['validation_rows_in_train']:,} validation rows are also in the training data")
        if ledger.get("test_rows_in_train"):
            lines.append(f"- {ledger['test_rows_in_train']:,} test rows are also in the training data")
    hashes = contents.fingerprints.get("data") or {}
    lines += [f"- sha256 of the {name} samples: `{value}`" for name, value in hashes.items() if value]
    return "\n".join(lines).rstrip()


def training(contents: Contents, found: Mapping[str, Any], plot: str | None) -> str:
    """Time, hardware, versions and the loss curve."""
    machine = found.get("machine") or {}
    lines = ["## Training", ""]
    if found:
        step = found.get("adapter_step")
        best = "" if step in (None, found["steps"]) else f", the adapter from step {step:,} by its validation loss"
        lines.append(
            f"- {found['steps']:,} optimizer steps{best}, {found['tokens']:,} tokens in {_duration(found['seconds'])} "
            f"({found['tokens_per_second']:,.0f} tokens/s), peak memory {found['peak_memory_bytes'] / 1e9:.2f} GB"
        )
    if machine:
        gpus = machine.get("gpus") or []
        kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)) or "no GPU"
        lines.append(
            f"- hardware: {kinds}; {machine.get('cpu_cores', '?')} CPU cores, "
            f"{machine.get('memory_bytes', 0) / 2**30:.0f} GiB of memory, {machine.get('platform', '')}"
        )
    versions = found.get("versions")
    when = "" if versions else " (where this card was written)"
    stated = versions or {"finetune": __version__, **_installed()}
    lines.append(f"- versions{when}: " + ", ".join(f"{name} {version}" for name, version in stated.items()))
    if plot:
        lines += ["", f"![Loss over the optimizer steps]({plot})"]
    return "\n".join(lines)


def base(contents: Contents, licences: Licences) -> str:
    """The base model: name, commit, hash and licence."""
    found = contents.fingerprints.get("base") or {}
    lines = ["## Base model", "", f"- name: `{contents.base.name}`"]
    if contents.base.revision:
        lines.append(f"- revision: `{contents.base.revision}`")
    if found.get("sha256"):
        lines.append(f"- sha256 over config and weights: `{found['sha256']}`")
    lines.append(f"- licence: {licences.base or 'not known'}; it holds for what is made of the base too")
    return "\n".join(lines)


def limits(contents: Contents) -> str:
    """What it cannot be expected to do."""
    recipe = contents.recipe
    lines = [
        "## Limits",
        "",
        f"- Trained on samples of up to {recipe.data.max_seq_len:,} tokens, for the task of its data alone; what the "
        "base did well besides may have become worse, and was not measured unless the table above says so.",
        "- No safety training or evaluation is part of the recipe. Faults and biases of the base and of the data "
        "remain.",
        "- Prompts must be rendered with the chat template that is stored with it (`chat_template.jinja`).",
    ]
    if recipe.model.quantization != "none":
        lines.append(
            f"- It was trained on the base in {recipe.model.quantization}; on the unquantized base its answers "
            "differ slightly."
        )
    if not contents.is_merged and not contents.base.on_hub:
        lines.append("- The base is not on the Hub under the name given here: you need a copy of it.")
    return "\n".join(lines)


def reproduction(contents: Contents, repo_id: str) -> str:
    """The whole resolved recipe and the command that runs it again."""
    return (
        f"## Recipe\n\n`finetune run hf://{repo_id}` trains it again from `recipe.yaml` and compares base and data "
        f"with `fingerprints.json`.\n\n" + _code("yaml", dump_recipe(_without_host(contents)).rstrip())
    )


def _without_host(contents: Contents) -> Recipe:
    """The recipe without the host's name in what the user has written, names that others need aside."""
    data = contents.recipe.model_dump(mode="json")
    keep = contents.public_names()
    for value in path_values(data):
        value.section[value.path[-1]] = redact(value.text, keep=keep)
    if data["data"]["system"]:
        data["data"]["system"] = redact(data["data"]["system"])
    return Recipe.model_validate(data)


def hub_datasets(recipe: Recipe) -> list[str]:
    """Hub ids of the recipe's data sets."""
    paths = (source.path for source in recipe.data.sources)
    return list(dict.fromkeys(path for path in paths if not os.path.isabs(path) and "://" not in path))


def _peft(contents: Contents, repo_id: str) -> str:
    if contents.base.on_hub:
        load = f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")'
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    else:
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        load = (
            'base = AutoModelForCausalLM.from_pretrained("PATH OF YOUR COPY OF THE BASE")\n'
            f'model = PeftModel.from_pretrained(base, "{repo_id}")'
        )
    if contents.recipe.adapter.trainable_tokens and not contents.base.on_hub:
        # AutoPeftModel does this itself.
        load = load.replace("\nmodel =", "\nbase.resize_token_embeddings(len(tokenizer))\nmodel =")
    return f'{imports}\n\ntokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n{load}'


def _vllm(contents: Contents, repo_id: str, name: str) -> str:
    from finetune.export.servers import config_at_hand, lint_vllm, read_facts, vllm_rank

    weights = contents.files[ADAPTER_WEIGHTS]
    assert isinstance(weights, Path)
    facts = read_facts(weights.parent, config_at_hand(contents.original.model))
    if findings := lint_vllm(facts):
        reasons = "; ".join(finding.what for finding in findings)
        return f"It does not serve this adapter as it is: {reasons}. Merge it first: `finetune merge hf://{repo_id}`."
    served = contents.base.name if contents.base.on_hub else "PATH_OF_THE_BASE"
    served += f" --revision {contents.base.revision}" if contents.base.on_hub and contents.base.revision else ""
    flags = f"--tokenizer {repo_id} --enable-lora --max-lora-rank {vllm_rank(facts)} --lora-modules {name}={repo_id}"
    unsure = (
        f"The base was not at hand; whether vLLM serves adapters of it says `finetune export hf://{repo_id} --to vllm`."
    )
    return _code("sh", f"vllm serve {served} {flags}") + ("" if facts.model_type else f"\n\n{unsure}")


def _llama_cpp(contents: Contents, repo_id: str, name: str) -> str:
    recipe = contents.recipe
    if not _is_plain(recipe.adapter):
        return (
            f"finetune merge hf://{repo_id} --out {name}-merged\n"
            f"finetune export {name}-merged --to gguf\n"
            f"llama-server --jinja -m export/{name}-merged-f16.gguf"
        )
    return (
        f"finetune export hf://{repo_id} --to gguf-lora\n"
        f"llama-server --jinja -m BASE.gguf --lora export/{recipe.name}-lora-f32.gguf"
    )


def _is_plain(adapter: LoraSection) -> bool:
    """Whether programs that read LoRA matrices alone load it on the published base."""
    return not (adapter.use_dora or adapter.modules_to_save or adapter.trainable_tokens or adapter.rewrites_base)


def _source_name(source: SourceSection) -> str:
    named = [source.path]
    named += [f"name={source.name}"] if source.name else []
    named += [f"revision={source.revision}"] if source.revision else []
    return " ".join(named)


def _installed() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _value(name: str, value: float | None) -> str:
    if value is None:
        return _MISSING
    return f"{value:,.3f}" if name in _LESS_IS_BETTER else f"{value:.1%}"


def _change(name: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return _MISSING
    return f"{new - old:+,.3f}" if name in _LESS_IS_BETTER else f"{(new - old) * 100:+.1f} points"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _MISSING


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table: nothing in it is markup."""
    text = redact(text.strip())  # before anything is cut or escaped: half a token would be recognized by nobody
    if len(text) > _MAX_CHARS:
        half = _MAX_CHARS // 2
        text = f"{text[:half].rstrip()} […] {text[-half:].lstrip()}"
    return "<br>".join(html.escape(text or "(nothing)", quote=False).translate(_MARKUP).splitlines())


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _code(language: str, text: str) -> str:
    """A code block that ends at none of the text's own fences."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
