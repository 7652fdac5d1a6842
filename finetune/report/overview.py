"""The head of the report: what the run is, its main numbers, what is missing of it, and the results table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import PurePath
from typing import Any

from finetune.report import numbers
from finetune.report.page import table
from finetune.report.run_files import RunFiles


def subtitle(run: RunFiles) -> str:
    """Base model, quantization and adapter in a line."""
    model, adapter = run.key("model.name"), run.recipe.get("adapter")
    if not model:
        return "no recipe"
    parts = [PurePath(str(model)).name if "://" in str(model) or str(model).startswith("/") else str(model)]
    quantization = run.key("model.quantization")
    parts.append("unquantized" if quantization in (None, "none") else str(quantization))
    if isinstance(adapter, dict) and adapter.get("method"):
        method = str(adapter["method"])
        parts.append(f"{method} rank {adapter['rank']}" if "rank" in adapter else method)
    return " · ".join(parts)


def facts_of(run: RunFiles) -> list[tuple[str, str, str]]:
    """(label, value, remark) of what one looks for first."""
    return [*_metric_facts(run), *_loss_facts(run), *_work_facts(run)]


def _metric_facts(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    before, after = run.metric_values("before"), run.metric_values("after")
    for name in list(after)[:2]:
        old = before.get(name)
        remark = "" if old is None else f"before {numbers.metric_value(name, old)}"
        yield plain_name(name), numbers.metric_value(name, after[name]), remark


def _loss_facts(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    losses = run.column("loss")
    if losses:
        yield (
            "training loss",
            numbers.decimal(losses[-1][1]),
            f"{numbers.decimal(losses[0][1])} at step {losses[0][0]:,}",
        )
    if (best := run.best_validation) is not None:
        training = run.results.get("training")
        is_adapters = isinstance(training, dict) and training.get("adapter_step") == best[0] != run.step
        remark = f"at step {best[0]:,}" + (", which the adapter is from" if is_adapters else "")
        yield "best validation loss", numbers.decimal(best[1]), remark


def _work_facts(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    total = run.num_steps
    if run.step:
        partial = total is not None and run.step < total
        epoch = run.metrics[-1].get("epoch") if run.metrics else None
        early = ", stopped early" if run.state in ("finished", "measuring") else ""
        remark = f"of {total:,}{early}" if partial else ("" if epoch is None else f"{epoch:.2f} epochs")
        yield "steps", f"{run.step:,}", remark
    training = run.results.get("training")
    last: dict[str, Any] = dict(run.metrics[-1]) if run.metrics else {}
    source = training if isinstance(training, dict) else last
    seconds, tokens = source.get("seconds"), source.get("tokens")
    if seconds:
        yield "training time", numbers.duration(seconds), "" if tokens is None else f"{numbers.short(tokens)} tokens"
    speed = tokens / seconds if seconds and tokens else None
    if speed:
        yield "tokens per second", numbers.short(speed), ""
    if source.get("peak_memory_bytes"):
        yield "peak memory", numbers.size(source["peak_memory_bytes"]), ""


def missing_of(run: RunFiles) -> list[str]:
    """What a whole run would have and this one has not, each with what to do."""
    missing = []
    state, total = run.state, run.num_steps
    of = "" if total is None else f" of {total:,}"
    if not run.recipe:
        missing.append("recipe.yaml is absent, so the settings of this run are unknown.")
    if state == "running":
        missing.append(f"The run is at step {run.step:,}{of}; `finetune watch {run.shown_path}` follows it.")
    elif state == "measuring":
        missing.append("Training is done and the adapter saved; the run is measuring what it learned.")
    elif state == "stopped":
        missing.append(f"The run was stopped at step {run.step:,}{of}; the same `finetune run` command continues it.")
    elif state == "not started":
        missing.append("No step has been done yet.")
    if not run.metrics:
        missing.append("metrics.csv is absent or empty, so there are no curves.")
    if not run.ledger:
        missing.append("ledger.json is absent, so what became of the data is unknown.")
    if state == "finished" and "after" not in run.results:
        missing.append("The trained model was not measured.")
    if state == "finished" and not run.run_dir.adapter.is_dir():
        missing.append("The final adapter is absent; every whole checkpoint is an adapter too.")
    bad = [row["step"] for row in run.metrics if not math.isfinite(row.get("loss") or 0.0)]
    if bad:
        missing.append(f"The loss was not a finite number at {len(bad):,} logged steps, first at step {bad[0]:,}.")
    for checkpoint in run.checkpoints:
        if checkpoint.damage is not None:
            missing.append(f"{checkpoint.path.name} is not a whole checkpoint: {checkpoint.damage}.")
    return missing


def results_section(run: RunFiles) -> str:
    """Metrics before and after, as a table; shares also as bars."""
    before, after = run.metric_values("before"), run.metric_values("after")
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return '<p class="empty">No metric has been measured: see evaluation.metrics in the recipe.</p>'
    rows = []
    for name in names:
        old, new = before.get(name), after.get(name)
        better = numbers.is_better(name, old, new)
        kind = "" if better is None else (' class="good"' if better else ' class="bad"')
        change = f"<span{kind}>{escape(numbers.metric_change(name, old, new))}</span>"
        rows.append(
            [
                escape(plain_name(name)) + _bar(name, old, new),
                escape(numbers.metric_value(name, old)),
                f"<b>{escape(numbers.metric_value(name, new))}</b>",
                change,
            ]
        )
    return table(["metric", "before", "after", "change"], rows) + _measured_on(run)


def _bar(name: str, old: float | None, new: float | None) -> str:
    if not numbers.is_share(name) or new is None:
        return ""
    mark = "" if old is None else f'<u style="left:{100 * min(max(old, 0), 1):.1f}%"></u>'
    return f'<span class="meter"><i style="width:{100 * min(max(new, 0), 1):.1f}%"></i>{mark}</span>'


def _measured_on(run: RunFiles) -> str:
    source = run.key("evaluation.source.path")
    rows = f"the rows of {PurePath(str(source)).name}" if source else "the validation rows"
    first = run.key("evaluation.max_rows")
    rows = f"the first {first:,} of {rows}" if isinstance(first, int) else rows
    bars = "; a bar is the value after training, its mark the value before" if "after" in run.results else ""
    return f'<p class="note">Measured on {escape(rows)}{bars}.{_cut(run)}</p>'


def _cut(run: RunFiles) -> str:
    """How many completions the limit of tokens ended: an answer that is cut may count as a wrong one."""
    parts = {when: run.results[when] for when in ("before", "after") if isinstance(run.results.get(when), dict)}
    found = [
        f"{part['num_cut']} of {part.get('num_rows')} {when}" for when, part in parts.items() if part.get("num_cut")
    ]
    return f" Completions cut at the limit of new tokens: {', '.join(found)} training." if found else ""


def plain_name(metric: str) -> str:
    """A metric's name as words."""
    return metric.replace("_", " ").replace("json", "JSON")
