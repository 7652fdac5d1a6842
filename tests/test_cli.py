"""The command line as a user meets it: quick help, exit codes, no traceback for a user's mistake."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune import __version__, cli
from finetune.errors import BadInputError, FinetuneError, PreemptedError
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import copied_text, find_recipe

HEAVY = ("torch", "transformers", "lightning", "peft", "datasets", "numpy", "bitsandbytes", "pandas")
PRESENT = [name for name, verb in cli.VERBS.items() if importlib.util.find_spec(f"finetune.commands.{verb.module}")]


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "finetune", *arguments], capture_output=True, text=True, check=False)


def imported_by(*arguments: str) -> tuple[set[str], float]:
    """What the command imports, and the seconds that all imports and the command's own start took."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", done.stderr)
    return {name for _, name in rows}, sum(int(own) for own, _ in rows) / 1e6


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("schema",), ("completion", "bash"), *((name, "--help") for name in PRESENT)],
    ids=" ".join,
)
def test_help_is_quick_and_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    modules, seconds = imported_by(*arguments)
    assert not modules & set(HEAVY)
    # Where this was written: 0.05 s for help, 0.16 s for `schema` (pydantic). The rest is for slow machines.
    assert seconds < 1.0


def test_help_lists_every_verb() -> None:
    text = finetune("--help").stdout
    for name, verb in cli.VERBS.items():
        assert re.search(rf"^ +{name} +{re.escape(verb.help)}", text, re.MULTILINE)


@pytest.mark.parametrize("name", PRESENT)
def test_help_of_a_verb_ends_with_an_example(name: str) -> None:
    done = finetune(name, "--help")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith(f"example:\n  {cli.VERBS[name].example}")
    assert cli.VERBS[name].example.startswith(f"finetune {name} ")


@pytest.mark.parametrize("name", PRESENT)
def test_the_example_of_a_verb_is_understood(name: str) -> None:
    words = shlex.split(cli.VERBS[name].example.partition(" > ")[0])
    assert cli.build_parser(name).parse_args(words[1:]).verb == name


