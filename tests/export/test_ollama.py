"""The Go template that is derived from a chat template: for what it is derived, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.template import TEMPLATES_DIR, render
from finetune.errors import DataError
from finetune.export.ollama import TurnTemplate, derive_template, modelfile
from tests.tiny import CHATML

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are SmolLM<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Folds the system prompt into the first question, and calls the assistant by another name.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ (head if loop.first else '') + message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# The last answer opens with empty thoughts; answers in the history do not.
QWEN3 = CHATML.replace(
    "message['role'] + '\n'",
    "message['role'] + '\n' + ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '')",
)
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BRACES = "{% for m in messages %}{{ m['role'] + ' {{ ' + m['content'] + ';' }}{% endfor %}"


def derive(source: str) -> TurnTemplate:
    def render_messages(messages: list[dict[str, Any]], ask: bool) -> str:
        return render(source, TOKENS, messages, add_generation_prompt=ask)

    return derive_template(render_messages)


def test_chatml() -> None:
    assert derive(CHATML).go_template() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [CHATML, SMOLLM2, LLAMA3, GEMMA, QWEN3, *(path.read_text().strip() for path in TEMPLATES_DIR.glob("*.jinja"))],
    ids=["chatml", "smollm2", "llama3", "gemma", "qwen3", *(path.stem for path in TEMPLATES_DIR.glob("*.jinja"))],
)
def test_a_derived_template_renders_conversations_alike(source: str) -> None:
    template = derive(source)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    conversation = [*turns, *turns, {"role": "user", "content": "Oh."}]
    assert template.render(conversation) == render(source, TOKENS, conversation, add_generation_prompt=True)
    if "system" in template.before:
        told = [{"role": "system", "content": "Sing."}, *conversation]
        assert template.render(told) == render(source, TOKENS, told, add_generation_prompt=True)


def test_a_system_prompt_of_the_templates_own_becomes_the_modelfiles() -> None:
    template = derive(SMOLLM2)
    assert template.system == "You are SmolLM"
    text = modelfile(template, ["<|im_end|>"], None)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}')
    assert text.endswith('PARAMETER stop "<|im_end|>"\nSYSTEM """You are SmolLM"""\n')
    assert modelfile(template, [], "Mine.").endswith('SYSTEM """Mine."""\n')


def test_stop_texts_are_quoted_and_not_escaped() -> None:
    text = modelfile(derive(CHATML), ['say "', "\n\\"], None)
    assert 'PARAMETER stop """say """"\nPARAMETER stop "\n\\"\n' in text
    with pytest.raises(DataError, match="which a Modelfile cannot"):
        modelfile(derive(CHATML), ['"""'], None)


def test_alpacas_opening_line_follows_the_question() -> None:
    template = derive((TEMPLATES_DIR / "alpaca.jinja").read_text())
    assert "paired with an input" in template.system_with_input and "paired" not in template.system
    assert "SYSTEM" not in modelfile(template, [], None), "the template writes it by the question"
    assert modelfile(template, [], "Be brief.").endswith('SYSTEM """Be brief."""\n')
    go = template.go_template()
    assert go.count("paired with an input") == 1 and go.count("{{ range .Messages }}") == 1
    assert derive(SMOLLM2).system_with_input == ""


def test_a_bos_that_the_model_file_adds_is_taken_out() -> None:
    assert derive(LLAMA3).opening == "<s>"
    assert derive(LLAMA3).without_bos("<s>").go_template().startswith("{{ range")
    assert derive(CHATML).without_bos("<s>") == derive(CHATML)


def test_without_a_system_turn_a_system_prompt_is_refused() -> None:
    assert "system" not in derive(GEMMA).before
    with pytest.raises(DataError, match=r"data\.system: this chat template has no turn for a system prompt"):
        modelfile(derive(GEMMA), [], "Be brief.")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (NUMBERED, "its first question is written unlike the second"),
        (BRACES, 'its text holds """ or {{'),
        (CHATML.replace("<|im_end|>", "<|im_end|>\u200b"), "its text holds '\\u200b', which Ollama drops"),
        ("{{ raise_exception('no') }}", "the chat template refuses this conversation"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "it does not write the assistant's text"),
        (CHATML.replace("message['content']", "message['content'] | trim | title | lower"), "treats some turns unlike"),
    ],
    ids=["numbered", "braces", "unprintable", "refuses", "upper", "lower"],
)
def test_what_is_more_than_text_around_messages_is_refused(source: str, why: str) -> None:
    with pytest.raises(DataError, match=r"cannot be written as Ollama's Go template: .*llama-server --jinja") as caught:
        derive(source)
    assert why in str(caught.value)
