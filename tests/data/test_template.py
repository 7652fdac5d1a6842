"""Templates: the known text of Alpaca, BOS, terminators, system prompts."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.template import apply_system, encode_prompt, load_template, print_date, unprinted_date
from finetune.errors import DataError
from tests.data.conftest import chat, prepare, print_today

# tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

Tokenizers = Callable[[str], Any]
Sections = Callable[..., Any]


def test_alpaca_is_the_well_known_text(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("gpt2")
    rows = [
        {"instruction": "Add the numbers.\n\nAll of them.", "input": "1\n\n2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "Say hello.", "input": None, "output": "hello"},
    ]
    prepared, _ = prepare(tokenizer, section(rows, template="alpaca"))
    texts = [tokenizer.decode(prepared.train[index][0]) for index in range(3)]
    assert texts[0] == ALPACA_INPUT.format(**rows[0]) + "\n3<|endoftext|>"
    assert texts[1] == texts[2] == ALPACA_NO_INPUT.format(**rows[1]) + "\nhello<|endoftext|>"


def test_alpaca_serves_plain_messages(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("gpt2")
    template = load_template(tokenizer, section([], template="alpaca"))
    plain = encode_prompt(tokenizer, template, [{"role": "user", "content": "Say hello."}])
    assert tokenizer.decode(plain) == ALPACA_NO_INPUT.format(instruction="Say hello.") + "\n"
    marked = encode_prompt(tokenizer, template, [{"role": "user", "content": "Add.\n\n### Input:\n1 2"}])
    assert tokenizer.decode(marked) == ALPACA_INPUT.format(instruction="Add.", input="1 2") + "\n"


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral", "base"])
@pytest.mark.parametrize("template", ["auto", "alpaca", "chatml", "plain"])
def test_fm12_exactly_one_bos(style: str, template: str, tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of(style)
    if style == "base" and template == "auto":
        pytest.skip("this tokenizer has no template of its own")
    loaded = load_template(tokenizer, section([], template=template))
    messages = [{"role": "user", "content": "hello"}]
    ids = encode_prompt(tokenizer, loaded, messages)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_no_bos_where_the_tokenizer_adds_none(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("gpt2")
    tokenizer.bos_token = tokenizer.eos_token  # GPT-2 has one and does not write it
    load_template(tokenizer, section([], template="alpaca"))
    assert "bos_token" not in tokenizer.chat_template


def test_fm12_two_bos_are_refused(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="two BOS"):
        load_template(tokenizer, section([]))


def test_loading_sets_the_tokenizers_template(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("gpt2")
    template = load_template(tokenizer, section([], template="alpaca"))
    assert tokenizer.chat_template == template.source
    assert template.name == "alpaca" and template.stop_token_ids == (tokenizer.eos_token_id,)


def test_stop_tokens_put_the_trained_one_first(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    template = load_template(tokenizer, section([]))
    assert tokenizer.convert_ids_to_tokens(list(template.stop_token_ids)) == ["<|eot_id|>", "<|end_of_text|>"]


def test_fm02_the_end_of_a_tool_call_stops_too(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|call|>\n"
        "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    )
    stops = load_template(tokenizer, section([])).stop_token_ids
    assert tokenizer.convert_ids_to_tokens(list(stops)) == ["<|eot_id|>", "<|call|>", "<|end_of_text|>"]


@pytest.mark.parametrize(
    "turn",
    [
        "{% if m.content %}{{ m.content }}{{ '<|eot_id|>' if m.role == 'assistant' else '<|call|>' }}{% endif %}",
        "{% for c in m.tool_calls %}{{ c.function.name }}<|call|>{% else %}{{ m.content }}<|eot_id|>{% endfor %}",
    ],
)
def test_fm02_a_token_that_ends_no_turn_of_calls_is_no_stop(
    turn: str, tokenizer_of: Tokenizers, section: Sections
) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    stops = load_template(tokenizer, section([])).stop_token_ids
    assert tokenizer.convert_ids_to_tokens(list(stops)) == ["<|eot_id|>", "<|end_of_text|>"]


def test_fm02_chatml_ends_with_eos_where_im_end_is_no_token(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("gpt2")
    template = load_template(tokenizer, section([], template="chatml"))
    assert template.stop_token_ids == (tokenizer.eos_token_id,)


def test_fm02_a_template_that_never_ends_a_turn_is_refused(
    tokenizer_of: Tokenizers, section: Sections, tmp_path: Path
) -> None:
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match=r"endless\.jinja ends an assistant turn .* never learns to stop"):
        load_template(tokenizer_of("gpt2"), section([], template=str(endless)))


def test_a_file_is_a_template(tokenizer_of: Tokenizers, section: Sections, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")
    tokenizer = tokenizer_of("base")
    template = load_template(tokenizer, section([], template=str(own)))
    assert template.name == "own.jinja"
    assert encode_prompt(tokenizer, template, [{"role": "user", "content": "x"}])[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("wanted", ["alpacca", "no/such.jinja"])
def test_an_unknown_template_names_the_known_ones(wanted: str, tokenizer_of: Tokenizers, section: Sections) -> None:
    with pytest.raises(DataError, match=rf"data\.template: '{wanted}' is neither auto, alpaca, chatml, plain"):
        load_template(tokenizer_of("gpt2"), section([], template=wanted))


def test_no_template_of_its_own(tokenizer_of: Tokenizers, section: Sections) -> None:
    with pytest.raises(DataError, match=r"Set data\.template: alpaca"):
        load_template(tokenizer_of("gpt2"), section([]))


def test_plain_text_needs_no_template(tokenizer_of: Tokenizers, section: Sections) -> None:
    assert load_template(tokenizer_of("gpt2"), section([], source={"format": "text"})).name == "plain"


def test_a_template_with_an_error(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}"
    with pytest.raises(DataError, match=r"data\.template: tokenizer does not render"):
        load_template(tokenizer, section([]))


def test_system_prompts(tokenizer_of: Tokenizers, section: Sections) -> None:
    with_role = tokenizer_of("llama3")
    template = load_template(with_role, section([]))
    assert template.system_role
    ids = encode_prompt(with_role, template, [{"role": "user", "content": "x"}], "Be kind.")
    assert "system<|end_header_id|>\n\nBe kind." in with_role.decode(ids)
    without = tokenizer_of("gemma")
    template = load_template(without, section([]))
    assert not template.system_role
    ids = encode_prompt(without, template, [{"role": "user", "content": "x"}], "Be kind.")
    assert "<start_of_turn>user\nBe kind.\n\nx<end_of_turn>" in without.decode(ids)


def test_a_rows_own_system_prompt_wins() -> None:
    row = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x"}]
    assert apply_system(row, "Default.", True) == row
    assert apply_system(row, "Default.", False) == [{"role": "user", "content": "Mine.\n\nx"}]


def test_template_variables_are_set_in_the_saved_template(tokenizer_of: Tokenizers, section: Sections) -> None:
    """As Qwen3's asks for enable_thinking: a server that passes nothing renders what was trained."""
    asked = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"

    def prompt_of(**keys: Any) -> tuple[str, str]:
        tokenizer = tokenizer_of("qwen3")
        tokenizer.chat_template += "{% if add_generation_prompt %}" + asked + "{{ tone }}{% endif %}"
        template = load_template(tokenizer, section([], **keys))
        message = [{"role": "user", "content": "hello"}]
        served = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        saved = tokenizer.chat_template
        assert load_template(tokenizer, section([], **keys)).source == template.source
        assert tokenizer.chat_template == saved
        return tokenizer.decode(encode_prompt(tokenizer, template, message)), served

    plain, _ = prompt_of()
    trained, served = prompt_of(template_variables={"enable_thinking": False, "tone": "kind\n"})
    assert trained == served == plain + "<think></think>kind\n"