def test_version() -> None:
    assert re.match(rf"finetune {re.escape(__version__)} \(python 3\.\d+\.\d+, torch \d", finetune("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("rnu", "x"), "unknown verb rnu; did you mean run?"),
        (("zzz",), "unknown verb zzz; accepts run, "),
        (("train", "x.yaml"), "unknown verb train; did you mean run?"),
        (("run", "x.yaml", "--lr", "1e-4"), "unrecognized arguments: --lr 1e-4; a recipe's keys stand behind it"),
        (("check", "x.yaml", "--devices", "0"), "argument --devices: 0: must be at least 1"),
        (("run",), "required: recipe\n"),
        (("schema", "--nope"), "unrecognized arguments: --nope"),
        (("schema", "-o", "/no/such/folder/x"), "error: --output /no/such/folder/x: cannot be written"),
        (("run", "r" * 300), "File name too long"),
        (
            ("recipes", "copy", "no-such-recipe"),
            "error: no-such-recipe: there is no such file and no shipped recipe",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_exit_2_without_a_traceback(arguments: tuple[str, ...], part: str) -> None:
    done = finetune(*arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_a_terminal_cannot_show_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "generate", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"},
        capture_output=True,
        check=True,
    )
    assert b'"prompt": ?}' in done.stdout and not done.stderr


def test_overrides_may_stand_behind_options(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel: {name: ./absent}\ndata: {sources: [{path: a.jsonl}]}\ntraining: {epochs: 1}\n")
    done = finetune("preview", str(path), "--rows", "1", "training.epochs=none", "data.sources[0].max_rows=2")
    assert done.returncode == 2 and "override training.epochs=none: got" in done.stderr
    done = finetune("run", str(path), "--fresh", "training.epochs=2", "--nope")
    assert done.returncode == 2 and "unrecognized arguments: training.epochs=2 --nope" in done.stderr


def test_no_verb_prints_help_and_exits_2() -> None:
    done = finetune()
    assert done.returncode == 2
    assert "usage: finetune" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_options_choices_and_files(tmp_path: Path) -> None:
    script = finetune("completion", "bash").stdout
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.yaml").touch()

    def offered(*words: str) -> set[str]:
        """What bash offers for the last of `words`."""
        line = " ".join(f"'{word}'" for word in words)
        ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_finetune; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return {word.rstrip("/") for word in done.stdout.split()}

    assert offered("finetune", "") >= set(cli.VERBS)
    assert offered("finetune", "mer") == {"merge"}
    assert offered("finetune", "run", "--re") == {"--resume"}
    assert offered("finetune", "merge", "--base", "") >= {"auto", "original", "dequantized"}
    assert offered("finetune", "run", "mi") == {"mine.yaml"}
    assert offered("finetune", "report", "ru") == {"runs"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_names_every_verb_and_is_valid(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(finetune("completion", shell).stdout)
    assert all(name in script.read_text() for name in cli.VERBS)
    if shutil.which(shell) is not None:
        assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


def test_schema_goes_to_stdout_and_to_a_file(tmp_path: Path) -> None:
    done = finetune("schema")
    assert json.loads(done.stdout)["title"] == "finetune recipe"
    assert finetune("schema", "-o", str(tmp_path / "s.json")).returncode == 0
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == done.stdout
    assert finetune("schema", "-o", str(tmp_path / "s.json")).returncode == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\n")
    refused = finetune("schema", "-o", str(recipe))
    assert refused.returncode == 2 and f"{recipe}: exists, and is no earlier output" in refused.stderr
    assert recipe.read_text() == "name: mine\n"


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert errors == b""


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (BadInputError("bad"), 2, "error: bad\n"),
        (FinetuneError("failed"), 1, "error: failed\n"),
        (PreemptedError("again"), 75, "again\n"),
        (KeyboardInterrupt(), 75, "interrupted\n"),
    ],
    ids=["bad input", "failure", "preempted", "interrupted"],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_run", _raiser(raised))
    assert cli.main(["schema"]) == code
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_place_that_cannot_be_written_is_no_bug(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", _raiser(OSError(number, os.strerror(number), "runs/mine/report.html")))
    assert cli.main(["schema"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot read or write runs/mine/report.html: {os.strerror(number)}; mend that")


def test_anything_else_is_a_bug_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", _raiser(RuntimeError("unforeseen")))
    assert cli.main(["schema"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: unforeseen" in said
    assert said.splitlines()[-1].startswith("error: this is a bug in finetune. Please open an issue")


def test_a_verb_that_runs_out_of_memory_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = SimpleNamespace(configure=lambda parser: None, run=_raiser(MemoryError()))
    monkeypatch.setattr(cli, "load_command", lambda module: command)
    assert cli.main(["generate"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory in finetune generate, after ") and "evaluation.batch_size" in said


def test_an_error_on_another_rank_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "_run", _raiser(FinetuneError("failed")))
    assert cli.main(["schema"]) == 1
    assert capsys.readouterr().err == "[rank 3] error: failed\n"


def _raiser(error: BaseException):
    def raise_it(_: object) -> int:
        raise error

    return raise_it


# --- Shipped recipes


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with one recipe and its data, in place of the project's own."""
    (tmp_path / "root" / "recipes").mkdir(parents=True)
    (tmp_path / "root" / "data").mkdir()
    (tmp_path / "root" / "data" / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "root" / "recipes" / "demo.yaml").write_text(
        "# yaml-language-server: $schema=../x.json\n# Purpose:  A demonstration.\n\nname: demo  # kept\n"
        "model: {name: org/model}\n"
        "data:\n  sources:\n    - path: ../data/rows.jsonl  # kept too\ntraining: {epochs: 1}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("finetune.recipe.shipped.shipped_root", lambda: tmp_path / "root")
    return tmp_path / "root"


@pytest.mark.parametrize("text", ["demo", "recipes/demo.yaml", "./recipes/demo.yaml", "demo.yaml"])
def test_a_shipped_recipe_is_found_by_name_and_by_path(
    shipped: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(text) == shipped / "recipes" / "demo.yaml"


def test_a_file_goes_before_a_shipped_recipe(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("name: mine\n", encoding="utf-8")
    assert find_recipe("demo.yaml") == Path("demo.yaml")
    assert find_recipe("demo") == shipped / "recipes" / "demo.yaml"


def test_a_recipe_that_is_not_there_names_the_nearest(shipped: Path) -> None:
    with pytest.raises(BadInputError, match=r"recipes/dmeo.yaml: there is no such file .* did you mean demo\?"):
        find_recipe("recipes/dmeo.yaml")


def test_recipes_are_listed_with_what_they_say_of_themselves(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("demo  A demonstration.\n  model     org/model\n  method    LoRA, rank 16\n")
    assert "  result    not measured\n" in said
    path = shipped / "recipes" / "demo.yaml"
    opening = "# Purpose: P.\n# Hardware: one GPU.\n# Measured: right in 91 %; 12 min and 7.5 GB on an H200.\n"
    path.write_text(opening + path.read_text().replace("org/model", "org/model, quantization: nf4"))
    assert cli.main(["recipes", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "name": "demo",
            "purpose": "A demonstration.",
            "model": "org/model",
            "method": "QLoRA, rank 16, nf4",
            "hardware": "one GPU",
            "time": "12 min",
            "memory": "7.5 GB",
            "result": "right in 91 %",
        }
    ]


def test_a_copied_recipe_still_finds_its_data(shipped: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    assert cli.main(["recipes", "copy", "demo", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    directive, rest = text.split("\n", 1)
    assert Path(directive.partition("$schema=")[2]).is_file()
    assert rest.startswith("# Purpose:  A demonstration.\n\nname: demo  # kept\n") and "# kept too" in rest
    assert load_recipe(target) == load_recipe(shipped / "recipes" / "demo.yaml")
    assert copied_text(target) == text


@pytest.mark.usefixtures("shipped")
def test_copying_does_not_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo.yaml").write_text("mine", encoding="utf-8")
    assert cli.main(["recipes", "copy", "demo", str(tmp_path)]) == 2
    assert "exists; name another file, or pass --force" in capsys.readouterr().err
    assert cli.main(["recipes", "copy", "demo", str(tmp_path / "none" / "x.yaml")]) == 2
    assert "there is no directory" in capsys.readouterr().err

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("finetune.files.os.fsync", full)
        for command in (["recipes", "copy", "demo", f"{tmp_path}/x.yaml"], ["schema", "-o", f"{tmp_path}/s.json"]):
            assert cli.main(command) == 2
            assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["demo.yaml"]
    assert cli.main(["recipes", "copy", "demo", str(tmp_path), "--force"]) == 0
    assert load_recipe(tmp_path / "demo.yaml").name == "demo"


def test_the_help_of_bench_names_its_variants_unbroken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert len(re.findall(r"\bshared_prefix\b", capsys.readouterr().out)) == 2
