"""`finetune check` as a user runs it, on real files; in a process of its own where that is the matter."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from tests.tiny import tiny_recipe, write_recipe

TOPICS = {"data", "template", "model", "adapter", "steps", "packing", "memory", "disk", "time", "habits", "licence"}
Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command: its exit code and what it printed on stdout."""

    def run(*arguments: str, **sections: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["check", str(write_checked(folder, **sections)), *arguments])
        return code, capsys.readouterr().out

    return run


def write_checked(folder: Path, **sections: Any) -> Path:
    sections.setdefault("data", {"validation": {"size": 4}})
    made = tiny_recipe(folder, folder / "model", folder / "rows.jsonl", **sections)
    return write_recipe(folder / "recipe.yaml", made)


def found_by(code: int, out: str) -> list[dict[str, Any]]:
    report = json.loads(out)
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels, key=["error", "warning", "fact"].index)
    assert report["ok"] == ("error" not in levels) == (code == 0)
    return list(report["findings"])


def fresh(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", "check", str(write_checked(folder)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_good_recipe_gives_facts(folder: Path) -> None:
    """In a fresh process: what libraries say when they are imported is not among the JSON."""
    result = fresh(folder, "--json")
    found = found_by(result.returncode, result.stdout)
    assert result.returncode == 0 and {finding["topic"] for finding in found} >= TOPICS
    memory = next(finding for finding in found if finding["topic"] == "memory")["values"]
    assert sum(memory["parts"].values()) == memory["total_bytes"]
    adapter = next(finding for finding in found if finding["topic"] == "adapter")["values"]
    assert adapter["targets"]["q_proj"] == 2 and adapter["trainable_parameters"] > 0
    texts = [finding["text"] for finding in found]
    assert any("token for token, the one that is served" in text for text in texts)


def test_every_mistake_is_told_at_once(check: Check) -> None:
    code, out = check("--json", adapter={"target_modules": ["q_prj"]}, data={"max_seq_len": 8})
    found = [finding for finding in found_by(code, out) if finding["level"] == "error"]
    assert code == 2
    assert any("did you mean q_proj" in finding["text"] for finding in found)
    assert any("longer than data.max_seq_len" in finding["text"] for finding in found)
    assert len({finding["text"] for finding in found}) == len(found)


def test_a_model_that_does_not_fit_is_told_what_would(check: Check) -> None:
    code, out = check("--gpu", "0.4GB", "--devices", "2", "--json")
    memory = next(finding for finding in found_by(code, out) if finding["topic"] == "memory")
    assert code == 2 and memory["level"] == "error"
    assert memory["values"]["world_size"] == 2 and memory["values"]["device_bytes"] == 400_000_000
    code, out = check("--gpu", "24GB")
    assert code == 0 and "distributed.accelerator: cpu, so no run of this recipe is on the GPUs of --gpu" in " ".join(
        out.split()
    )


def test_for_people_errors_come_first(check: Check) -> None:
    code, out = check("model.name=/nowhere/at/all")
    assert code == 2
    assert "error: model.name: no such directory or file: /nowhere/at/all" in out.splitlines()[0]
    assert out.splitlines()[-1].endswith("cannot work as it is")


def test_without_the_model_it_is_quick(folder: Path) -> None:
    started = time.monotonic()
    result = fresh(folder, "--no-model")
    assert time.monotonic() - started < 2.0
    assert result.returncode == 0 and "0 errors" in result.stdout
    assert fresh(folder, "--no-model", "data.sources.0.path=/no/rows.jsonl").returncode == 2
    refused = fresh(folder, "--no-model", "--gpu", "24GB")
    assert refused.returncode == 2 and "--gpu: --no-model leaves out what depends on devices" in refused.stderr
