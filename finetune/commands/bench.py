"""`finetune bench train`: how fast a recipe trains on this machine, variant by variant, against its matrix units."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from finetune.arguments import add_overrides, positive
from finetune.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from finetune.training.bench import DEFAULT_VARIANTS, VARIANTS

    parser.add_argument("what", choices=("train",), help="what is measured")
    parser.add_argument("recipe", help="a recipe's file, or the name of a shipped one")
    add_overrides(parser)
    parser.add_argument("--steps", type=positive, default=5, metavar="N", help="timed optimizer steps of a round (5)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="rounds of all variants (3)")
    parser.add_argument(
        "--variants",
        default=",".join(DEFAULT_VARIANTS),
        metavar="A,B,...",
        help=f"what is compared, the first being 1.00: {', '.join(VARIANTS)}, any key.sub=value, or several joined "
        f"by +; default: {', '.join(DEFAULT_VARIANTS)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a torch profiler trace of each variant")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one row a variant."""
    from finetune.console import say, stdout
    from finetune.files import require_own
    from finetune.recipe.shipped import find_recipe
    from finetune.training.bench import REPORT_MARK, bench_training, split_outside, write_json

    if arguments.json is not None:
        require_own(arguments.json, "--json", REPORT_MARK)
    report = bench_training(
        find_recipe(arguments.recipe),
        arguments.overrides,
        list(dict.fromkeys(split_outside(arguments.variants, ","))),
        steps=arguments.steps,
        rounds=arguments.rounds,
        profile=arguments.profile,
        say=say,
    )
    # Wider than the 80 columns of an output that is no terminal: figures are not cut.
    stdout.width = max(stdout.width, 140)
    stdout.print(table(report))
    peak = report["peak_flops_per_second"] / 1e12
    stdout.print(
        f"Medians of {arguments.rounds} rounds of {arguments.steps} steps. Peak: {peak:.2f} TFLOP/s, a product of "
        f"square matrices in {report['peak_dtype']} here. FLOP/s count what LoRA training needs: no padding, nothing "
        "computed twice."
    )
    if arguments.json is not None:
        write_json(arguments.json, report)
        say(f"figures   {arguments.json}")
    return EXIT_OK


def table(report: dict[str, Any]) -> Any:
    """The report's variants as a table."""
    from rich.table import Table

    from finetune.training.bench import PHASES

    heads = ("tokens/s", "ratio", "computed/real", "TFLOP/s", "of peak", "memory", *(f"{p} s" for p in PHASES), "loss")
    view = Table("variant", *heads, box=None, pad_edge=False)
    for column in view.columns[1:]:
        column.justify = "right"
    for row in report["variants"]:
        if "tokens_per_second" not in row:
            view.add_row(row["variant"], f"did not run: {row['failure']}")
            continue
        view.add_row(
            row["variant"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['computed_ratio']:.2f}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['peak_share']:.0%}",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            *(f"{row['phase_seconds'][phase]:.3f}" for phase in PHASES),
            f"{row['mean_loss']:.4f}",
        )
    return view
