"""Every page in a real browser: no script errors, every figure drawn, nothing wider than the screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.commands.preview import build_preview
from finetune.recipe.load import load_recipe
from finetune.report.compare import compare_html
from finetune.report.html import report_html
from finetune.report.preview import preview_html
from finetune.report.run_files import open_run
from finetune.training.train import prepare_job
from tests.report.example_runs import write_run
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
WIDTHS = (390, 1280)
REPORT_FIGURES = ["loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "lengths"]

# Stands before everything else in the copy of a page: catches what its own script does wrong.
CATCH = """<script>window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...words) => problems.push(words.join(" "));
</script>"""

# Runs in the page around the copies. Frames, not windows: a window is never narrower than 500 pixels.
LOOK = Path(__file__).with_name("look.js").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    whole = write_run(folder, "whole")
    lame = write_run(folder, "a-run-with-a-rather-long-name-that-has-no-space-to-break-at-0123456789", until=57, seed=2)
    (lame.checkpoints / "step-000050" / "trainer_state.pt").unlink()
    empty = write_run(folder, "empty", until=1)
    for path in (empty.metrics, empty.ledger, empty.results, empty.samples):
        path.unlink()
    runs = [
        open_run(run.root) for run in (whole, lame, write_run(folder, "third", seed=5, model={"quantization": "none"}))
    ]
    model, rows = write_model(folder / "model", "llama"), write_jsonl(folder / "rows.jsonl", chat_rows(12))
    recipe = tiny_recipe(folder, model, rows)
    recipe["data"]["packing"] = "shared_prefix"
    job = prepare_job(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))
    return {
        "whole": report_html(runs[0]),
        "lame": report_html(runs[1]),
        "empty": report_html(open_run(empty.root)),
        "compare": compare_html(runs),
        "preview": preview_html(build_preview(job, 1, 2)),
    }


@pytest.fixture(scope="module")
def findings(pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    folder = tmp_path_factory.mktemp("browser")
    frames, keys = [], []
    for name, text in pages.items():
        for width in WIDTHS:
            copy = html.escape(text.replace("<head>", f"<head>{CATCH}", 1))
            frames.append(f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{copy}"></iframe>')
            keys.append((name, width))
    around = folder / "around.html"
    around.write_text(f'<!doctype html>{"".join(frames)}<pre id="found"></pre><script>{LOOK}</script>')
    dom = browse(folder, "--dump-dom", "--window-size=1600,1000", around.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None and found.group(1), "the page around did not run"
    return dict(zip(keys, json.loads(html.unescape(found.group(1))), strict=True))


def browse(profile: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet.split(),
        f"--user-data-dir={profile}/user",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


CASES = [(name, width) for name in ("whole", "lame", "empty", "compare", "preview") for width in WIDTHS]


@pytest.mark.parametrize(("name", "width"), CASES)
def test_a_page_works_in_a_browser(findings: dict[tuple[str, int], dict[str, Any]], name: str, width: int) -> None:
    found = findings[name, width]
    assert found["problems"] == []
    assert found["scroll"] <= 0 and found["wide"] == []
    assert found["clashes"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_and_tells_its_values(
    findings: dict[tuple[str, int], dict[str, Any]], width: int
) -> None:
    curves = [name for name in REPORT_FIGURES if name != "lengths"]
    expected = {"whole": REPORT_FIGURES, "lame": REPORT_FIGURES, "compare": [curves[0], "validation_loss", *curves[1:]]}
    for name, figures in expected.items():
        drawn = findings[name, width]["figures"]
        assert sorted(drawn) == sorted(figures)
        for key, figure in drawn.items():
            assert figure["width"] > 200 and figure["height"] > 100 and figure["paths"] >= 1, (name, key, figure)
            assert re.search(r"step|tokens", figure["tip"]), (name, key, figure)
    assert "validation" in findings["whole", width]["figures"]["loss"]["tip"]
