"""metrics.csv: one row per logged step, readable at any moment, cut back to the checkpoint on resume."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from finetune.files import naming, write_atomic

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "lr",
    "validation_loss",
    "skipped_steps",
    "supervised_tokens",
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
)

Row = dict[str, float | int | None]


class MetricsFile:
    """Appends rows; every row is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, resumed_step: int, validation_loss: float | None = None) -> None:
        """Keep the rows up to `resumed_step`: later ones will be written again.

        `validation_loss` is that of `resumed_step`, where it was measured after its row was written.
        """
        rows = [row for row in read_metrics(self.path) if int(row["step"] or 0) <= resumed_step]
        if rows and rows[-1]["step"] == resumed_step and validation_loss is not None:
            rows[-1]["validation_loss"] = validation_loss
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue())

    def append(self, row: Row) -> None:
        """Write one row; unknown columns are an error of ours."""
        with naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def read_metrics(path: Path) -> Iterator[Row]:
    """The rows of a metrics file, numbers parsed; empty cells are None, a half-written last line is left out."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        # A machine that loses its power may leave NULs where a row was to be.
        records = csv.DictReader(line.replace("\0", "") for line in file)
        for record in records if "step" in (records.fieldnames or ()) else ():
            if None in record or None in record.values():
                continue
            try:
                yield {key: _number(value) for key, value in record.items()}
            except ValueError:
                continue


def _number(text: str) -> float | int | None:
    if text == "":
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
