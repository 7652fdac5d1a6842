"""Sources: files, folders, globs and hub data sets become one stream of numbered raw rows.

A JSON line stays bytes until a worker parses it; everything else is an object. Files are hashed whole, so
that a changed byte is a changed data set.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.console import console, say, warn
from finetune.data.formats import FORMATS, RowError, load_line
from finetune.data.readers import READERS, arrow_row
from finetune.distributed import is_rank_zero
from finetune.errors import DataError, first_line

if TYPE_CHECKING:
    from finetune.recipe.schema import SourceSection

_BLOCK_BYTES = 1 << 20
_HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval"}
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
    _warn_of_hub_keys(section, where)
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


def _warn_of_hub_keys(section: SourceSection, where: str) -> None:
    """Where a path alone has replaced a hub data set's id, as an override does."""
    for key in ("split", "name", "revision"):
        if section.differs(key):
            what = f"{where}.{key}: {getattr(section, key)!r}"
            warn(f"{what} picks from a hub data set; of {section.path}, which is here, all is read")


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


def held_out_names(source: Source) -> list[str]:
    """Files that others hold out, by their names, where a folder or glob takes them in beside other files."""
    found = [name for name in source.names if _HELD_OUT & set(re.split(r"[^a-z]+", Path(name).stem.lower()))]
    return found if len(found) < len(source.names) else []


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
                yield RawRow(0, start + offset + 1, arrow_row(row))

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
