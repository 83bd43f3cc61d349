from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.params import MAX_STOP_CHARS, check_prompt, resolve
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelLimits, ParamError, SamplingParams
from tests.text.conftest import byte_level

LIMITS = ModelLimits(vocab_size=1000, max_model_len=512, eos_token_ids=(2,))
TOKENIZER = Tokenizer(byte_level(), {})
NAN, INF = float("nan"), float("inf")


def settled(**params: Any) -> SamplingParams:
    return resolve(SamplingParams(**params), LIMITS, 100, TOKENIZER, lambda: 7).params


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 128], [0, -1, 129, 10**9, 1.0, True, "1", None]),
        ("temperature", [0, 0.5, 1, 100.0], [NAN, INF, -INF, -1, -1e-9, 1e308, 10**400, "0.5", True, None]),
        ("top_p", [1, 0.01, 1.0], [0, 1.01, NAN, -1, "1", None]),
        ("top_k", [0, -1, 1, 999, 10**6], [-2, 1.0, 2**63, NAN, True, None]),
        ("min_p", [0, 0.5, 1], [-0.1, 1.1, NAN, INF]),
        ("repetition_penalty", [1, 0.1, 1.3], [0, -1, NAN, INF, 1e308]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1, NAN]),
        ("seed", [0, -(2**63), 2**63 - 1, None], [2**63, -(2**63) - 1, 2**64, 1.5, True, "1"]),
        ("max_tokens", [0, 1, 412, None], [-1, 413, 2**63, 10**4000, 1.0, True]),
        ("min_tokens", [0, 16], [-1, 17, 2**70, 0.5]),
        ("logprobs", [None, 0, 20], [-1, -2, 21, True, "5", 1.0]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21, True]),
        (
            "stop_token_ids",
            [(), [0, 999], list(range(64))],
            [[1000], [-1], [2**63], [1.0], [True], list(range(65)), 5, "12"],
        ),
        ("allowed_token_ids", [None, [0, 999]], [[], [1000], [-1], ["1"]]),
        ("banned_token_ids", [(), [999]], [[1000], [-1], [None]]),
        (
            "logit_bias",
            [None, {}, {5: 1, 999: -100}, {"7": 100.0}],
            [
                {1000: 1},
                {-1: 1},
                {"foo": 1},
                {"-1": 1},
                {5: 101},
                {5: NAN},
                {5: INF},
                {5: "1"},
                {i: 1 for i in range(301)},
            ],
        ),
        (
            "stop",
            [(), "x", ["a", "b"], ["x" * MAX_STOP_CHARS], ["x"] * 16],
            [[""], ["x"] * 17, ["x" * (MAX_STOP_CHARS + 1)], [5], "\n" * 1_000_000],
        ),
        ("bad_words", [(), "Lily", ["Lily", "time"]], [[""], [" "], ["ſ" * 9], [5], list("abcdefghijklmnopq")]),
        ("ignore_eos", [True, False], [1, None, "yes"]),
        ("detokenize", [True, False], [0, None]),
    ],
)
def test_bounds(name: str, good: list, bad: list) -> None:
    for value in good:
        settled(**{name: value})
    for value in bad:
        with pytest.raises(ParamError) as error:
            settled(**{name: value})
        assert error.value.param == name, value
        assert name.replace("_", " ") in str(error.value).replace("_", " ") or name in ("stop", "bad_words")
        assert len(str(error.value)) < 300


def test_what_was_open_is_settled() -> None:
    params = settled(max_tokens=None, top_k=-1, temperature=1e-7, logit_bias={"3": 1})
    assert (params.max_tokens, params.top_k, params.temperature, params.seed) == (412, 0, 0.0, 7)
    assert params.logit_bias == {3: 1.0}
    assert settled(top_k=1000).top_k == 0
    assert settled(seed=-5).seed == -5


def test_numpy_numbers_become_plain_ones() -> None:
    params = settled(
        n=np.int32(2), temperature=np.float32(0.5), stop_token_ids=np.array([1, 2]), logit_bias={np.int64(3): 1}
    )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert (decoded.n, decoded.temperature, decoded.logit_bias) == (2, 0.5, {3: 1.0})
    assert list(decoded.stop_token_ids) == [1, 2]


def test_parameters_that_exclude_each_other() -> None:
    for params, name in [
        ({"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1]}, "allowed_token_ids"),
        ({"stop": "x", "detokenize": False}, "stop"),
        ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ]:
        with pytest.raises(ParamError) as error:
            settled(**params)
        assert error.value.param == name


def test_bad_words_are_banned_at_a_start_and_after_a_space() -> None:
    banned = resolve(SamplingParams(bad_words=["Lily", " Lily"]), LIMITS, 1, TOKENIZER, lambda: 0).banned
    assert sorted(map(TOKENIZER.decode, banned)) == [" Lily", "Lily"]


def test_messages_name_value_and_bound() -> None:
    for params, message in [
        ({"temperature": NAN}, "temperature must be between 0 and 100 (it is nan)"),
        ({"logit_bias": {50300: 1}}, "logit_bias names token 50300, but this model has 1000 tokens"),
        (
            {"max_tokens": 413},
            "max_tokens 413 is too large: the model's context of 512 tokens leaves 412 after the prompt's 100",
        ),
        ({"top_p": 0}, "top_p must be above 0 and at most 1 (it is 0)"),
        ({"n": 129}, "n must be between 1 and 128 (it is 129)"),
    ]:
        with pytest.raises(ParamError) as error:
            settled(**params)
        assert str(error.value) == message


@pytest.mark.parametrize(
    "prompt", [[], [-1], [1000], [2**31], [2**63], [1.0], [True], [None], ["a"], [1] * 512, [1] * 51200]
)
def test_bad_prompts_are_refused(prompt: list) -> None:
    with pytest.raises(ParamError) as error:
        check_prompt(prompt, LIMITS)
    assert error.value.param == "prompt"


def test_good_prompts_are_lists_of_plain_ints() -> None:
    assert check_prompt(np.array([1, 999]).tolist(), LIMITS) == [1, 999]
    assert [type(token) for token in check_prompt([np.int64(5)], LIMITS)] == [int]
    assert len(check_prompt([1] * 511, LIMITS)) == 511
    assert len(check_prompt([1] * 512, LIMITS, answer=False)) == 512


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(), st.floats(), max_size=2),
)
FIELDS = [field.name for field in msgspec.structs.fields(SamplingParams) if field.name not in ("stop", "bad_words")]


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
def test_what_passes_is_what_the_wire_and_the_device_can_take(given_params: dict[str, Any]) -> None:
    try:
        params = settled(**given_params)
    except ParamError as error:
        assert error.param in FIELDS
        return
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert decoded.temperature >= 0 and 0 < decoded.top_p <= 1 and 0 <= decoded.top_k < LIMITS.vocab_size
    assert 0 <= decoded.min_tokens <= decoded.max_tokens <= 412
    for ids in (decoded.stop_token_ids, decoded.allowed_token_ids, decoded.banned_token_ids, decoded.logit_bias):
        assert all(0 <= token < LIMITS.vocab_size for token in ids or ())
