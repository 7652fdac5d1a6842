"""The model card: valid metadata, everything that is known of the run, and nothing of the machine that made it."""

from __future__ import annotations

import getpass
import html
import json
import re
import socket
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFType

from finetune.errors import ModelError
from finetune.export.hub_contents import Contents, collect
from finetune.export.model_card import add_card, card_metadata
from finetune.export.model_card_licence import Licences, find_licences
from finetune.export.model_card_plot import draw_loss, read_curve
from finetune.privacy import REMOVED, holds_local_path, holds_secret, redact
from finetune.recipe.load import dump_recipe
from finetune.recipe.schema import Recipe
from finetune.recipe.shipped import shipped_root
from tests.export.push_run import CANARIES, HOME, HOST, SHA256, TOKEN, WANDB_KEY, build_run, write_empty_gguf
from tests.tiny import write_model


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_TOKEN": TOKEN, "WANDB_API_KEY": WANDB_KEY, "HOSTNAME": HOST}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("card"), base)[0]


def card_of(contents: Contents, licences: Licences | None = None) -> tuple[dict[str, object], str]:
    add_card(contents, "acme/tickets", licences or Licences())
    text = contents.files["README.md"]
    assert isinstance(text, bytes)
    _, front, body = text.decode().split("---\n", 2)
    return yaml.safe_load(front), body


def test_metadata(run: Path) -> None:
    metadata, _ = card_of(collect(run), Licences("Apache-2.0", {}))
    assert metadata == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["acme/rows"],
        "tags": ["finetune", "lora"],
    }


def test_the_hubs_own_reader_takes_the_metadata(run: Path) -> None:
    from huggingface_hub import ModelCard

    contents = collect(run)
    add_card(contents, "acme/tickets", Licences("mit", {}))
    card = ModelCard(contents.files["README.md"].decode())  # type: ignore[union-attr]
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("acme/base", "mit", "peft")


def test_unknown_licences_are_not_invented(run: Path) -> None:
    metadata, body = card_of(collect(run), Licences("Acme Terms v2", {}))
    assert "license" not in metadata
    assert "licence: Acme Terms v2" in body
    assert "license" not in card_of(collect(run))[0]


def test_the_card_says_what_is_known(run: Path) -> None:
    contents = collect(run)
    _, body = card_of(contents, Licences("apache-2.0", {f"{HOME}/secret/train.jsonl": "CC0"}))
    for part in (
        "# canary-run\n",
        "| exact_match | 0.0% | 50.0% | +50.0 points |",
        "| perplexity | 3.500 | 1.250 | -2.250 |",
        "| `./train.jsonl` | alpaca | 1,500 | 1,490 | over length 10 | 9,000 | CC0 |",
        "| `acme/rows` | auto | – | – | – | – | not known |",
        "1,490 samples, 20,000 tokens, 9,000 of them supervised",
        "- 7 test rows are also in the training data",
        f"sha256 of the train samples: `{'cd' * 32}`",
        "4 optimizer steps, 1,234 tokens in 1 min 15 s (16 tokens/s), peak memory 1.00 GB",
        "hardware: no GPU; 2 CPU cores, 8 GiB of memory, Linux x86_64",
        f"revision: `{'0' * 40}`",
        f"sha256 over config and weights: `{SHA256}`",
        "![Loss over the optimizer steps](loss.svg)",
        'AutoPeftModelForCausalLM.from_pretrained("acme/tickets")',
        f"vllm serve acme/base --revision {'0' * 40} --tokenizer acme/tickets --enable-lora --max-lora-rank 8 "
        "--lora-modules tickets=acme/tickets",
        "whether vLLM serves adapters of it says `finetune export hf://acme/tickets --to vllm`",
        "finetune export hf://acme/tickets --to gguf-lora",
        "finetune generate hf://acme/tickets --prompt",
        "finetune run hf://acme/tickets",
        "## Limits",
    ):
        assert part in body, part
    assert re.search(r"versions .*: finetune \S+, torch \S+, transformers \S+, peft ", body)
    assert dump_recipe(contents.recipe).rstrip() in body
    # The same run gives the same card.
    assert card_of(collect(run), Licences())[1] == card_of(collect(run), Licences())[1]


def test_fm30_no_canary_is_in_the_card(run: Path) -> None:
    contents = collect(run)
    add_card(contents, "acme/tickets", Licences())
    for name in ("README.md", "loss.svg", "recipe.yaml", "fingerprints.json", "adapter_config.json"):
        content = contents.files[name]
        assert isinstance(content, bytes)
        text = content.decode()
        for canary in (*CANARIES, socket.gethostname(), str(Path.home()) + "/", str(run)):
            assert canary not in text, (name, canary)
        assert not holds_secret(text) and not holds_local_path(text)
    shown = html.unescape(card_of(collect(run))[1])
    assert "my token is [removed]" in shown
    assert not any(canary in shown for canary in CANARIES)


