"""The model whose recall is 1 by construction: through the engine in every mode, and in transformers."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxserve.config import ConfigError, build
from jaxserve.eval.options import EvalConfig, EvalOptions
from jaxserve.eval.prompts import Plain, fit
from jaxserve.eval.recall_fixture import PAIRS, hadamard, induction, write
from jaxserve.eval.run import evaluate
from jaxserve.eval.tasks import Room
from jaxserve.text.tokenizer import Tokenizer

TASK = {"task": ["induction"], "lengths": [1024], "turns": 12, "items": 24}


def score(engine: dict[str, Any], **options: Any) -> dict[str, float]:
    result = evaluate(build(EvalConfig, {**engine, **TASK, **options}), progress=False)
    return {mode: sum(row.score for row in rows) / len(rows) for (_, _, mode), rows in result.rows.items()}


def test_dense_kv_recalls_everything(engine_options: dict[str, Any]) -> None:
    options = {**engine_options, "max_model_len": 1088}
    assert score(options) == {"single": 1.0, "multi-turn": 1.0, "multi-request": 1.0}
    assert score(options, reuse="program", mode=["multi-turn"]) == {"multi-turn": 1.0}


def test_transformers_agrees_that_it_recalls(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write(tmp_path), dtype=torch.float32)
    document = induction(Random(0), Room(1000, PAIRS, lambda text: 1))
    context = [int(word[1:]) for word in document.context.split()]
    assert len(context) == 1000
    for turn in document.turns[:4]:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, int(turn.question[1:])]])).logits[0, -1]
        assert int(logits.argmax()) == int(turn.answer[1:])


def test_many_turns_fit_the_default_lengths(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write(tmp_path))
    for length in EvalOptions().lengths:
        document = fit("induction", induction, Plain(tokenizer), lambda text: len(text.split()), length, 12, "seed")
        assert len(document.turns) == 12 and len(document.context.split()) > length // 2


def test_codes_are_orthogonal() -> None:
    codes = hadamard(64)
    assert (codes @ codes.T == 64 * np.eye(64)).all()


def test_it_runs_alone(engine_options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="brings a model of its own: run it alone"):
        score(engine_options, task=["induction", "needle"])
