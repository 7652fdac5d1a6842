"""`finetune check` as a user runs it: in a process of its own, on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.tiny import tiny_recipe, write_recipe

TOPICS = {"data", "template", "model", "adapter", "steps", "packing", "memory", "disk", "time", "habits", "licence"}


def check(folder: Path, *arguments: str, **sections: Any) -> subprocess.CompletedProcess[str]:
    sections.setdefault("data", {"validation": {"size": 4}})
    made = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", **sections)
    path = write_recipe(folder / "recipe.yaml", made)
    command = [sys.executable, "-m", "finetune", "check", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=200)


def found_by(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    report = json.loads(result.stdout)
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels, key=["error", "warning", "fact"].index)
    assert report["ok"] == ("error" not in levels) == (result.returncode == 0)
    return list(report["findings"])


def test_a_good_recipe_gives_facts(folder: Path) -> None:
    result = check(folder, "--json")
    found = found_by(result)
    assert result.returncode == 0 and {finding["topic"] for finding in found} >= TOPICS
    memory = next(finding for finding in found if finding["topic"] == "memory")["values"]
    assert sum(memory["parts"].values()) == memory["total_bytes"]
    adapter = next(finding for finding in found if finding["topic"] == "adapter")["values"]
    assert adapter["targets"]["q_proj"] == 2 and adapter["trainable_parameters"] > 0
    texts = [finding["text"] for finding in found]
    assert any("token for token, the one that is served" in text for text in texts)


def test_every_mistake_is_told_at_once(folder: Path) -> None:
    result = check(folder, "--json", adapter={"target_modules": ["q_prj"]}, data={"max_seq_len": 8})
    found = [finding for finding in found_by(result) if finding["level"] == "error"]
    assert result.returncode == 2
    assert any("did you mean q_proj" in finding["text"] for finding in found)
    assert any("longer than data.max_seq_len" in finding["text"] for finding in found)
    assert len({finding["text"] for finding in found}) == len(found)


def test_a_model_that_does_not_fit_is_told_what_would(folder: Path) -> None:
    result = check(folder, "--gpu", "0.4GB", "--devices", "2", "--json")
    memory = next(finding for finding in found_by(result) if finding["topic"] == "memory")
    assert result.returncode == 2 and memory["level"] == "error"
    assert memory["values"]["world_size"] == 2 and memory["values"]["device_bytes"] == 400_000_000
    assert check(folder, "--gpu", "24GB").returncode == 0


def test_for_people_errors_come_first(folder: Path) -> None:
    result = check(folder, "model.name=/nowhere/at/all")
    assert result.returncode == 2
    assert "error: model.name: no such directory or file: /nowhere/at/all" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[-1].endswith("cannot work as it is")


def test_without_the_model_it_is_quick(folder: Path) -> None:
    started = time.monotonic()
    result = check(folder, "--no-model")
    assert time.monotonic() - started < 2.0
    assert result.returncode == 0 and "0 errors" in result.stdout
    assert check(folder, "--no-model", "data.sources.0.path=/no/rows.jsonl").returncode == 2
