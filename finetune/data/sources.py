"""Sources: files, folders, globs and hub data sets become one stream of numbered raw rows.

A JSON line stays bytes until a worker parses it; everything else is an object. Files are hashed whole, so
that a changed byte is a changed data set.
"""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.console import console, say
from finetune.data.formats import FORMATS, RowError, each_key_once, load_line
from finetune.distributed import is_rank_zero
from finetune.errors import DataError, first_line

if TYPE_CHECKING:
    from finetune.recipe.schema import SourceSection

_BLOCK_BYTES = 1 << 20
# Spreadsheets write semicolons where the comma is the decimal mark.
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_FIRST_ROWS = 20
_FIELDS = {field for shape in FORMATS.values() for field in (*shape.required, *shape.optional)}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class RawRow(NamedTuple):
    """A row before its format is applied."""

    file: int
    """Index into the source's files."""
    number: int
    """Line (jsonl, csv) or row (json, parquet, hub), from 1."""
    payload: bytes | Mapping[str, Any] | RowError
    """A JSON line, an object, or why the file's reader can make nothing of the row."""


@dataclass(frozen=True)
class Source:
    """A resolved source: names of its files, a hash of all its bytes, and its rows."""

    where: str
    """The recipe's key, for messages: `data.sources[0]`."""
    title: str
    """What messages call it: the recipe's path; a hub data set with its configuration and split."""
    kind: str
    """What reads it: its files' suffix, or `hub`. Other readers make other rows of equal bytes."""
    names: tuple[str, ...]
    """Paths of the files as users know them; a hub data set is one name."""
    digest: str
    """sha256 of the content, without names: a moved file is the same data."""
    num_rows_hint: int
    """About how many rows there are, for the progress bar."""
    rows: Callable[[], Iterator[RawRow]]
    """Opens the stream of rows."""

    def origin(self, file: int, number: int) -> str:
        """`path/to/file.jsonl:12`."""
        return f"{self.names[file]}:{number}"


def open_source(section: SourceSection, where: str) -> Source:
    """Find and hash what `section.path` names; `where` is its key in the recipe, for messages.

    Raises:
        DataError: nothing is there, it is empty, of an unknown kind, or the hub cannot be reached.
    """
    files = _find_files(section.path, where)
    if files is None:
        return _open_hub(section, where)
    names = tuple(str(file) for file in files)
    digest, hint = hashlib.sha256(), 0
    for file in files:
        hint += _hash_file(file, digest, where)
    kind = files[0].suffix.lower()
    reader = READERS[kind]

    def rows() -> Iterator[RawRow]:
        for index, file in enumerate(files):
            try:
                for number, payload in reader(file):
                    yield RawRow(index, number, payload)
            except OSError as error:
                raise DataError(f"{path_key(where)}: {file} cannot be read: {error.strerror or error}.") from error

    return Source(where, section.path, kind, names, digest.hexdigest(), hint, rows)


def path_key(where: str) -> str:
    """What names a source's path: a key in the recipe at `where`, or the option that `where` is."""
    return where if where.startswith("--") else f"{where}.path"


def columns_of(source: Source, rows: list[RawRow]) -> list[str]:
    """The columns that occur in `rows`, in order of appearance.

    Raises:
        DataError: no row is an object.
    """
    values = [_parsed(row.payload) for row in rows]
    found = {str(key): None for value in values if isinstance(value, Mapping) for key in value}
    if not found:
        why = f": {values[0]}" if isinstance(values[0], RowError) else ""
        origin = source.origin(rows[0].file, rows[0].number)
        raise DataError(
            f"{path_key(source.where)}: none of the first {len(rows)} rows is an object (see {origin}{why})."
        )
    return list(found)


def _parsed(payload: bytes | Mapping[str, Any] | RowError) -> Any:
    """The row, or why nothing can be made of it."""
    try:
        return load_line(payload) if isinstance(payload, bytes) else payload
    except RowError as error:
        return error


def unused_columns(format_name: str, columns: Mapping[str, str], found: list[str]) -> list[str]:
    """Those of the columns `found` that no field of the format reads."""
    shape = FORMATS[format_name]
    read = {columns.get(field, field) for field in (*shape.required, *shape.optional)}
    return [name for name in found if name and name not in read]


