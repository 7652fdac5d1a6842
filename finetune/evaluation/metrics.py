"""Task metrics: each a mean over rows of how well a completion's text meets the row's expected answer.

Perplexity is no row here: it is measured on tokens, not on completions.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.prepare import Row

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_GSM8K_ANSWER = re.compile(r"####\s*\$?(-?[0-9.,]+)")


def exact_match(rows: Sequence[Row], completions: Sequence[str]) -> float:
    """Share of completions that equal the expected answer (see `is_match`)."""
    return _mean([is_match(row.expected, text) for row, text in _pairs(rows, completions)])


def is_match(expected: str, completion: str) -> bool:
    """Whether two texts are equal, surrounding white space aside.

    Where both are JSON objects or arrays, their values are compared: the order of keys and white space do
    not count, but 1, 1.0 and true differ. A bare number, string or word is compared as text.
    """
    if expected.strip() == completion.strip():
        return True
    both = _parse_json(expected), _parse_json(completion)
    if not all(isinstance(value, dict | list) for value in both):
        return False
    # Not `==`: Python holds True, 1 and 1.0 for equal.
    return json.dumps(both[0], sort_keys=True) == json.dumps(both[1], sort_keys=True)


def valid_json(rows: Sequence[Row], completions: Sequence[str]) -> float:
    """Share of completions that are one JSON value and nothing else; code fences and NaN are not JSON."""
    return _mean([_parse_json(text) is not _NOT_JSON for _, text in _pairs(rows, completions)])


def token_f1(rows: Sequence[Row], completions: Sequence[str]) -> float:
    """Mean F1 over words, without case, punctuation and articles.

    Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al. 2016, section 6.1).
    """
    return _mean([_f1(_words(row.expected), _words(text)) for row, text in _pairs(rows, completions)])


def gsm8k_answer(rows: Sequence[Row], completions: Sequence[str]) -> float:
    """Share of completions whose number after `####` equals the expected one; commas do not count.

    Source: Cobbe et al. 2021; the first `####` counts, as in their script.

    Raises:
        DataError: an expected answer has no number after `####`.
    """
    hits = []
    for row, text in _pairs(rows, completions):
        wanted = _final_number(row.expected)
        if wanted is None:
            raise DataError(
                f"{row.origin}: the expected answer has no number after ####, which evaluation.metrics: "
                "gsm8k_answer compares; choose another metric for this data"
            )
        hits.append(_final_number(text) == wanted)
    return _mean(hits)


METRICS: dict[str, Callable[[Sequence[Row], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "valid_json": valid_json,
    "token_f1": token_f1,
    "gsm8k_answer": gsm8k_answer,
}

_NOT_JSON = object()


def _pairs(rows: Sequence[Row], completions: Sequence[str]) -> list[tuple[Row, str]]:
    if not rows:
        raise ValueError("no rows to measure")
    return list(zip(rows, completions, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _parse_json(text: str) -> Any:
    """The value of a JSON text, `_NOT_JSON` if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(expected: list[str], given: list[str]) -> float:
    if not expected or not given:
        return float(expected == given)
    common = (Counter(expected) & Counter(given)).total()
    return 2 * common / (len(expected) + len(given))


def _final_number(text: str) -> Decimal | None:
    match = _GSM8K_ANSWER.search(text)
    try:
        return Decimal(match.group(1).replace(",", "").rstrip(".")) if match else None
    except InvalidOperation:
        return None
