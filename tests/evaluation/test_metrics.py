from __future__ import annotations

import json

import pytest

from finetune.data.prepare import Row
from finetune.errors import DataError
from finetune.evaluation.metrics import METRICS, exact_match, gsm8k_answer, is_match, token_f1, valid_json
from finetune.recipe.schema import EvaluationSection


def rows(*expected: str) -> list[Row]:
    return [Row([{"role": "user", "content": "?"}], text, f"test.jsonl:{n}") for n, text in enumerate(expected, 1)]


def test_every_metric_of_the_schema_but_perplexity_is_here() -> None:
    schema = json.dumps(EvaluationSection.model_json_schema()["properties"]["metrics"]["items"]["enum"])
    assert sorted(json.loads(schema)) == sorted([*METRICS, "perplexity"])


@pytest.mark.parametrize(
    ("expected", "completion", "equal"),
    [
        ("yes", " yes\n", True),
        ("yes", "Yes", False),
        ('{"a": 1, "b": [2, 3]}', '{ "b":[2,3],"a":1 }', True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": 1} and more', False),
        ('{"a": 1}', '```json\n{"a": 1}\n```', False),
        ('{"a": "x"}', '{"a": "\\u0078"}', True),
        ("1", "1.0", False),
        ("{broken", "{broken ", True),
        ("{}", "", False),
    ],
)
def test_exact_match(expected: str, completion: str, equal: bool) -> None:
    assert is_match(expected, completion) is equal
    assert exact_match(rows(expected, "z"), [completion, "z"]) == (1.0 if equal else 0.5)


def test_valid_json() -> None:
    texts = ['{"a": 1}', " [1]\n", "3", "null", '{"a": 1', "{'a': 1}", "NaN", '{"a": Infinity}', "", "[" * 100_000]
    assert valid_json(rows(*["x"] * 10), texts) == pytest.approx(0.4)


def test_token_f1_by_hand() -> None:
    # "quick brown fox" against "brown fox jumps high": 2 in common, 3 and 4 words: 2 * 2 / 7.
    assert token_f1(rows("The quick, brown fox!"), ["a Brown FOX jumps high"]) == pytest.approx(4 / 7)
    # A word counts as often as it stands in both.
    assert token_f1(rows("no no yes"), ["no yes yes"]) == pytest.approx(2 / 3)
    assert token_f1(rows("x", "the", "x"), ["", "an", "y"]) == pytest.approx(1 / 3)


def test_gsm8k_answer() -> None:
    expected = rows("6 * 3 = 18\n#### 18", "#### 1,234", "#### -5", "#### 2.50", "#### 7")
    texts = ["so #### 18.", "#### $1234 dollars", "#### 5", "####2.5", "it is 7"]
    assert gsm8k_answer(expected, texts) == pytest.approx(3 / 5)
    assert gsm8k_answer(rows("#### 1"), ["#### 1\n#### 2"]) == 1.0
    assert gsm8k_answer(rows("#### 1"), ["#### .,."]) == 0.0
    with pytest.raises(DataError, match=r"test\.jsonl:2.*gsm8k_answer"):
        gsm8k_answer(rows("#### 1", "one"), ["#### 1", "one"])


@pytest.mark.parametrize("name", sorted(METRICS))
def test_rows_and_completions_must_match_in_number(name: str) -> None:
    with pytest.raises(ValueError):
        METRICS[name](rows("#### 1"), [])
    with pytest.raises(ValueError):
        METRICS[name]([], [])
