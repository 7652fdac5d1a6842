"""Every path that a run writes. Stages hand each other these files, not live objects."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import BadInputError

# In a merged model's directory: what was merged and measured; and, where its check failed, why it must not be used.
MERGE_RECORD = "merge.json"
UNUSABLE = "UNUSABLE.md"
# Beside an adapter and a merged model: what the base and the data that it was trained on are told by.
FINGERPRINTS = "fingerprints.json"
# Of a run, and beside its adapter and merged model.
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class RunDir:
    """The directory of one run; a property names a path, nothing is created by reading it."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: every default written out, paths absolute."""
        return self.root / RECIPE

    @property
    def metrics(self) -> Path:
        """One row per logged step."""
        return self.root / "metrics.csv"

    @property
    def samples(self) -> Path:
        """Generated samples, one JSON line each: step, prompt, completion, expected."""
        return self.root / "samples.jsonl"

    @property
    def ledger(self) -> Path:
        """Rows read, kept, cut and dropped, by reason."""
        return self.root / "ledger.json"

    @property
    def rejected(self) -> Path:
        """Every rejected row with its source, line and reason."""
        return self.root / "rejected.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`step-000120/` and so on."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The final adapter, in PEFT's own format, with the tokenizer and its chat template."""
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.root / "merged"

    @property
    def results(self) -> Path:
        """Metrics before and after training, throughput and memory."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.root / ".lock"

    @property
    def logs(self) -> Path:
        """What trackers keep on disk."""
        return self.root / "logs"


def read_results(run: RunDir) -> dict[str, Any]:
    """What a run's results.json holds; nothing where there is none.

    Raises:
        BadInputError: it is damaged.
    """
    if not run.results.exists():
        return {}
    try:
        results = json.loads(run.results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict):
        raise BadInputError(f"{run.results}: is damaged; put it aside, then run the same command again")
    return results
