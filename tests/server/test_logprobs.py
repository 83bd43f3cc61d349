"""Log-probs in the forms that clients read, over the tokenizer of the bundled model."""

from __future__ import annotations

import pytest

from jaxserve import bundled
from jaxserve.server.logprobs import TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import TokenLogprobs


@pytest.fixture(scope="module")
def names() -> TokenNames:
    return TokenNames(Tokenizer.from_folder(bundled.path()), as_ids=False)


ENTRY = TokenLogprobs(ids=(90, 70, 71), logprobs=(-5.0, -0.5, -1.5), rank=9)
"""Token 90 was sampled; 70 and 71 were the most probable."""


def test_completions_have_the_sampled_token_among_the_best(names: TokenNames):
    found = completion_logprobs(names, [70, 90], [None, ENTRY], 2, offset=3)
    assert found.token_logprobs == [None, -5.0] and found.top_logprobs[0] is None
    assert found.top_logprobs[1] == {names.text(70): -0.5, names.text(71): -1.5, names.text(90): -5.0}
    assert found.text_offset == [3, 3 + len(names.text(70))]


def test_chats_have_just_the_best(names: TokenNames):
    (entry,) = chat_logprobs(names, [ENTRY], 2).content
    assert (entry.token, entry.logprob, entry.bytes) == (names.text(90), -5.0, list(names.text(90).encode()))
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [(names.text(70), -0.5), (names.text(71), -1.5)]
    assert chat_logprobs(names, [ENTRY], 0).content[0].top_logprobs == []


def test_prompts_by_token_id(names: TokenNames):
    first, second = prompt_logprobs(names, [None, ENTRY], 1)
    assert first is None and list(second) == ["90", "70"]
    assert (second["90"].rank, second["70"].rank) == (9, 1)


def test_minus_infinity_can_be_written(names: TokenNames):
    entry = TokenLogprobs(ids=(90,), logprobs=(float("-inf"),), rank=100)
    assert completion_logprobs(names, [90], [entry], 0).token_logprobs == [-9999.0]
