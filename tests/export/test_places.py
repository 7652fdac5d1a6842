"""What RUN may be: a run's directory, its adapter's, a merged model's, or hf://, and where results go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader

from finetune.cli import main
from finetune.errors import ModelError
from finetune.export.hub_publish import push_run
from finetune.export.places import find_place
from tests.export.push_run import TOKEN, hub
from tests.fork_server import ForkServer
from tests.hub_double import HubDouble
from tests.tiny import chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe

assert hub  # a fixture
Capture = pytest.CaptureFixture[str]
REPO = "acme/tickets"
PROMPT = ("--prompt", "count the boats", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; base and data stand beside `runs/`."""
    folder = tmp_path_factory.mktemp("places")
    recipe = tiny_recipe(
        folder,
        write_model(folder / "base", "llama"),
        write_jsonl(folder / "rows.jsonl", chat_rows(32)),
        data={"validation": {"size": 6}, "system": "Count."},
        training={"max_steps": 8, "optimizer": {"lr": 3e-2}},
        evaluation={"metrics": ["token_f1", "perplexity"], "max_new_tokens": 4},
    )
    assert main(["run", str(write_recipe(folder / "recipe.json", recipe))]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "tiny")


def generated(run: str | Path, capsys: Capture) -> str:
    capsys.readouterr()
    assert main(["generate", str(run), *PROMPT]) == 0
    return capsys.readouterr().out


def test_what_is_made_of_an_adapter_goes_to_its_run_or_beside_it(run: Path, tmp_path: Path) -> None:
    for given in (run, run / "adapter", f"{run}/adapter/"):
        place = find_place(given)
        assert place.run is not None and place.run.root == run
        assert (place.merged, place.exports) == (run / "merged", run / "export")
    alone = shutil.copytree(run / "adapter", tmp_path / "elsewhere" / "mine")
    place = find_place(alone)
    assert (place.run, place.merged, place.exports) == (None, alone.parent / "mine-merged", alone.parent / "export")
    with pytest.raises(ModelError, match=r"no such directory.*or hf://ORG/NAME"):
        find_place(tmp_path / "nowhere")


def test_evaluate_keeps_figures_in_a_runs_directory_only(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["evaluate", str(run / "adapter"), "--rows", "2"]) == 0
    assert len(json.loads((run / "results.json").read_text())["evaluations"]) == 1
    alone = shutil.copytree(run / "adapter", tmp_path / "mine")
    before = sorted(alone.iterdir())
    assert main(["evaluate", str(alone), "--rows", "2"]) == 0
    out, err = capsys.readouterr()
    assert "adapter" in out and "these figures are not kept" in err
    assert sorted(alone.iterdir()) == before


def test_a_model_merged_elsewhere_is_pushed_and_exported_by_its_own_name(
    run: Path, tmp_path: Path, hub: HubDouble, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "models" / "mine"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert f"finetune push {out} ORG/NAME" in capsys.readouterr().out
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml"} <= {
        path.name for path in out.iterdir()
    }
    assert main(["push", str(out), REPO]) == 0
    pushed = hub.files(REPO)
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "library_name: transformers" in card and "## Results" in card and "token_f1" in card
    assert not [name for name, content in pushed.items() if str(tmp_path).encode() in content]
    assert "fingerprints.json" in pushed and "adapter_config.json" not in pushed
    # By the run's name there is none; what to do is said.
    for verb in (["push", str(run), REPO, "--merged"], ["export", str(run), "--to", "gguf"]):
        assert main(verb) == 2
        assert f"finetune {verb[0]} DIR" in capsys.readouterr().err
    assert main(["export", str(out), "--to", "ollama"]) == 0
    text = (out.parent / "export" / "mine-ollama" / "Modelfile").read_text()
    assert text.endswith('SYSTEM """Count."""\n')
    for verb in ("generate", "chat"):
        assert main([verb, str(out), *(PROMPT if verb == "generate" else ())]) == 2
        assert "is a merged model; give the run that it was made of" in capsys.readouterr().err
    # Its run is gone: the card says less.
    shutil.rmtree(run)
    assert main(["push", str(out), "acme/again"]) == 0
    assert "## Results" not in hub.files("acme/again")["README.md"].decode()
    assert b"## Recipe" in hub.files("acme/again")["README.md"]


