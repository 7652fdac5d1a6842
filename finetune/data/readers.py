"""Files of every accepted kind become numbered rows, each read by the field's own library where there is one."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.console import say
from finetune.data.formats import FORMATS, RowError, each_key_once
from finetune.errors import DataError

# Spreadsheets write semicolons where the comma is the decimal mark.
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_FIRST_ROWS = 20
_FIELDS = {field for shape in FORMATS.values() for field in (*shape.required, *shape.optional)}

Numbered = Iterator[tuple[int, bytes | Mapping[str, Any] | RowError]]


def _read_jsonl(file: Path) -> Numbered:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.strip()
            if line:
                yield number, line


def _read_json(file: Path) -> Numbered:
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not raw.startswith(b"["):  # JSON lines under another name
        yield from _read_jsonl(file)
        return
    try:
        rows = json.loads(raw, object_pairs_hook=each_key_once)
    except (ValueError, RecursionError, RowError) as error:  # not JSON or UTF-8, an integer of thousands of digits
        raise DataError(f"{file} is not a valid JSON array: {error}.") from error
    for number, row in enumerate(rows, 1):
        # a row that is no object is rejected with the others, where it is counted and named
        yield number, row if isinstance(row, dict) else json.dumps(row).encode()


def _read_csv(file: Path) -> Numbered:
    csv.field_size_limit(1 << 30)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    delimiter = "\t" if file.suffix.lower() == ".tsv" else _find_delimiter(file, text)
    rows = _csv_rows(file, text, delimiter)
    _, header = next(rows, (1, []))
    if isinstance(header, RowError):
        raise DataError(f"{file}:1: {header}.")
    _refuse_repeated(header, f"{file}:1")
    for number, row in rows:
        if isinstance(row, RowError):
            yield number, row
        elif row == header and len(row) > 1:
            yield number, RowError("the row repeats the header, as where files were joined; remove it")
        elif "".join(row[len(header) :]).strip():
            yield number, _surplus_cells(len(header), len(row), delimiter)
        elif row:
            cells: list[str | None] = [*row, *[None] * (len(header) - len(row))]
            yield number, dict(zip(header, cells, strict=False))


def _refuse_repeated(columns: Iterable[str], where: str) -> None:
    if repeated := [name for name, count in Counter(columns).items() if count > 1 and name]:
        raise DataError(f"{where}: the column {repeated[0]!r} stands in the header twice; rename or remove one.")


def _csv_rows(file: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str] | RowError]]:
    """Rows and the line on which each begins.

    Many programs write a .tsv file without any quoting: a row of one that opens with a quote and goes on is rejected.
    """
    stream, number, before = io.StringIO(text, newline=""), 1, 0
    reader = csv.reader(stream, strict=True, delimiter=delimiter)
    while True:
        position = stream.tell()
        try:
            row = next(reader, None)
        except csv.Error as error:
            if file.suffix.lower() != ".tsv":
                hint = "; a quote is never closed" if "unexpected end" in str(error) else ""
                raise DataError(f"{file}:{number} is not valid CSV: {error}{hint}.") from error
            yield number, RowError("a cell opens with a quote and does not end with one; put quotes around the cell")
            # the lines after it are rows of their own, though the open quote took them in
            stream.seek(position)
            stream.readline()
            reader, before = csv.reader(stream, strict=True, delimiter=delimiter), number
        else:
            if row is None:
                return
            yield number, row
        number = before + reader.line_num + 1


def _find_delimiter(file: Path, text: str) -> str:
    """What stands between the cells: a comma, or what alone splits a header in which there is none.

    A single column may have such a sign in its name: it splits where the first rows have as many cells as the header,
    or where it makes names of two columns that formats have.
    """

    def splits(delimiter: str) -> bool:
        header, *rows = islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 1 + _FIRST_ROWS)
        rows = [row for row in rows if row]
        even = bool(rows) and all(len(row) == len(header) for row in rows)
        names = {name.strip() for name in header} - {""}
        return len(header) > 1 and (delimiter == "," or (even and len(names) > 1) or len(_FIELDS & names) > 1)

    if not text or splits(","):
        return ","
    found = [delimiter for delimiter in _DELIMITERS if delimiter != "," and splits(delimiter)]
    if len(found) > 1:
        names = " and by ".join(_DELIMITERS[delimiter] for delimiter in found)
        raise DataError(f"{file}:1: the header has no comma, and is split by {names}; save the file with commas.")
    if not found:
        return ","
    _say_delimiter(file, found[0])
    return found[0]


@functools.cache
def _say_delimiter(file: Path, delimiter: str) -> None:
    """Once a process, though a file is read more than once."""
    say(f"{file}: its cells are taken to be split by {_DELIMITERS[delimiter]}")


def _surplus_cells(header: int, cells: int, delimiter: str) -> RowError:
    what = _DELIMITERS[delimiter].removesuffix("s")
    return RowError(f"the row has {cells} cells, the header {header}: a {what} without quotes?")


def _read_parquet(file: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _refuse_repeated(table.schema_arrow.names, str(file))
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, arrow_row(row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # text not UTF-8, a time that Python has not
        raise DataError(f"{file} is not a readable parquet file (after row {number:,}): {error}") from error


def arrow_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """An Arrow row without the keys that its objects do not have: Arrow gives all objects of a column the same keys."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(below) for key, below in value.items() if below is not None}
    return [_without_nulls(below) for below in value] if isinstance(value, list) else value


def _read_txt(file: Path) -> Numbered:
    """The whole file is one document: lines would lose what came before them."""
    try:
        yield 1, {"text": file.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