def test_a_cell_cannot_break_out_of_its_table(run: Path) -> None:
    _, body = card_of(collect(run))
    row = next(line for line in body.splitlines() if "read &#124;" in line)
    assert row.count("|") == 5 and "a<br>b" in row


def test_an_adapter_alone_has_a_card_without_numbers(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (run / "adapter").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    contents = collect(alone)
    _, body = card_of(contents)
    assert "## Results" not in body and "## Samples" not in body and "loss.svg" not in contents.files
    assert "## Recipe" in body


def test_cards_of_other_kinds(run: Path, tmp_path: Path) -> None:
    contents = collect(run, gguf=write_empty_gguf(tmp_path / "x.gguf", GGUFType.MODEL))
    metadata, body = card_of(contents)
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("gguf", "quantized")
    assert "llama-server --jinja -hf acme/tickets --hf-file x.gguf" in body
    assert "(before), and with the adapter, before merging (after)." in body
    contents.kind = "merged"
    assert card_metadata(contents, Licences())["library_name"] == "transformers"
    assert "vllm serve acme/tickets" in card_of(contents)[1]


def test_a_gguf_lora_is_an_adapter_of_its_base(run: Path, tmp_path: Path) -> None:
    metadata, body = card_of(collect(run, gguf=write_empty_gguf(tmp_path / "x.gguf", GGUFType.ADAPTER)))
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("gguf", "adapter")
    assert "A LoRA adapter (rank 4) for `acme/base`, as a GGUF file." in body
    assert "llama-server --jinja -m BASE.gguf --lora x.gguf" in body and "-hf acme" not in body
    assert "(before), and with this adapter (after)." in body


def test_what_is_no_gguf_file_is_not_pushed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"x\.gguf: cannot be read as a GGUF file"):
        collect(run, gguf=tmp_path / "x.gguf")


