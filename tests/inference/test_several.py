"""Several adapters on one base: each gives what it gives alone, whatever kind it is and whichever came before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cli import main
from finetune.inference.load import load_run
from finetune.inference.several import load_adapters
from finetune.models.sources import ModelSource, fingerprint

IDS = torch.tensor([[256, *range(30)]])
MakeRun = Callable[..., tuple[Path, Any]]
Capture = pytest.CaptureFixture[str]
PROMPTS = ("hello", "a much longer question than the first", "you")
KINDS: dict[str, dict[str, Any]] = {
    "layers": {"rank": 8, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"rank": 4, "use_dora": True},
    "modules_to_save": {"rank": 2, "modules_to_save": ["lm_head"]},
    "trained tokens": {"rank": 2, "trainable_tokens": ["a", 256]},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_computes_what_it_does_alone(
    make_run: MakeRun, base_folder: Path, kind: str, quantization: str
) -> None:
    model = {"name": str(base_folder), "quantization": quantization}
    runs = [
        make_run("adapter", name="a", model=model)[0],
        make_run("adapter", name="b", model=model, adapter=KINDS[kind])[0],
        make_run("adapter", name="c", model=model, adapter=KINDS[kind] | {"rank": 3})[0],
    ]
    alone = [logits(load_run(run).model) for run in runs]
    for order in ((0, 1, 2), (1, 0, 2)):  # whichever is attached first
        loaded = load_adapters([(runs[number].name, runs[number]) for number in order])
        assert len({id(one.model) for one in loaded}) == 1
        for place in (1, 0, 2, 1, 2, 0):
            loaded[place].activate()
            assert torch.equal(logits(loaded[place].model), alone[order[place]])
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_generate_answers_with_each_in_order(make_run: MakeRun, tmp_path: Path, capsys: Capture) -> None:
    first, _ = make_run("adapter", name="a", data=with_system(tmp_path, "Sing."))
    second, _ = make_run("adapter", name="b", adapter={"rank": 8}, evaluation={"max_new_tokens": 5})
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in PROMPTS[1:]))
    prompts = ["--prompt", PROMPTS[0], "--file", str(file)]

    def generate(*arguments: str) -> list[dict[str, Any]]:
        assert main(["generate", *arguments, *prompts, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    alone = {str(run): generate(str(run)) for run in (first, second)}
    adapter = str(second / "adapter")
    rows = generate("--adapter", adapter, "--adapter", str(first))
    assert [(row.pop("prompt"), row.pop("adapter")) for row in rows] == [
        (prompt, name) for prompt in PROMPTS for name in (adapter, str(first))
    ]
    for number, prompt in enumerate(PROMPTS):
        assert {"prompt": prompt, **rows[2 * number]} == alone[str(second)][number]
        assert {"prompt": prompt, **rows[2 * number + 1]} == alone[str(first)][number]
    # RUN gives the base alone.
    assert [row["completion"] for row in generate(str(first), "--adapter", adapter)] == [
        row["completion"] for row in alone[str(second)]
    ]
    assert main(["generate", "--adapter", adapter, "--adapter", str(first), "--prompt", "hello"]) == 0
    want = f">>> hello\n[{adapter}] {alone[str(second)][0]['completion']}\n[{first}] "
    assert capsys.readouterr().out.startswith(want)


def test_another_base_is_refused_by_both_names(
    make_run: MakeRun, base_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    another = shutil.copytree(base_folder, tmp_path / "another")
    config = json.loads((another / "config.json").read_text())
    (another / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    plain, _ = make_run("adapter", name="plain")
    other, _ = make_run("adapter", name="other", model={"name": str(another)})
    quantized, _ = make_run("adapter", name="quantized", model={"name": str(base_folder), "quantization": "nf4"})
    for run, folder in ((plain, base_folder), (other, another)):
        base = fingerprint(ModelSource(str(folder), str(folder), None))
        (run / "adapter" / "fingerprints.json").write_text(json.dumps({"base": base}))
    for given, part in ((other, "(float32)"), (quantized, "(nf4 of float32, computed in bf16)")):
        assert main(["generate", str(plain), "--adapter", str(given), "--prompt", "x"]) == 2
        err = capsys.readouterr().err
        assert f"--adapter {given}: was trained on " in err and f"{part}, and {plain} on " in err
        assert err.rstrip().endswith("generate with each alone")


def test_what_cannot_share_a_base_is_refused(make_run: MakeRun, capsys: Capture) -> None:
    plain, _ = make_run("adapter", name="plain")
    pissa, _ = make_run("adapter", name="pissa", adapter={"rank": 2, "init": "pissa"})
    added, _ = make_run("adapter", name="added", adapter={"rank": 2, "trainable_tokens": ["<new>"]})
    alike, _ = make_run("adapter", name="alike", adapter={"rank": 3, "trainable_tokens": ["<new>"]})
    for run, part in ((pissa, "its initial values (pissa)"), (added, "they add different tokens to the base")):
        assert main(["generate", "--adapter", str(plain), "--adapter", str(run), "--prompt", "x"]) == 2
        assert part in capsys.readouterr().err
        # Alone it is.
        assert main(["generate", "--adapter", str(run), "--prompt", "x"]) == 0
    loaded = load_adapters([("added", added), ("alike", alike)])
    for one, run in zip(loaded, (added, alike), strict=True):
        one.activate()
        assert torch.equal(logits(one.model), logits(load_run(run).model))


def test_bad_arguments_exit_2(make_run: MakeRun, tmp_path: Path, capsys: Capture) -> None:
    run, _ = make_run("adapter")
    empty, _ = make_run(name="empty")
    for arguments, part in (
        ((), "name a run"),
        (("--base", "--adapter", str(run)), "leave out one of --base and --adapter"),
        (("--adapter", str(empty)), "holds no adapter"),
        (("--adapter", str(tmp_path / "none")), "no such directory"),
    ):
        assert main(["generate", "--prompt", "x", *arguments]) == 2
        assert part in capsys.readouterr().err


def with_system(folder: Path, system: str) -> dict[str, Any]:
    return {"sources": [{"path": str(folder / "train.jsonl")}], "system": system}
