"""report.html: what it holds of a run that is whole, unfinished, damaged or nearly empty."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import BadInputError
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.report.html import write_report
from finetune.report.reference import default_values
from finetune.report.run_files import open_run
from finetune.report.samples import collect_cards
from finetune.run_dir import RunDir
from tests.report.example_runs import write_run

FIGURES = ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "lengths")


def report_of(run_dir: RunDir) -> str:
    return write_report(run_dir).read_text()


class Balance(HTMLParser):
    """Checks that elements close in the order in which they were opened."""

    void = {"meta", "link", "br", "path"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def test_a_whole_run_has_every_part(tmp_path: Path) -> None:
    html = report_of(write_run(tmp_path))
    assert all(f'id="chart-{name}"' in html for name in FIGURES)
    for text in ("+89.0 points", "91.0%", "2 × H200", "step-000080", "finetune generate", "as expected", "malformed 2"):
        assert text in html, text
    parts = re.findall(r'<section id="(\w+)">', html)
    assert parts == ["results", "curves", "samples", "data", "adapter", "checkpoints", "environment", "recipe"]
    assert 'class="empty"' not in html
    assert "What is missing" not in html and ">finished<" in html
    balance = Balance()
    balance.feed(html)
    assert balance.open == []


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = report_of(write_run(tmp_path))
    assert not re.search(r'(src|href)="(?!#|data:,)', html) and "@import" not in html and "url(" not in html
    assert not re.search(r"https?://", html)


def test_text_of_models_and_data_stays_text(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, name="x")
    results = json.loads(run_dir.results.read_text())
    results["after"]["samples"][0]["completion"] = "</div><script>alert('x')</script>"
    run_dir.results.write_text(json.dumps(results))
    html = report_of(run_dir)
    assert "alert(" in html and "<script>alert" not in html and "<b>Glimo</b>" not in html


def test_samples_before_during_and_after_stand_together(tmp_path: Path) -> None:
    html = report_of(write_run(tmp_path))
    cards = html.split('<article class="sample">')[1:]
    assert len(cards) == 3
    headings = re.findall(r"<h4>(before|after|step \d+)", cards[0])
    assert headings == ["before", "step 20", "step 60", "step 100", "after"]
    assert re.findall(r"<h4>(before|after|step \d+)", cards[2]) == ["before", "after"]


def test_samples_with_the_same_answer_keep_to_their_prompts(tmp_path: Path) -> None:
    prompts = ["Is it red", "Is it red or blue", "Is it red"]  # a prompt within another, and one that repeats

    def sample(index: int, when: str) -> dict[str, str]:
        return {"prompt": prompts[index], "expected": "yes", "completion": f"{when} {index}"}

    run_dir = write_run(tmp_path)
    results = {when: {"samples": [sample(index, when) for index in range(3)]} for when in ("before", "after")}
    run_dir.results.write_text(json.dumps(results))
    during = [{**sample(index, "during"), "prompt": f"<user>{prompts[index]}?", "step": 20} for index in range(3)]
    run_dir.samples.write_text("".join(json.dumps(row) + "\n" for row in during[::-1]))
    cards = collect_cards(open_run(run_dir.root))
    assert [card.prompt for card in cards] == prompts
    completions = [
        [row["completion"] for row in (card.before, *card.during.values(), card.after) if row] for card in cards
    ]
    assert completions[1] == ["before 1", "during 1", "after 1"]
    assert [row[::2] for row in completions] == [[f"before {index}", f"after {index}"] for index in range(3)]
    assert {completions[0][1], completions[2][1]} == {"during 0", "during 2"}


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, until=57)
    (run_dir.checkpoints / "step-000050" / "trainer_state.pt").unlink()
    html = report_of(run_dir)
    assert "stopped at step 57 of 100" in html and "trainer_state.pt is missing" in html
    assert "There is no adapter yet, and no whole checkpoint" in html
    assert all(f'id="chart-{name}"' in html for name in FIGURES)


def test_a_checkpoint_stands_in_for_the_adapter(tmp_path: Path) -> None:
    html = report_of(write_run(tmp_path, until=57))
    assert "checkpoints/step-000050 --prompt" in html


def test_losses_that_are_not_finite_are_told_and_not_drawn(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, until=57)
    lines = run_dir.metrics.read_text().splitlines()
    cells = lines[-1].split(",")
    cells[2] = "nan"
    run_dir.metrics.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    html = report_of(run_dir)
    assert "not a finite number at 1 logged steps, first at step 57" in html
    assert not re.search(r' d="[^"]*nan', html)


@pytest.mark.parametrize("kept", ["recipe.yaml", "metrics.csv", "checkpoints"])
def test_a_run_of_which_little_is_left_still_has_a_report(tmp_path: Path, kept: str) -> None:
    run_dir = write_run(tmp_path, until=57)
    for path in run_dir.root.iterdir():
        if path.name != kept and path.is_file():
            path.unlink()
        elif path.name != kept:
            path.rename(tmp_path / path.name)
    html = report_of(run_dir)
    assert "What is missing" in html
    balance = Balance()
    balance.feed(html)


@pytest.mark.parametrize("content", ["", "null", "{}", "[1]", '{"sources": 3, "training": 1, "before": []}', "\x00"])
def test_files_of_any_content_do_not_break_the_report(tmp_path: Path, content: str) -> None:
    run_dir = write_run(tmp_path)
    for path in (run_dir.ledger, run_dir.results, run_dir.samples, run_dir.rejected, run_dir.metrics, run_dir.recipe):
        path.write_text(content)
    assert "<h1>" in report_of(run_dir)


def test_lengths_without_a_histogram_are_drawn_as_percentiles(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    ledger = json.loads(run_dir.ledger.read_text())
    del ledger["sources"][0]["length_histogram"]
    run_dir.ledger.write_text(json.dumps(ledger))
    html = report_of(run_dir)
    assert 'id="chart-lengths"' in html and 'class="median"' in html and "95 % up to 211" in html


def test_what_was_chosen_in_the_recipe_stands_out(tmp_path: Path) -> None:
    html = report_of(write_run(tmp_path))
    chosen = html.split("What differs from the defaults")[1].split("</pre>")[0]
    assert "quantization: nf4" in chosen and "lr: 0.002" in chosen and "double_quant" not in chosen
    assert default_values()["training.optimizer.lr"] == 2e-4


def test_what_was_chosen_is_the_whole_recipe_again_when_it_is_copied(tmp_path: Path) -> None:
    """Text over several lines, lists, names with dots, and sections that may be null."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"system": "Extract the ticket as JSON; copy values. " * 4, "validation": {"size": 0.1}},
        "adapter": {"rank_pattern": {"layers.0.self_attn.q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
        "evaluation": {"source": {"path": "/data/test.jsonl"}, "early_stopping": {"patience": 5}},
    }
    run_dir = write_run(tmp_path, **sections)
    html = report_of(run_dir).split("What differs from the defaults")[1].split("</pre>")[0]
    chosen = unescape(re.sub(r"<[^>]+>", "", html.split("<pre")[1].split(">", 1)[1]))
    assert Recipe.model_validate(yaml.safe_load(chosen)) == load_recipe(run_dir.recipe)
    for left in ("double_quant", "min_delta", "split:", "revision:"):
        assert left not in chosen


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is not a run"):
        write_report(RunDir(tmp_path))
