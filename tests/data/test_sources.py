"""Sources: kinds of files, folders and globs, row numbers, and what is missing."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune.data.formats import load_line
from finetune.data.sources import columns_of, open_source
from finetune.errors import DataError
from finetune.recipe.schema import SourceSection

ROWS = [{"prompt": "a", "completion": "1"}, {"prompt": "b\nc", "completion": "2"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Any) -> tuple[list[Any], list[str]]:
    source = open_source(SourceSection(path=str(path)), "data.sources[0]")
    rows = list(source.rows())
    values = [load_line(row.payload) if isinstance(row.payload, bytes) else row.payload for row in rows]
    return values, [source.origin(row.file, row.number) for row in rows]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("r.jsonl", (1, 3)), ("r.json", (1, 2)), ("r.csv", (2, 3)), ("r.parquet", (1, 2))],
)
def test_kinds_of_files(name: str, numbers: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    values, origins = read(path)
    assert values == ROWS
    assert origins == [f"{path}:{number}" for number in numbers]


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert read(tmp_path / "a.txt")[0] == [{"text": "one\ntwo\n"}]


def test_json_lines_may_be_called_json_and_open_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() for row in ROWS))
    assert read(tmp_path / "a.json")[0] == ROWS


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl", ROWS[1:])
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "LICENSE").write_text("x")
    assert read(tmp_path)[0] == ROWS
    assert read(f"{tmp_path}/**/*.jsonl")[0] == ROWS


def test_the_digest_covers_bytes_and_not_names(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return open_source(SourceSection(path=str(path)), "here").digest

    first = write(tmp_path / "a.jsonl", ROWS)
    copy = write(tmp_path / "b.jsonl", ROWS)
    assert digest(first) == digest(copy)
    stat = copy.stat()
    copy.write_bytes(copy.read_bytes().replace(b'"1"', b'"3"'))
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert copy.stat().st_size == stat.st_size
    assert digest(first) != digest(copy)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/none.jsonl", r"data.sources\[0\].path: there is no file .*none.jsonl"),
        ("{}/*.jsonl", "no file matches"),
        ("{}", "holds no file of a known kind"),
        ("{}/a.xlsx", r"unknown kind \(.xlsx\)"),
    ],
)
def test_what_is_missing_is_named(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=message):
        read(path.format(tmp_path))


def test_hub_keys_beside_a_file_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    for path in (tmp_path, tmp_path / "train.jsonl"):
        open_source(SourceSection(path=str(path)), "here")
        assert not capsys.readouterr().err
        open_source(SourceSection(path=str(path), split="test", name="main", revision="v1"), "here")
        err = capsys.readouterr().err
        for said in ("here.split: 'test'", "here.name: 'main'", "here.revision: 'v1'"):
            assert f"warning: {said} picks from a hub data set; of {path}, which is here, all is read" in err


def test_a_folder_of_several_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(DataError, match="several kinds"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},', "not a valid JSON array"),
        ("a.csv", b"a,b\n\xff,1\n", "not UTF-8"),
        ("a.csv", b'a,b\n"x,1\n', "not valid CSV"),
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.json", b'[{"a": 1}, {"b": ' + b"9" * 5000 + b"}]", "not a valid JSON array: Exceeds the limit"),
        ("a.json", b'[{"a": 1, "a": 2}]', "not a valid JSON array: the key 'a' stands twice"),
    ],
)
def test_fm29_broken_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_an_unreachable_hub_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"'org/name' is no file.*as a hub data set.*no route to the hub.*download"):
        read("org/name")


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    values, origins = read("org/name")
    assert values == ROWS and origins == ["org/name[train]:1", "org/name[train]:2"]
    other = SourceSection(path="org/name", name="main", split="test", revision="v1")
    source = open_source(other, "here")
    assert source.title == "org/name@v1[main, test]" and source.origin(0, 7) == "org/name@v1[main, test]:7"


def test_fm29_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    offsets, data = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, data])
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet is not a readable parquet file \(after row 0\): 'utf-8' codec"):
        read(tmp_path / "a.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: the column 'text' stands in the header twice"):
        read(tmp_path / "b.parquet")


def test_csv_files_that_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b\nprompt,completion\nc,d\n")
    values, origins = read(path)
    assert values[::2] == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert str(values[1]).startswith("the row repeats the header") and origins[1] == f"{path}:3"


def test_columns_are_the_union(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nbroken\n{"b": 2}\n')
    source = open_source(SourceSection(path=str(path)), "here")
    assert columns_of(source, list(source.rows())) == ["a", "b"]


def test_csv_rows_with_more_or_fewer_cells_than_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nSay hi, please,Hello\n"Say hi, please",Hello,, \nSay hi\n')
    values, origins = read(path)
    assert str(values[0]) == "the row has 3 cells, the header 2: a comma without quotes?"
    assert values[1:] == [
        {"prompt": "Say hi, please", "completion": "Hello"},
        {"prompt": "Say hi", "completion": None},
    ]
    assert origins == [f"{path}:{number}" for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "delimiter", "said"), [("a.csv", ";", "semicolons"), ("a.csv", "\t", "tabs"), ("a.tsv", "\t", "")]
)
def test_a_csv_file_of_another_locale(
    name: str, delimiter: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    cell = f'"a{delimiter} ""b"",\n1,5"'
    path.write_text(f"\ufeffprompt{delimiter}completion\n{cell}{delimiter}c, d\nx{delimiter}y{delimiter}z\n")
    for _ in range(2):
        values, _ = read(path)
    assert values[0] == {"prompt": f'a{delimiter} "b",\n1,5', "completion": "c, d"}
    assert str(values[1]).startswith(f"the row has 3 cells, the header 2: a {said or 'tabs'}"[:-1])
    assert capsys.readouterr().err.count(f"{path}: its cells are taken to be split by {said}") == bool(said)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt;system;x|text|tools", r"a.csv:1: the header has no comma, and is split by semicolons and by bars;"),
        ("prompt,completion,completion", r"a.csv:1: the column 'completion' stands in the header twice"),
    ],
)
def test_a_csv_header_that_is_not_sure(header: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("header", ["text|raw", "review; cleaned", "frage\tantwort", "text;"])
def test_a_single_column_with_such_a_sign_in_its_name(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\nfirst\nsecond; third|fourth\n")
    assert read(tmp_path / "a.csv")[0] == [{header: "first"}, {header: "second; third|fourth"}]
    (tmp_path / "a.csv").write_text("frage;antwort\na;b\n\nc;d\n")
    assert read(tmp_path / "a.csv")[0] == [{"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"}]


def test_a_tsv_cell_that_opens_with_a_quote_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\n"Hi" she said\tx\na\t"b\nc"\n"never closed\td\ne\tf\n')
    values, origins = read(path)
    assert [str(value).startswith("a cell opens with a quote") for value in values] == [True, False, True, False]
    assert values[1::2] == [{"prompt": "a", "completion": "b\nc"}, {"prompt": "e", "completion": "f"}]
    assert origins == [f"{path}:{number}" for number in (2, 3, 5, 6)]


def test_a_table_of_tabs_beside_other_data_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "meta.tsv").write_text("prompt\tcompletion\na\tb\n")
    assert read(tmp_path)[0] == [{"prompt": "a", "completion": "b"}]
    write(tmp_path / "a.jsonl", ROWS)
    assert read(tmp_path)[0] == ROWS


def test_a_csv_file_whose_header_fits_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nHello, world\n")
    source = open_source(SourceSection(path=str(tmp_path / "a.csv")), "here")
    with pytest.raises(DataError, match=r"here.path: none of the first 1 rows .*a.csv:2: the row has 2 cells"):
        columns_of(source, list(source.rows()))


def test_a_packed_file_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    source = open_source(SourceSection(path=str(tmp_path / "a.jsonl")), "here")
    with pytest.raises(DataError, match=r"none of the first 1 rows is an object \(see .*a.jsonl:1: not UTF-8"):
        columns_of(source, list(source.rows()))