def test_servers_are_not_promised_what_they_refuse(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    dora, _ = build_run(tmp_path, base, adapter={"rank": 4, "use_dora": True})
    body = card_of(collect(dora))[1]
    assert "--enable-lora" not in body and "gguf-lora" not in body
    assert "finetune merge hf://acme/tickets --out tickets-merged\n" in body


@pytest.mark.parametrize(
    ("architecture", "adapter", "reason"),
    [
        ("falcon", {}, "vLLM serves falcon models without adapters only"),
        ("llama", {"rank_pattern": {"q_proj": 8}}, "rank_pattern and alpha_pattern scale"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "it adapts lm_head"),
        ("llama", {"rank": 513}, "rank 513 is above vLLM's largest, 512"),
        ("llama", {}, None),
    ],
)
def test_the_card_promises_of_vllm_what_its_check_does(
    tmp_path: Path, architecture: str, adapter: dict[str, Any], reason: str | None
) -> None:
    base = write_model(tmp_path / "base", architecture)
    run, _ = build_run(tmp_path, base, name=str(base), adapter={"rank": 4, **adapter})
    body = card_of(collect(run))[1]
    assert ("--enable-lora" in body) == (reason is None)
    if reason is not None:
        assert f"as it is: {reason}" in body and "Merge it first: `finetune merge hf://acme/tickets`." in body
    assert "The base was not at hand" not in body


def test_licences_come_from_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"name": str(tmp_path / "model")},
            "data": {"sources": [{"path": str(shipped_root() / "data/tickets/train.jsonl")}, {"path": "acme/rows"}]},
            "training": {"max_steps": 1},
        }
    )
    found = find_licences(recipe, None, lambda name, kind: f"{kind} of {name}")
    assert found.identifier == "mit"
    assert list(found.data.values()) == ["Apache-2.0, this project's own work.", "dataset of acme/rows"]
    assert find_licences(recipe, "acme/base", lambda name, kind: f"{kind} of {name}").base == "model of acme/base"
    assert find_licences(recipe, "acme/base", None).base is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"a {TOKEN} b", f"a {REMOVED} b"),
        (f"x{WANDB_KEY}y", f"x{REMOVED}y"),
        ("WANDB_API_KEY=abcdef0123", f"WANDB_API_KEY={REMOVED}"),
        ("password: hunter2hunter2", f"password: {REMOVED}"),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {REMOVED}"),
        ("https://me:secretword@host.example/x", "https://host.example/x"),
        ("sk-abcdefghijklmnopqrstuvwxyz", REMOVED),
        ("key:sk-proj-aB_cdefg-hijklmnop_qrstuvw-x1", f"key:{REMOVED}"),
        ("sk-svc-name-Ab3dEf6hIj9kLm2nT3BlbkFJXy7zAb3dEf6h", REMOVED),
        ("sk-0d5a9d0e-4b1c-4a6f-9c55-7f6f5d1b2a3c", REMOVED),
        ("sk-Zk_1-aB-cdEfghIjkLmnop", REMOVED),
        ("x-sk-a1a1a1a1a1a1a1a1a1a1a1a1", f"x-{REMOVED}"),
        ("the-task-sk-learn and task-sk-1", "the-task-sk-learn and task-sk-1"),
        ("see /home/ada/x/y.jsonl:3", "see y.jsonl:3"),
        (r"C:\Users\ada\x.txt", "x.txt"),
        (f"at {Path.home()}/models/m", "at m"),
        (f"on {HOST}.", f"on {REMOVED}."),
        ("https://example.org/data/x and a/home/b", "https://example.org/data/x and a/home/b"),
        ("tokenizer: org/name-of-it\nmax_new_tokens: 128", "tokenizer: org/name-of-it\nmax_new_tokens: 128"),
        ("revision: 0123456789abcdef0123456789abcdef01234568", "revision: 0123456789abcdef0123456789abcdef01234568"),
        ("runs/my-run and ./data/x.jsonl", "runs/my-run and ./data/x.jsonl"),
    ],
)
def test_redaction(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_a_public_name_stays_where_the_host_is_called_the_same() -> None:
    assert redact(f"model {HOST}-7b on {HOST}", keep=[f"acme/{HOST}"]) == f"model {HOST}-7b on {HOST}"


def test_a_public_name_that_looks_like_a_key(base: Path, tmp_path: Path) -> None:
    names = ["acme/sk-wikipedia-instructions", "acme/sk-wiki2023instructionsdataset", "x/l-sk-summarization-legal-v2"]
    key = "sk-abcdefghijklmnopqrstuvwxyz"
    for text in (key, f"x-{key}", f"{names[0]}-{key}", f"sk-wikipedia-instructions{key[3:]}"):
        assert holds_secret(text, keep=names) and REMOVED in redact(text, keep=names)
    for name in names:
        assert not holds_secret(f"{name}-merged-f16.gguf", keep=names) and redact(name, keep=names) == name
        assert holds_secret(name)
    run, _ = build_run(tmp_path, base, name=names[0], data={"sources": [{"path": names[1]}]})
    contents = collect(run)
    add_card(contents, names[2], Licences())
    card = contents.files["README.md"]
    assert isinstance(card, bytes) and all(name in card.decode() for name in names)
    assert REMOVED not in card.decode().partition("## Samples")[0] + card.decode().partition("## Recipe")[2]


@pytest.mark.parametrize("host", ["finetune", "lora", "peft", "training"])
def test_a_host_that_is_called_like_a_word_of_the_card(
    run: Path, base: Path, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = card_of(collect(run))
    monkeypatch.setenv("HOSTNAME", host)
    assert card_of(collect(run)) == usual
    told, _ = build_run(tmp_path, base, data={"sources": [{"path": "acme/rows"}], "system": f"You are on {host}."})
    results = json.loads((told / "results.json").read_text())
    results["after"]["samples"][0]["completion"] = f"on {host} too"
    (told / "results.json").write_text(json.dumps(results))
    metadata, body = card_of(collect(told))
    assert metadata["tags"] == ["finetune", "lora"]
    assert f"You are on {REMOVED}." in body and "on &#91;removed&#93; too" in body


def test_the_user_is_not_named_by_what_git_or_login_say(run: Path) -> None:
    user = getpass.getuser()
    body = card_of(collect(run))[1]
    assert f"/{user}/" not in body


def test_the_curve_is_an_image_of_the_numbers(run: Path, tmp_path: Path) -> None:
    loss, validation = read_curve(run / "metrics.csv", "loss"), read_curve(run / "metrics.csv", "validation_loss")
    assert loss == [(1, 4.0), (2, 2.0), (3, 4 / 3), (4, 1.0)] and validation == [(4, 0.75)]
    image = draw_loss(loss, validation)
    assert image is not None
    root = ElementTree.fromstring(image)
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    points = [tuple(map(float, pair.split(","))) for pair in lines[0].get("points", "").split()]
    assert len(points) == 4
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    # Down the page is a lower loss.
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert draw_loss(loss[:1], []) is None and read_curve(tmp_path / "none.csv", "loss") == []
    flat = draw_loss([(1, 0.5), (2, 0.5)], [])
    assert flat is not None and "nan" not in flat


def test_damaged_numbers_leave_their_sections_out(tmp_path: Path) -> None:
    run, _ = build_run(tmp_path, write_model(tmp_path / "base", "llama"))
    (run / "results.json").write_text("{")
    (run / "ledger.json").write_text(json.dumps([]))
    _, body = card_of(collect(run))
    assert "## Results" not in body and "## Data" in body
