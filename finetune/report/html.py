"""report.html: one self-contained page that says what a run was, what it reached and how to use it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from finetune.files import write_atomic
from finetune.report.charts import draw_chart
from finetune.report.curves import run_charts
from finetune.report.data_section import data_section
from finetune.report.overview import facts_of, missing_of, results_section, subtitle
from finetune.report.page import facts, notice, page
from finetune.report.reference import adapter_section, checkpoints_section, environment_section, recipe_section
from finetune.report.run_files import RunFiles, open_run
from finetune.report.samples import samples_section
from finetune.run_dir import RunDir


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` from what the run's directory holds, finished or not, and return its path.

    Raises:
        BadInputError: the directory is not a run's.
    """
    run = open_run(run_dir.root)
    write_atomic(run_dir.report, report_html(run))
    return run_dir.report


def report_html(run: RunFiles) -> str:
    """The report's text."""
    state = run.state
    header = (
        f'<div class="title"><h1>{escape(run.name)}</h1><span class="state {state}">{state}</span></div>'
        f'<p class="sub">{escape(subtitle(run))}</p>'
        + facts(facts_of(run))
        + notice(run.problems + missing_of(run), kind="warn", heading="What is missing")
    )
    curves = "".join(draw_chart(chart) for chart in run_charts(run))
    sections = [
        ("results", "Results", results_section(run)),
        ("curves", "Curves", f'<div class="charts">{curves}</div>'),
        ("samples", "Samples", samples_section(run)),
        ("data", "Data", data_section(run)),
        ("adapter", "Use the adapter", adapter_section(run)),
        ("checkpoints", "Checkpoints", checkpoints_section(run)),
        ("environment", "Environment", environment_section(run)),
        ("recipe", "Recipe", recipe_section(run)),
    ]
    return page(f"{run.name} · report", header, sections, what="Report")