def test_a_stale_merged_model_is_pointed_out(run: Path, hub: HubDouble, capsys: Capture) -> None:
    assert main(["merge", str(run)]) == 0
    record = json.loads((run / "merged" / "merge.json").read_text())
    (run / "merged" / "merge.json").write_text(json.dumps(record | {"adapter_sha256": "0" * 64}))
    capsys.readouterr()
    for verb in (["evaluate", str(run), "--rows", "1"], ["push", str(run), REPO, "--merged", "--dry-run"]):
        assert main(verb) == 0
        assert "was merged from another adapter than" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def server(hub: HubDouble, tmp_path: Path) -> Iterator[ForkServer]:
    """Runs of the command that take the double for the Hub, `home` for a user's home.

    As many threads as here: on some processors a sum's last bits depend on their number, and a run is made again.
    """
    server = ForkServer(tmp_path, hub.environment(TOKEN, tmp_path / "home"), torch.get_num_threads())
    yield server
    server.close()


@pytest.mark.slow
def test_every_verb_takes_a_repository_in_a_process_of_its_own(
    trained: Path, tmp_path: Path, hub: HubDouble, server: ForkServer, capsys: Capture
) -> None:
    """Pulled by hf://ORG/NAME: the answers of the run, a merged model, exports; base and data are found by name."""
    push_run(trained, REPO)
    address = f"hf://{REPO}"
    home, here, elsewhere = tmp_path / "home", tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()

    def finetune(cwd: Path, *arguments: str, stdin: str = "") -> SimpleNamespace:
        done = server.start(*arguments, cwd=cwd, stdin=stdin, apart=True)
        return SimpleNamespace(returncode=done.wait(), stdout=done.stdout, stderr=done.output)

    lost = finetune(elsewhere, "generate", address, *PROMPT)
    assert (
        lost.returncode == 2 and "model.name: ./base was a directory" in lost.stderr and "Traceback" not in lost.stderr
    )
    (here / "base").symlink_to(trained.parents[1] / "base")
    (here / "rows.jsonl").symlink_to(trained.parents[1] / "rows.jsonl")

    done = finetune(here, "generate", address, *PROMPT)
    assert done.returncode == 0, done.stderr
    want = generated(trained, capsys)
    assert done.stdout == want
    # A repository and a directory on one base.
    both = finetune(here, "generate", "--adapter", address, "--adapter", str(trained), *PROMPT, "--json")
    assert [json.loads(line)["completion"] for line in both.stdout.splitlines()] == [want[:-1]] * 2, both.stderr
    chat = finetune(here, "chat", address, "--max-new-tokens", "6", stdin="count the boats\n")
    assert chat.stdout == want, chat.stderr
    merged = finetune(here, "merge", address)
    assert merged.returncode == 0 and "validation rows" in merged.stderr, merged.stderr
    assert (here / "tickets-merged" / "model.safetensors").is_file()
    measured = finetune(here, "evaluate", address, "--rows", "2")
    assert measured.returncode == 0 and "merged" in measured.stdout and "not kept" in measured.stderr, measured.stderr
    for target, file in (("gguf", "tiny-f16.gguf"), ("gguf-lora", "tiny-lora-f32.gguf")):
        done = finetune(here, "export", address, "--to", target)
        assert done.returncode == 0, done.stderr
        assert GGUFReader(here / "export" / file).fields["general.name"].contents() == "tiny"
    assert "--enable-lora" in finetune(here, "export", address, "--to", "vllm").stdout
    copied = finetune(here, "push", address, "acme/copy")
    assert copied.returncode == 0, copied.stderr
    mine, theirs = hub.files(REPO), hub.files("acme/copy")
    # A repository holds no numbers of the run but those in its card.
    assert {name for name in mine if mine[name] != theirs.get(name)} == {"README.md", "loss.svg"}
    published = finetune(here, "push", "tickets-merged", "acme/whole")
    assert published.returncode == 0 and "model.safetensors" in hub.files("acme/whole"), published.stderr
    again = finetune(here, "run", address)
    assert again.returncode == 0 and f"base and data are those of {address}" in again.stderr, again.stderr
    name = "adapter/adapter_model.safetensors"
    assert (here / "runs" / "tiny-again" / name).read_bytes() == (trained / name).read_bytes()
    # Nothing was written among the downloaded files.
    snapshot = next((home / "hub").glob("models--acme--tickets/snapshots/*"))
    assert {path.name for path in snapshot.iterdir()} <= set(mine)
    # Another base of the same name is noticed.
    write_model(elsewhere / "base", "llama", seed=1)
    done = finetune(elsewhere, "generate", address, *PROMPT)
    assert done.returncode == 2 and "is not the base that the adapter was trained on" in done.stderr
    done = finetune(here, "generate", "hf://acme/whole", *PROMPT)
    assert done.returncode == 2 and "hf://acme/whole: holds no adapter_config.json" in done.stderr


def test_a_name_that_is_not_in_the_cache_is_said_when_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["generate", "hf://nosuch/x", "--prompt", "a"]) == 1
    assert "nosuch/x: it is not in this machine's cache, and HF_HUB_OFFLINE is set" in capsys.readouterr().err