def _find_files(path: str, where: str) -> list[Path] | None:
    """The files that a path names, sorted; None where it can only be a hub id."""
    accepted = ", ".join(READERS)
    target = Path(path).expanduser()
    if target.is_file():
        files = [target]
    elif target.is_dir():
        found = (file for file in target.rglob("*") if not _hidden(file.relative_to(target)))
        files = sorted(file for file in found if file.is_file() and file.suffix.lower() in READERS)
        # beside data of another kind, tables of tabs tell about it: meta.tsv
        files = [file for file in files if file.suffix.lower() != ".tsv"] or files
        if not files:
            raise DataError(f"{path_key(where)}: the folder {path} holds no file of a known kind ({accepted}).")
    elif any(sign in path for sign in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(target), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{path_key(where)}: no file matches {path} (seen from {Path.cwd()}).")
    elif target.suffix.lower() in READERS or not _HUB_ID.fullmatch(path):
        raise DataError(f"{path_key(where)}: there is no file {path} (seen from {Path.cwd()}).")
    else:
        return None
    kinds = sorted({file.suffix.lower() for file in files})
    unknown = [kind for kind in kinds if kind not in READERS]
    if unknown:
        raise DataError(
            f"{path_key(where)}: {path} is of an unknown kind ({unknown[0] or 'no suffix'}). Accepted: {accepted}."
        )
    if len(kinds) > 1:
        raise DataError(
            f"{path_key(where)}: {path} holds files of several kinds ({', '.join(kinds)}). "
            f"Name one kind with a glob, e.g. {path.rstrip('/')}/*{kinds[0]}, or list several sources."
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hash_file(file: Path, digest: Any, where: str) -> int:
    """Add the file's bytes to `digest`; returns its number of lines."""
    lines, last = 0, b"\n"
    try:
        own = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                own.update(block)
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise DataError(f"{path_key(where)}: {file} cannot be read: {error.strerror or error}.") from error
    digest.update(own.digest())
    return lines + (last != b"\n")


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
                    yield number, _arrow_row(row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # text not UTF-8, a time that Python has not
        raise DataError(f"{file} is not a readable parquet file (after row {number:,}): {error}") from error


def _arrow_row(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _open_hub(section: SourceSection, where: str) -> Source:
    import datasets

    title = _hub_title(section)
    if not console.is_terminal or not is_rank_zero():
        datasets.disable_progress_bars()
    say(f"loading the hub data set {title}")
    try:
        table = datasets.load_dataset(section.path, name=section.name, split=section.split, revision=section.revision)
    except Exception as error:  # the hub, the network, a builder: datasets wraps them in many types
        raise DataError(
            f"{path_key(where)}: {section.path!r} is no file or folder seen from {Path.cwd()}, and as a hub data "
            f"set (name: {section.name}, split: {section.split}, revision: {section.revision}) it could not "
            f"be loaded: {type(error).__name__}: {first_line(error)} Check the spelling, name and split; without "
            "network, download the files elsewhere and name them here."
        ) from error

    def rows() -> Iterator[RawRow]:
        for start in range(0, len(table), 1024):
            batch: dict[str, list[Any]] = table[start : start + 1024]
            for offset in range(len(next(iter(batch.values()), []))):
                row = {key: values[offset] for key, values in batch.items()}
                yield RawRow(0, start + offset + 1, _arrow_row(row))

    return Source(where, title, "hub", (title,), _hash_hub(table, section, where), len(table), rows)


def _hub_title(section: SourceSection) -> str:
    """`org/name[configuration, split]`: origins of two splits of one data set differ."""
    revision = f"@{section.revision}" if section.revision else ""
    return f"{section.path}{revision}[{', '.join(filter(None, (section.name, section.split)))}]"


def _hash_hub(table: Any, section: SourceSection, where: str) -> str:
    """sha256 of the split's name and size and of its Arrow files."""
    digest = hashlib.sha256(f"{section.split}:{len(table)}".encode())
    cached = [Path(entry["filename"]) for entry in table.cache_files]
    for file in cached:
        _hash_file(file, digest, where)
    if not cached:
        digest.update(str(table._fingerprint).encode())
    return digest.hexdigest()
