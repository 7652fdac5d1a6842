"""What stands beside a merged model's weights and tokenizer, complete for the programs that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.export.merge_files import find_file
from finetune.export.merge_plan import MergePlan
from finetune.models.sources import ModelSource

_GENERATION = "generation_config.json"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Names from before transformers 5, which other programs still read.
_OLD_ROPE = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
_OLD_NEOX_ROPE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def write_configs(
    folder: Path,
    config: Any,
    source: ModelSource,
    dtype: torch.dtype,
    plan: MergePlan,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
) -> None:
    """Write config.json and generation_config.json; both stop at the tokens that end a trained turn.

    generation_config.json at the base's other ones too, such as Llama 3.1's <|eom_id|>.
    """
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("_name_or_path", "_model_name_or_path"):  # of the base, and at times a path of someone's machine
        values.pop(name, None)
    values["eos_token_id"] = stop_token_ids[0]
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            values[name] = getattr(tokenizer, name)
    values["dtype"] = str(dtype).removeprefix("torch.")
    for section in (values, *(part for part in values.values() if isinstance(part, dict) and "dtype" in part)):
        section["dtype"] = section["torch_dtype"] = values["dtype"]  # the latter for transformers 4
    for section in (values, values.get("text_config") or {}):
        if "vocab_size" in section:
            section["vocab_size"] = plan.vocab_size
        if section is values or "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = plan.tied
        add_old_rope(section)
    _write_json(path, values)
    own = getattr(config.get_text_config(), "eos_token_id", None)
    _write_json(folder / _GENERATION, _generation_values(source, values, stop_token_ids, own))
    _copy_code(folder, values, source)
    if config.get_text_config() is not config:
        _copy_processor(folder, source)


def add_old_rope(values: dict[str, Any]) -> None:
    """Repeat `rope_parameters` under the top-level names that programs older than transformers 5 read."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if "full_attention" in rope:  # one set per layer type: Gemma 3
        local = rope.get("sliding_attention", {})
        if "rope_theta" in local:
            values.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope["full_attention"]
    names = _OLD_NEOX_ROPE if values.get("model_type") == "gpt_neox" else _OLD_ROPE
    for new, old in {**_OLD_ROPE, **names}.items():
        if new in rope:
            values[old] = rope[new]
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}


def _generation_values(
    source: ModelSource, config: dict[str, Any], stop_token_ids: Sequence[int], base_stops: int | list[int] | None
) -> dict[str, Any]:
    """`base_stops` are the base's where it has no generation_config.json that names them."""
    path = find_file(source, _GENERATION)
    values: dict[str, Any] = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    values.pop("_from_model_config", None)
    own = values.get("eos_token_id", base_stops)
    others = own if isinstance(own, list) else [] if own is None else [own]
    stops = list(dict.fromkeys([*stop_token_ids, *others]))
    values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    for name in ("bos_token_id", "pad_token_id"):
        if config.get(name) is not None:
            values[name] = config[name]
    return values


def _copy_code(folder: Path, config: dict[str, Any], source: ModelSource) -> None:
    """The Python files of a model that brings its own."""
    modules = {str(name).rpartition("--")[2].split(".")[0] for name in (config.get("auto_map") or {}).values()}
    for module in sorted(modules):
        path = find_file(source, f"{module}.py")
        if path is not None:
            for file in path.parent.glob("*.py"):
                shutil.copy(file, folder / file.name)


def _copy_processor(folder: Path, source: ModelSource) -> None:
    """What a program needs to show images to a model that reads them too."""
    for name in _PROCESSOR:
        path = find_file(source, name)
        if path is not None:
            shutil.copy(path, folder / name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
