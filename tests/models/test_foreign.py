"""Adapters that plain PEFT wrote: what each verb makes of them is what PEFT makes of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.cli import main
from finetune.commands.merge import merge_run
from finetune.data.template import encode_prompt
from finetune.inference.load import load_run
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME
from tests.tiny import CHATML, chat_rows, tiny_recipe, write_jsonl, write_model, write_recipe, write_tokenizer

IDS = torch.tensor([[1, 5, 9, 60, 61, 200, 250, 2, 319, 17]])
Bases = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]
LAYERS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny models by architecture, written once; those called `padded_` have more rows than their tokenizer."""
    folder = tmp_path_factory.mktemp("bases")

    def find(name: str) -> Path:
        path, architecture = folder / name, name.removeprefix("padded_")
        if not path.is_dir():
            write_model(path, architecture)
            if name != architecture:
                load_base(path, 352).save_pretrained(path)
        return path

    return find


def load_base(folder: Path, rows: int | None = None, **options: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    if rows is not None:
        torch.manual_seed(5)
        base.resize_token_embeddings(rows)
    return base


def write_adapter(folder: Path, base: Path, rows: int | None = None, **settings: Any) -> Path:
    """What a training script leaves: `get_peft_model`, other values, `save_pretrained`."""
    torch.manual_seed(3)
    values = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12, "target_modules": LAYERS}
    model = get_peft_model(load_base(base, rows), LoraConfig(**{**values, **settings}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=IDS).logits
    return values


@dataclass(frozen=True)
class Kind:
    """A way to train an adapter."""

    settings: dict[str, Any] = field(default_factory=dict)
    base: str = "llama"
    rows: int | None = None  # of a vocabulary that was resized


ENDS = ["embed_tokens", "lm_head"]
KINDS = {
    "plain": Kind(),
    "all-linear": Kind({"target_modules": "all-linear"}),
    "fused attention": Kind({"target_modules": ["query_key_value"]}, "falcon"),
    "gpt_neox": Kind({"target_modules": ["query_key_value", "dense"]}, "gpt_neox"),
    "gemma3": Kind({"target_modules": "all-linear"}, "gemma3"),
    "pattern": Kind({"target_modules": r".*layers\.1\..*(q|v)_proj", "exclude_modules": ["v_proj"]}),
    "one layer": Kind({"layers_to_transform": [1]}),
    "rslora with ranks": Kind({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "dora": Kind({"use_dora": True}),
    "pissa": Kind({"init_lora_weights": "pissa"}),
    "olora": Kind({"init_lora_weights": "olora"}),
    "no task": Kind({"task_type": None}),
    "head trained whole": Kind({"modules_to_save": ["lm_head"]}),
    "both ends trained whole": Kind({"modules_to_save": ENDS}),
    "tokens": Kind({"trainable_token_indices": [5, 60]}),
    "tokens by module": Kind({"trainable_token_indices": {"embed_tokens": [5, 60]}}),
    "tokens of a tied head": Kind({"trainable_token_indices": [5, 60]}, "tied_llama"),
    "ends adapted": Kind({"target_modules": [*LAYERS, *ENDS]}),
    "more rows": Kind(rows=328),
    "fewer rows": Kind(base="padded_llama", rows=320),
    "more rows, tied": Kind(base="tied_llama", rows=328),
    "fewer rows, tied": Kind(base="padded_tied_llama", rows=320),
    "more rows, ends trained whole": Kind({"modules_to_save": ENDS}, rows=328),
    "more rows, some trained": Kind({"trainable_token_indices": [5, 321]}, rows=328),
    "more rows, some trained, tied": Kind({"trainable_token_indices": [5, 321]}, "tied_llama", 328),
    "more rows, ends adapted": Kind({"target_modules": [*LAYERS, *ENDS]}, rows=328),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_computes_what_peft_computes(kind: Kind, bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    base = bases(kind.base)
    adapter = write_adapter(tmp_path / "theirs", base, kind.rows, **kind.settings)
    theirs = PeftModel.from_pretrained(load_base(base, kind.rows), adapter)
    want = logits(theirs)
    assert not torch.allclose(want, logits(load_base(base, kind.rows)), atol=1e-2)
    torch.testing.assert_close(logits(load_run(adapter).model), want, rtol=1e-5, atol=1e-5)
    assert f"has no recipe.yaml, so PEFT's files count: base {base} in fp32 as it is stored" in capsys.readouterr().err
    merged = merge_run(adapter)
    assert merged == tmp_path / "theirs-merged"
    found, err = AutoModelForCausalLM.from_pretrained(merged), " ".join(capsys.readouterr().err.split())
    torch.testing.assert_close(logits(found), logits(theirs.merge_and_unload()), rtol=1e-4, atol=1e-4)
    assert found.config.vocab_size == len(found.get_input_embeddings().weight) == (kind.rows or 320)
    assert "checked on 4 built-in questions, because another program trained the adapter" in err
    assert not (merged / "recipe.yaml").exists()


def test_an_adapter_in_bf16_and_a_base_in_bf16(bases: Bases, tmp_path: Path) -> None:
    """As it is stored is how the base is used, and how the merged model is written; the adapter computes in fp32."""
    base = tmp_path / "base"
    load_base(bases("llama"), dtype=torch.bfloat16).save_pretrained(base)
    write_tokenizer(base)
    adapter = write_adapter(tmp_path / "theirs", base)
    theirs = PeftModel.from_pretrained(load_base(base), adapter)
    theirs.to(torch.bfloat16).save_pretrained(adapter)
    theirs = PeftModel.from_pretrained(load_base(base), adapter)
    assert torch.equal(logits(load_run(adapter).model), logits(theirs))
    merged = load_base(merge_run(adapter))
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged), logits(theirs.merge_and_unload()), rtol=2e-2, atol=2e-2)


def test_a_base_that_is_stored_in_4_bits(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = tmp_path / "base"
    load_base(bases("wide_llama"), dtype=torch.bfloat16, quantization_config=settings).save_pretrained(base)
    write_tokenizer(base)
    adapter = write_adapter(tmp_path / "theirs", base)
    theirs = PeftModel.from_pretrained(load_base(base), adapter)
    assert torch.equal(logits(load_run(adapter).model), logits(theirs))
    assert main(["merge", str(adapter)]) == 2
    assert "is stored quantized, so there are no whole weights to merge into" in capsys.readouterr().err


def test_every_verb_takes_it(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    adapter = write_adapter(tmp_path / "their run" / "checkpoint-500", bases("llama"))
    prompt = ("--prompt", "count the boats", "--max-new-tokens", "6")
    assert main(["generate", str(adapter), *prompt]) == 0
    alone = capsys.readouterr().out
    assert main(["generate", "--adapter", str(adapter), "--adapter", str(adapter), *prompt, "--json"]) == 0
    assert [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()] == [alone[:-1]] * 2
    monkeypatch.setattr("sys.stdin", io.StringIO("count the boats\n"))
    assert main(["chat", str(adapter), "--compare", "--max-new-tokens", "6"]) == 0
    assert f"adapter> {alone}" in capsys.readouterr().out
    assert main(["export", str(adapter), "--to", "gguf"]) == 2
    assert f"run: finetune merge {adapter}" in capsys.readouterr().err
    assert main(["merge", str(adapter)]) == 0
    merged = adapter.with_name("checkpoint-500-merged")
    assert capsys.readouterr().out.endswith(f"export    finetune export '{merged}' --to gguf\n")
    for given, target, file in (
        (adapter, "gguf", "checkpoint-500-f16.gguf"),
        (adapter, "gguf-lora", "checkpoint-500-lora-f32.gguf"),
        (merged, "ollama", "checkpoint-500-merged-ollama/model.gguf"),
    ):
        assert main(["export", str(given), "--to", target]) == 0
        assert (adapter.parent / "export" / file).is_file()
    assert main(["export", str(adapter), "--to", "vllm"]) == 0
    out = capsys.readouterr().out
    assert f"vllm serve {bases('llama')} --enable-lora --lora-modules 'checkpoint-500={adapter}'" in out
    for given in (adapter, merged):
        assert main(["push", str(given), "acme/theirs", "--dry-run"]) == 2
        assert f"send it as it is: hf upload ORG/NAME {given}" in capsys.readouterr().err
    assert main(["evaluate", str(adapter)]) == 2
    assert "give --lm-eval TASKS, or write a recipe.yaml beside it" in capsys.readouterr().err
    assert main(["generate", str(adapter.parent), *prompt]) == 2
    assert "give one of the adapters in it: checkpoint-500" in capsys.readouterr().err


def test_the_tokenizer_beside_it_comes_first(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    adapter = write_adapter(tmp_path / "theirs", bases("llama"))
    own = CHATML.replace("assistant", "bot")
    write_tokenizer(adapter, template=own)
    assert load_run(adapter).template.source == own
    assert "tokenizer and chat template its own" in capsys.readouterr().err
    write_tokenizer(adapter, template="{{ messages[0]['content'] }}")
    assert main(["generate", str(adapter), "--prompt", "a"]) == 2
    assert f"Put another tokenizer beside {adapter / CONFIG_NAME}" in capsys.readouterr().err


def test_without_a_chat_template_a_prompt_is_the_text(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    base = write_model(tmp_path / "base", "llama", template=None)
    adapter = write_adapter(tmp_path / "theirs", base)
    loaded = load_run(adapter)
    messages = [{"role": "user", "content": "count"}]
    assert encode_prompt(loaded.tokenizer, loaded.template, messages) == loaded.tokenizer("count").input_ids
    assert "has a chat template; a prompt is taken as the text itself" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(merge_run(adapter)).chat_template is None


def test_where_its_base_may_be(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    adapter = write_adapter(tmp_path / "theirs", bases("llama"))
    want = logits(load_run(adapter).model)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(bases("llama"))
    path = adapter / CONFIG_NAME
    monkeypatch.chdir(tmp_path)
    for named in ("models/base", "./models/base", "../models/base"):  # the last beside the adapter
        change(adapter, base_model_name_or_path=named)
        assert torch.equal(logits(load_run(adapter).model), want)
    for named, words in (
        ("/gone/base", "no such directory or file: /gone/base"),
        ("./gone", "no such directory or file: ./gone"),
        ("gone/base", "cannot load gone/base"),
        (None, "no base is named"),
        (str(adapter), f"{adapter} holds no config.json"),
    ):
        change(adapter, base_model_name_or_path=named)
        assert main(["merge", str(adapter)]) == 2
        err = capsys.readouterr().err
        assert f"{path}: base_model_name_or_path: {words}" in err and "write there where it is now" in err


def change(adapter: Path, **settings: Any) -> None:
    path = adapter / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is not LoRA but IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "is not LoRA but PREFIX_TUNING"),
        ({"task_type": "SEQ_CLS"}, "was trained for SEQ_CLS"),
        ({"bias": "all"}, "has trained biases of its base (bias: all)"),
        ({"alora_invocation_tokens": [5]}, "is an activated LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of its base"),
        ({"use_qalora": True}, "is a QA-LoRA"),
        ({"velora_config": {}, "use_bdlora": {"nblocks": 2}}, "is a variant of LoRA (use_bdlora)"),
        ({"init_lora_weights": "loftq"}, "fits only a base that loftq has changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "its initial values (pissa_niter_4) were drawn"),
        ({"target_modules": ["nothing"]}, "the adapter does not fit the model: Target modules {'nothing'} not found"),
        ({"target_modules": ["q_proj", "v_proj"]}, "does not fit the model: 4 tensors missing"),
        ({"r": 2}, "of another shape"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused(
    settings: dict[str, Any], words: str, bases: Bases, tmp_path: Path, capsys: Capture
) -> None:
    adapter = write_adapter(tmp_path / "theirs", bases("llama"))
    change(adapter, **settings)
    for verb in (["generate", str(adapter), "--prompt", "a"], ["merge", str(adapter)]):
        assert main(verb) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert words in err and str(adapter) in err and "Traceback" not in err
    assert not (tmp_path / "theirs-merged").exists()


def test_other_kinds_that_peft_wrote_are_refused(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    kinds = [
        peft.IA3Config(task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ]
    for number, config in enumerate(kinds):
        get_peft_model(load_base(bases("llama")), config).save_pretrained(tmp_path / str(number))
        assert main(["merge", str(tmp_path / str(number))]) == 2
        assert f"{tmp_path / str(number)}: the adapter is not LoRA but" in capsys.readouterr().err


def test_rows_that_nobody_saved_are_refused(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    """A vocabulary that grew while the embeddings were left out of the file: their random values are gone."""
    adapter = write_adapter(tmp_path / "theirs", bases("llama"))
    tokenizer = write_tokenizer(adapter)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    assert main(["generate", str(adapter), "--prompt", "a"]) == 2
    assert "the tokenizer has 322 tokens and the base 320, and the embeddings of those added" in capsys.readouterr().err
    write_adapter(adapter, bases("llama"), 322)
    assert len(load_run(adapter).model.get_input_embeddings().weight) == 322
    write_adapter(adapter, bases("padded_llama"), 321)
    assert main(["merge", str(adapter)]) == 2
    assert "holds embeddings of 321 tokens, and the tokenizer has 322" in " ".join(capsys.readouterr().err.split())


def test_an_older_file_and_a_newer_setting(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    adapter = write_adapter(tmp_path / "theirs", bases("llama"))
    change(adapter, a_new_setting=3, an_unused_one=None)
    load_run(adapter)
    assert "a_new_setting: not known to PEFT" in (err := capsys.readouterr().err) and "an_unused_one" not in err
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")
    assert main(["generate", str(adapter), "--prompt", "a"]) == 2
    assert f"holds {CONFIG_NAME} and no {WEIGHTS_NAME}" in capsys.readouterr().err


def test_adapters_with_embeddings_of_their_own_share_no_base(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    plain, grown = (write_adapter(tmp_path / str(rows), bases("llama"), rows) for rows in (None, 328))
    assert main(["generate", "--adapter", str(plain), "--adapter", str(grown), "--prompt", "a"]) == 2
    assert f"--adapter {grown}: brings embeddings for its base" in capsys.readouterr().err


def test_a_recipe_beside_it_says_the_rest(bases: Bases, tmp_path: Path, capsys: Capture) -> None:
    """How the base was quantized, and rows to measure on: the adapter itself is as its own files say."""
    adapter = write_adapter(tmp_path / "theirs", bases("llama"), use_rslora=True)
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(12))
    model = {"quantization": "nf4"}
    recipe = tiny_recipe(
        tmp_path,
        bases("llama"),
        rows,
        model=model,
        data={"validation": {"size": 4}},
        evaluation={"metrics": ["perplexity"]},
    )
    write_recipe(adapter / "recipe.yaml", recipe)
    loaded = load_run(adapter)
    config = loaded.model.peft_config["default"]  # type: ignore[index, union-attr]
    assert (config.r, config.use_rslora, config.target_modules) == (4, True, set(LAYERS))
    assert type(loaded.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")).__name__ == "Linear4bit"
    assert main(["merge", str(adapter)]) == 0
    err = capsys.readouterr().err
    assert "base dequantized" in err and "validation rows" in err and "another program" not in err
    assert main(["evaluate", str(adapter)]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_one_on_the_hub_is_named_by_its_repository(
    bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    snapshot = tmp_path / "hub" / "models--acme--their-lora" / "snapshots" / ("0" * 40)
    write_adapter(snapshot, bases("llama"))
    monkeypatch.setattr("finetune.export.places.resolve_repo", lambda address: snapshot)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "hf://acme/their-lora", "--to", "gguf-lora"]) == 0
    assert (tmp_path / "export" / "their-lora-lora-f32.gguf").is_file()
    assert main(["merge", "hf://acme/their-lora"]) == 0
    assert (tmp_path / "their-lora-merged" / "model.safetensors").is_file()
