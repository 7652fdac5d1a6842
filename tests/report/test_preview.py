"""`finetune preview`: tokens with their texts, packed rows with their segments, and the rows that are not trained."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.cli import main
from finetune.commands.preview import build_preview
from finetune.recipe.load import load_recipe
from finetune.report.preview import Preview, preview_html, print_preview, visible
from finetune.report.tokens import RowView, TokenTexts
from finetune.training.train import Job, prepare_job
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("preview-model"), "llama")


def make_job(folder: Path, model: Path, rows: list[dict[str, Any]], **data: Any) -> Job:
    recipe = tiny_recipe(folder, model, write_jsonl(folder / "rows.jsonl", rows))
    recipe["data"].update(data)
    return prepare_job(load_recipe(write_recipe(folder / "recipe.yaml", recipe)))


def plain_text(preview: Preview) -> str:
    console = Console(width=100, record=True, color_system=None, file=io.StringIO())
    print_preview(preview, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("packing", "keys"),
    [("none", {}), ("isolated", {}), ("shared_prefix", {}), ("isolated", {"max_tokens": 1024, "row_multiple": 128})],
)
def test_the_rows_are_those_that_are_trained(tmp_path: Path, model: Path, packing: str, keys: dict[str, int]) -> None:
    job = make_job(tmp_path, model, chat_rows(12), packing=packing, **keys)
    rows = build_preview(job, 1, 99).rows
    steps = job.steps_of(job.data.train, rank=0, world_size=1)
    micros = [micro for index in range(len(steps)) for micro in steps[index].micro_batches]
    expected = [ids for micro in micros for ids in micro.input_ids.tolist()]
    assert [[token.id for segment in row.segments for token in segment.tokens] for row in rows] == expected
    if packing != "none":
        positions = [micro.position_ids[0].tolist() for micro in micros]
        for row, want in zip(rows, positions, strict=True):
            shown = [t.position for s in row.segments if s.kind != "padding" for t in s.tokens]
            assert shown == want[: len(shown)]
    supervised = [sum(s.num_supervised for s in row.segments) for row in rows]
    assert sum(supervised) == sum(len(micro.targets) for micro in micros)
    assert any(s.kind == "prefix" for row in rows for s in row.segments) == (packing == "shared_prefix")


def test_texts_of_tokens_make_up_the_text(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, chat_rows(2))
    texts = TokenTexts(job.tokenizer)
    text = "fox  zażółć 🦊\n\ttree <|im_end|>\n"
    ids = job.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = texts.of(ids)
    assert "".join(pieces) == text and len(pieces) == len(ids) and "" in pieces
    assert texts.is_special(job.tokenizer.eos_token_id) and not texts.is_special(ids[0])
    half = texts.of(job.tokenizer("🦊", add_special_tokens=False)["input_ids"][:2])
    assert len(half) == 2  # a character that was cut does not take its neighbours along


def test_without_colours_signs_say_what_is_supervised(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, chat_rows(12), packing="shared_prefix")
    shown = plain_text(build_preview(job, 1, 1))
    assert "row 1, step 1: " in shown and "shared prefix" in shown and "<|im_start|>" in shown and "↵" in shown
    first = re.search(r"sample 1, \S*rows\.jsonl:(\d+),", shown)
    assert first is not None
    answer = chat_rows(12)[int(first.group(1)) - 1]["messages"][2]["content"]
    spans = re.findall(r"⟦([^⟧]*)⟧", re.sub(r"\n║ ", "", shown))
    assert any(span.replace("│", "").startswith(answer) and span.endswith("<|im_end|>") for span in spans)


def test_colours_are_used_on_a_terminal(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, chat_rows(4))
    console = Console(width=60, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    print_preview(build_preview(job, 1, 1), console)
    styled = console.export_text(styles=True)
    assert "48;2;29;107;66" in styled and "⟦" not in styled
    assert all(len(line) <= 60 for line in re.sub(r"\x1b\[[0-9;]*m", "", styled).splitlines())


def test_dropped_and_cut_rows_are_named_with_their_reason(tmp_path: Path, model: Path) -> None:
    rows = chat_rows(6)
    rows[1]["messages"][1]["content"] = "river " * 300
    rows[2]["messages"][2]["content"] = "river " * 300
    job = make_job(tmp_path, model, rows, over_length="truncate", max_over_length_share=1.0)
    preview = build_preview(job, 1, 1)
    assert [Path(origin).name for origin in preview.cut] == ["rows.jsonl:3"]
    shown = plain_text(preview)
    assert "rows.jsonl:2: no label" in shown and "cut to the first 128 tokens: 1" in shown and "rows.jsonl:3" in shown
    html = preview_html(preview)
    assert "rows.jsonl:2" in html and "only the first 128 tokens are trained" in html


def test_a_text_in_pieces_is_split_and_not_cut(tmp_path: Path, model: Path) -> None:
    rows = [{"text": "river " * 400}, {"text": "the red fox"}]
    preview = build_preview(make_job(tmp_path, model, rows, over_length="truncate"), 1, 1)
    assert preview.cut == [] and [Path(origin).name for origin in preview.split] == ["rows.jsonl:1"]
    assert "split into pieces of at most 128 tokens: 1\n" in plain_text(preview)
    assert "in pieces of at most 128 tokens" in preview_html(preview)


def test_a_row_cut_behind_an_end_of_turn_is_cut_and_named_once(tmp_path: Path, model: Path) -> None:
    rows = chat_rows(6)
    length = int(make_job(tmp_path, model, rows[:1], packing="none").data.train.lengths[0])
    rows[0]["messages"] += [{"role": "user", "content": "river"}, {"role": "assistant", "content": "boats " * 99}]
    source = {"path": str(tmp_path / "rows.jsonl"), "weight": 2.0}
    keys = {"over_length": "truncate", "max_over_length_share": 1.0, "max_seq_len": length}
    job = make_job(tmp_path, model, rows, **keys, sources=[source])
    assert job.data.train[0][0][-1] in job.template.stop_token_ids
    preview = build_preview(job, 1, 1)
    assert sum(origin.endswith("rows.jsonl:1") for origin in preview.cut) == 1 and not preview.split
    assert len(preview.cut) == job.data.ledger.sources[0].rows_truncated


def test_the_page_names_every_token(tmp_path: Path, model: Path) -> None:
    job = make_job(tmp_path, model, chat_rows(12), packing="shared_prefix")
    preview = build_preview(job, 1, 2)
    html = preview_html(preview)
    shown = sum(len(s.tokens) for row in preview.rows for s in row.segments if s.kind != "padding")
    assert len(re.findall(r'<span[^>]* title="id \d+, position \d+', html)) == shown
    assert (
        "&lt;|im_start|&gt;" in html and 'class="segment shared"' in html and "No row is dropped, cut or split" in html
    )


def test_the_command_end_to_end(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path, model, write_jsonl(tmp_path / "rows.jsonl", chat_rows(12)))
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert main(["preview", str(file), "data.packing=none", "--row", "3"]) == 0
    out = capsys.readouterr().out
    assert "row 3, step 1" in out and "row 4" not in out
    assert main(["preview", str(file), "--row", "999"]) == 2
    assert "the run has" in capsys.readouterr().err
    page = tmp_path / "preview.html"
    assert main(["preview", str(file), "--rows", "1", "--html", str(page)]) == 0
    assert page.read_text().count('<section id="row-') == 1
    assert main(["preview", str(file), "--rows", "1", "--html", str(page)]) == 0
    capsys.readouterr()
    assert main(["preview", str(file), "--html", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl: exists, and is no earlier output of this command" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 12
    assert not (tmp_path / "runs").exists()  # looking leaves nothing behind


def test_control_characters_are_shown() -> None:
    assert visible("a\tb\r\n\x00 é") == "a⇥\tb␍↵\n⟨0⟩ é"


def test_a_row_without_tokens_is_no_error() -> None:
    assert RowView(1, 1).heading == "row 1, step 1: 0 samples, 0 tokens, 0 supervised"