def test_template_variables_that_say_nothing_to_the_template(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = own = tokenizer.chat_template + "{% if enable_thinking %}<think>{% endif %}{{ tone }}"
    reasons = {
        "enable_thinkng": "does not occur in it; did you mean enable_thinking",
        "messages": "is given anew with every",
    }
    for name, why in reasons.items():
        with pytest.raises(
            DataError, match=rf"data.template_variables: .*\(tokenizer\) cannot be told {name}, .*{why}"
        ):
            load_template(tokenizer, section([], template_variables={name: False}))
    assert tokenizer.chat_template == own
    # A base that was trained with other values: the new ones are not set before the old, which would win.
    load_template(tokenizer, section([], template_variables={"enable_thinking": False, "tone": 'a "b" %} c'}))
    load_template(tokenizer, section([], template_variables={"enable_thinking": True}))
    assert tokenizer.chat_template == ("{%- set enable_thinking = true %}" + '{%- set tone = "a \\"b\\" %} c" %}' + own)
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False).endswith('<think>a "b" %} c')


def test_a_printed_date_is_the_recipes(tokenizer_of: Tokenizers, section: Sections) -> None:
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = own = print_today(tokenizer.chat_template)
    data = section([chat("hello", "hi")], date="2024-07-26")
    prepared, template = prepare(tokenizer, data)
    prompt = encode_prompt(tokenizer, template, [{"role": "user", "content": "hello"}])
    assert template.date == datetime.date(2024, 7, 26) and tokenizer.chat_template == own
    assert tokenizer.decode(prompt).startswith("<|begin_of_text|>26 Jul 2024<|start_header_id|>")
    assert prepared.train[0][0][: len(prompt)].tolist() == prompt
    today = load_template(tokenizer, section([]))
    assert f"{today.date:%d %b %Y}" in today.source
    assert unprinted_date(template, data) is None
    plain = load_template(tokenizer_of("llama3"), data)
    assert plain.date is None
    assert "data.date: 2024-07-26 has no effect" in str(unprinted_date(plain, data))
    assert unprinted_date(plain, section([chat("hello", "hi")])) is None


def test_a_date_in_a_computed_format_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    day = datetime.date(2024, 7, 26)
    assert print_date("{{ strftime_now( \"%Y\" ) ~ strftime_now('%H:%M') }}", day) == '{{ "2024" ~ "00:00" }}'
    assert "computes" not in capsys.readouterr().err
    assert print_date("{{ strftime_now(how) }}", day) == "{{ strftime_now(how) }}"
    assert "in a format that it computes" in capsys.readouterr().err
