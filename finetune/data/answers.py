"""What a model that has learned a turn writes, told apart: what the template opens it with, and the answer."""

from __future__ import annotations

from finetune.data.formats import Message, RowError, Tools
from finetune.data.masking import Encoder


def expected_answer(encoder: Encoder, messages: list[Message], tools: Tools) -> tuple[str, str]:
    """Opening and answer of the last turn, as a completion's text has them: without special tokens.

    The opening is what a template writes before the message's `content`, as Qwen3's does an empty `<think>`. A turn
    that holds more than that, such as a tool call, is an answer as a whole.

    Raises:
        DataError: the template refuses these messages.
    """
    content = str(messages[-1].get("content", ""))
    try:
        turn = encoder.render_turn(messages, tools)
    except RowError:  # not to be trained by the turn, as with train_on: everything
        return "", content
    body = turn.text[turn.start :]
    if body.endswith(encoder.terminator):
        body = body[: -len(encoder.terminator)]
    else:
        body = body[: list(encoder.pattern.finditer(body))[-1].start()]
    answer = content.strip()
    if answer and body.rstrip().endswith(answer):
        return _text(encoder, body[: body.rindex(answer)]), content
    return "", _text(encoder, body)


def _text(encoder: Encoder, rendered: str) -> str:
    ids = encoder.rust.encode(rendered, add_special_tokens=False).ids
    return str(encoder.rust.decode(ids, skip_special_tokens=True))
