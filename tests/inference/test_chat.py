"""`finetune chat`: the same answers as `generate`, streamed, over several turns."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from finetune.cli import main
from finetune.commands import chat
from finetune.data.template import load_template
from finetune.inference.load import LoadedRun
from finetune.recipe.schema import Recipe
from tests.inference.conftest import CHATML, build_llama

MakeRun = Callable[..., tuple[Path, Any]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the command on lines of input; returns what it printed."""

    def run(path: Path, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(path), "--max-new-tokens", "8", *options]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Every conversation that the model is shown."""
    conversations: list[list[dict[str, Any]]] = []
    real = chat.stream_answer

    def spy(loaded: Any, messages: list[dict[str, Any]], arguments: Any) -> Any:
        conversations.append([dict(message) for message in messages])
        return real(loaded, messages, arguments)

    monkeypatch.setattr(chat, "stream_answer", spy)
    return conversations


def generated(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["generate", str(run), "--prompt", "hello", "--max-new-tokens", "8", *options]) == 0
    return capsys.readouterr().out


def test_the_first_answer_is_generates(make_run: MakeRun, talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run("adapter")
    assert talk(run, "hello")[0] == generated(run, capsys)
    assert talk(run, "hello", options=("--base",))[0] == generated(run, capsys, "--base")


def test_turns_build_up_and_reset_and_system_start_anew(make_run: MakeRun, talk: Any, shown: Any) -> None:
    run, _ = make_run("adapter")
    out, err = talk(
        run, "one", "", "two", "/reset", "three", "/system Sing.", "four", "/system", "five", "/exit", "six"
    )
    assert len(out.splitlines()) >= 5
    assert [[(m["role"], m["content"]) for m in messages if m["role"] != "assistant"] for messages in shown] == [
        [("system", "Be brief."), ("user", "one")],
        [("system", "Be brief."), ("user", "one"), ("user", "two")],
        [("system", "Be brief."), ("user", "three")],
        [("system", "Sing."), ("user", "four")],
        [("user", "five")],
    ]
    assert [message["role"] for message in shown[1]] == ["system", "user", "assistant", "user"]
    assert "forgotten" in err and "system prompt: Sing." in err and "system prompt: none" in err


def test_compare_keeps_two_conversations(
    make_run: MakeRun, talk: Any, shown: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run("adapter")
    out, _ = talk(run, "hello", "again", options=("--compare",))
    base, adapter = generated(run, capsys, "--base"), generated(run, capsys)
    assert base != adapter
    assert out.startswith(f"base> {base}adapter> {adapter}base> ")
    assert [messages[2]["content"] for messages in shown[2:]] == [base[:-1], adapter[:-1]]


def test_compare_needs_a_base_that_the_adapter_left_alone(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run("adapter", adapter={"rank": 2, "init": "olora"})
    assert main(["chat", str(run), "--compare"]) == 2
    assert "adapter.init olora took its initial values off the base's weights" in capsys.readouterr().err


def test_a_conversation_past_the_context_is_not_answered(make_run: MakeRun, talk: Any, shown: Any) -> None:
    run, _ = make_run("adapter")
    _, err = talk(run, "x" * 600, "short")
    assert "the conversation has 6" in err and "the model's context holds 512; /reset it" in err
    assert [message["content"] for message in shown[1]] == ["Be brief.", "short"]


def test_an_interrupted_answer_is_forgotten(
    make_run: MakeRun, talk: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run("adapter")
    calls = iter((True,))

    class Interrupted(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if next(calls, False):
                raise KeyboardInterrupt
            return super().get(block, timeout)

    monkeypatch.setattr(chat, "SimpleQueue", Interrupted)
    _, err = talk(run, "one", "two")
    assert "interrupted" in err
    assert [message["content"] for message in shown[1]] == ["Be brief.", "two"]


def test_a_failure_in_the_model_is_not_swallowed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run("adapter")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr(chat, "_generation_config", lambda *_: 1 / 0)
    assert main(["chat", str(run)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def write_as_told(pieces: list[str]) -> LoadedRun:
    """A model that answers with `pieces`, and a tokenizer that decodes as Llama 2's: the first space goes."""
    vocab = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(pieces)])}
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    rust.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")
    model = build_llama(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)

    def generate(input_ids: torch.Tensor, streamer: Any, **_: Any) -> None:
        streamer.put(input_ids)
        for piece in [*pieces, "</s>"]:
            streamer.put(torch.tensor([vocab[piece]]))
        streamer.end()

    model.generate = generate
    sections = {"model": {"name": "x"}, "data": {"sources": [{"path": "x"}]}, "training": {"max_steps": 1}}
    recipe = Recipe.model_validate({"name": "x", **sections})
    return LoadedRun(model, tokenizer, load_template(tokenizer, recipe.data), recipe, None)


def test_indented_lines_keep_their_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = write_as_told(
        ["▁def", "<0x0A>", "▁", "▁", "▁", "▁return", "▁", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "▁", "x"]
    )
    arguments = SimpleNamespace(max_new_tokens=32, temperature=0.0, top_p=1.0, seed=0)
    answer = "def\n    return €\n x"
    texts = list(chat.stream_answer(loaded, [{"role": "user", "content": "x"}], arguments))  # type: ignore[arg-type]
    assert texts[-1] == answer and all(answer.startswith(text) for text in texts)
    assert len(set(texts)) > 8  # as it is written

    speaker = chat.Speaker("adapter", None)
    chat.handle("x", [speaker], loaded, arguments)  # type: ignore[arg-type]
    assert capsys.readouterr().out == answer + "\n"
    assert speaker.messages[-1] == {"role": "assistant", "content": answer}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--base", "--compare"), "leave --base out"),
        (("--max-new-tokens", "0"), "must be at least 1"),
        (("--temperature", "-1"), "must be 0 or more"),
        (("--top-p", "0"), "must be above 0"),
    ],
)
def test_bad_options_exit_2(options: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["chat", "nowhere", *options])
    except SystemExit as caught:  # argparse's
        code = int(caught.code or 0)
    assert code == 2 and part in capsys.readouterr().err


def test_a_line_that_is_not_valid_unicode_is_said(make_run: MakeRun, talk: Any, shown: Any) -> None:
    run, _ = make_run("adapter")
    out, err = talk(run, "\udcff", "hello")
    assert "the conversation holds text that is not valid Unicode" in err and out.strip()
    assert [turn["content"] for turn in shown[-1] if turn["role"] == "user"] == ["hello"]
