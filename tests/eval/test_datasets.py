"""Question sets: scoring rules on answers that are right, nearly right and wrong; whole sets through the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve import bundled
from jaxserve.config import ConfigError, build
from jaxserve.eval.datasets import Question, last_number, read
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.run import evaluate
from jaxserve.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"


def questions(name: str, file: str) -> list[Question]:
    found = read(name, DATA / file)
    assert all(isinstance(one, Question) for one in found)
    return [one for one in found if isinstance(one, Question)]


def test_gsm8k_takes_the_last_number() -> None:
    first = questions("gsm8k", "gsm8k.jsonl")[0]
    assert first.golden == "18"
    outputs = {"She makes 9 * 2 = $18.": 1, "#### 18": 1, "18 eggs, so 20": 0, "none": 0, "18\nQuestion: 7?": 1}
    assert {text: first.judge(text) for text in outputs} == outputs
    assert last_number("It costs $1,250.50.") == "1250.50"


def test_function_calls_need_the_name_and_every_argument() -> None:
    first = questions("function-call", "bfcl_simple.jsonl")[0]

    def call(name: str = "calculate_triangle_area", **arguments: Any) -> str:
        return "Sure: " + json.dumps([{"name": name, "arguments": arguments}])

    assert first.judge(call(base=10, height=5)) == 1, "an argument that may be missing"
    assert first.judge(call(base=10, height=5, unit="Units")) == 1
    assert first.judge(call(base=10)) == first.judge(call(base=5, height=10)) == 0
    assert first.judge(call(base=10, height=5, extra=1)) == first.judge(call("other", base=10, height=5)) == 0
    assert first.judge("calculate_triangle_area(10, 5)") == 0


def test_json_is_valid_or_not(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"schema": schema}) + "\n")
    [one] = [item for item in read("json-schema", file) if isinstance(item, Question)]
    assert one.judge('Here: {"a": 3} and more') == 1
    assert one.judge('{"a": "3"}') == one.judge("nothing") == one.judge('{"a": 3') == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm8k", "--data gsm8k is not NAME=FILE"),
        ("riddles=x", "the sets are gsm8k, lambada"),
        ("gsm8k=/no/such/file", "No such file"),
        (f"gsm8k={DATA / 'lambada.jsonl'}", "line 1: KeyError: 'answer'"),
        (f"gsm8k={DATA / 'README.md'}", "line 1: JSONDecodeError"),
    ],
)
def test_a_set_that_does_not_parse_is_one_error_before_any_work(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(build(EvalConfig, {"model": "/never/loaded", "data": [spec]}), progress=False)


def test_options_are_ranked_by_what_transformers_computes(engine_options: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    row = {"question": "Where is Anna?", "choices": ["in the kitchen", "kitchen the in", "7305"], "answer": 0}
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps({**row, "answer": answer}) + "\n" for answer in range(3)))
    options = {**engine_options, "kv_cache_dtype": "f32", "data": [f"multiple-choice={file}"]}
    [rows] = evaluate(build(EvalConfig, options), progress=False).rows.values()

    tokenizer = Tokenizer.from_folder(bundled.path())
    model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)
    context = tokenizer.encode("Question: Where is Anna?\nAnswer:")
    expected = []
    for choice in row["choices"]:
        tokens = tokenizer.encode(f"Question: Where is Anna?\nAnswer: {choice}")
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected.append(sum(float(logprobs[i - 1, tokens[i]]) for i in range(len(context), len(tokens))))
    assert [row.logprob for row in rows] == pytest.approx(expected, abs=1e-3)
    assert [row.score for row in rows] == [float(value == max(expected)) for value in expected]


def test_sets_through_the_engine(engine_options: dict[str, Any]) -> None:
    data = [f"lambada={DATA / 'lambada.jsonl'}", f"gsm8k={DATA / 'gsm8k.jsonl'}"]
    result = evaluate(build(EvalConfig, {**engine_options, "data": data}), progress=False)
    found = {key[0]: rows for key, rows in result.rows.items()}
    assert [len(found[name]) for name in ("lambada", "gsm8k")] == [4, 3]
    assert all(row.tokens >= 1 and row.logprob < 0 for row in found["lambada"])
    assert all(row.score in (0.0, 1.0) and row.output for row in found["gsm8k"])
