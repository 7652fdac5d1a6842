"""The model card: README.md with metadata for the Hub, written from a run's files, and the loss curve beside it.

The text depends on the run alone (no date), so that pushing the same run again changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.export import model_card_sections as sections
from finetune.export.hub_contents import Contents, Kind
from finetune.export.model_card_licence import Licences
from finetune.export.model_card_plot import draw_loss, read_curve
from finetune.privacy import redact_secrets

CARD = "README.md"
LOSS_PLOT = "loss.svg"
_RELATION: dict[Kind, str] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized", "gguf-lora": "adapter"}
_LIBRARY: dict[Kind, str] = {"adapter": "peft", "merged": "transformers", "gguf": "gguf", "gguf-lora": "gguf"}


@dataclass(frozen=True)
class Evidence:
    """What a run left besides its adapter; each part may be missing."""

    results: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    plot: str | None = None


def add_card(contents: Contents, repo_id: str, licences: Licences) -> None:
    """Add the model card and the loss curve to `contents.files`."""
    evidence = read_evidence(contents)
    if evidence.plot is not None:
        contents.files[LOSS_PLOT] = evidence.plot.encode()
    contents.files[CARD] = write_card(contents, repo_id, licences, evidence).encode()


def read_evidence(contents: Contents) -> Evidence:
    """What the run's directory says beyond the adapter."""
    run = contents.run
    if run is None:
        return Evidence()
    plot = draw_loss(read_curve(run.metrics, "loss"), read_curve(run.metrics, "validation_loss"))
    return Evidence(_read(run.results), _read(run.ledger), plot)


def write_card(contents: Contents, repo_id: str, licences: Licences, evidence: Evidence) -> str:
    """The text of README.md; secrets, local paths and the host's name are left out, wherever they came from."""
    training = evidence.results.get("training", {})
    parts = [
        sections.opening(contents),
        sections.results(contents, evidence.results),
        sections.samples(contents, evidence.results),
        sections.usage(contents, repo_id),
        sections.data(contents, evidence.ledger, licences),
        sections.training(contents, training, LOSS_PLOT if evidence.plot else None),
        sections.base(contents, licences),
        sections.limits(contents),
        sections.reproduction(contents, repo_id),
    ]
    body = "\n\n".join(part for part in parts if part)
    metadata = yaml.safe_dump(card_metadata(contents, licences), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{redact_secrets(body, keep=[repo_id, *contents.public_names()])}\n"


def card_metadata(contents: Contents, licences: Licences) -> dict[str, Any]:
    """The metadata that the Hub reads: base, licence, library, task, data sets and tags."""
    recipe, keep = contents.recipe, contents.public_names()
    metadata: dict[str, Any] = {}
    if contents.base.on_hub:
        relation = _RELATION[contents.kind]
        metadata |= {"base_model": redact_secrets(contents.base.name, keep=keep), "base_model_relation": relation}
    if licences.identifier is not None:
        metadata["license"] = licences.identifier
    metadata["library_name"] = _LIBRARY[contents.kind]
    metadata["pipeline_tag"] = "text-generation"
    datasets = sections.hub_datasets(contents.original)
    if datasets:
        metadata["datasets"] = [redact_secrets(name, keep=keep) for name in datasets]
    quantized = recipe.model.quantization in ("nf4", "fp4")
    metadata["tags"] = ["finetune", recipe.adapter.method, *(["qlora"] if quantized else [])]
    return metadata


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the card says less
    return content if isinstance(content, dict) else {}
