"""Perplexity: windows score every token once, and the engine's figure is what transformers computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import LLM, bundled
from jaxserve.config import ConfigError
from jaxserve.eval.perplexity import PerplexityCell, perplexity, windows
from jaxserve.eval.tasks.filler import book
from jaxserve.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(bundled.path())


@given(st.integers(2, 400), st.integers(2, 64), st.data())
def test_every_token_but_the_first_is_scored_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    tokens = [4 + i % 2000 for i in range(count)]
    scored: list[int] = []
    for number, window in enumerate(windows(tokens, length, stride, TOKENIZER)):
        assert len(window.tokens) <= length
        assert window.scored >= (1 if number == 0 else min(length - stride, len(scored) + 1))
        scored += window.tokens[window.scored :]
    assert scored == tokens[1:]


def test_a_stride_as_long_as_the_window_leaves_tokens_out() -> None:
    with pytest.raises(ConfigError, match="--stride 64 must lie between 1 and 63"):
        windows([5] * 100, 64, 64, TOKENIZER)


def test_perplexity_is_what_transformers_computes(engine_options: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = TOKENIZER.encode(book())[:700]
    cell = PerplexityCell(tuple(windows(tokens, 256, 128, TOKENIZER)), 256)
    with LLM(**{**engine_options, "kv_cache_dtype": "f32"}) as llm:
        found = perplexity(cell.run(llm, lambda _: None))
    model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32)
    total = 0.0
    for window in cell.windows:
        with torch.no_grad():
            logprobs = model(torch.tensor([window.tokens])).logits[0].log_softmax(-1)
        total += sum(float(logprobs[i - 1, window.tokens[i]]) for i in range(window.scored, len(window.tokens)))
    assert found.tokens == len(tokens) - 1
    assert found.bytes == len(TOKENIZER.decode(tokens[1:]).encode())
    assert found.token == pytest.approx(math.exp(-total / found.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(-total / math.log(2) / found.bytes, rel=1e-5)
