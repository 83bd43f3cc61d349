from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.processor import RequestState
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import Delta, FinishReason, Request, SamplingParams, TokenLogprobs
from tests.text.conftest import byte_level

TOKENIZER = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})
EOS = TOKENIZER.eos_token_id


def state(**params: Any) -> RequestState:
    request = Request(id="r", prompt=TOKENIZER.encode("Once"), params=SamplingParams(**params))
    return RequestState(request, TOKENIZER, (EOS,), request_id="mine", prompt="Once", now=1.0)


def delta(tokens: list[int], choice: int = 0, **fields: Any) -> Delta:
    return Delta(id="r", choice=choice, tokens=tuple(tokens), **fields)


def entries(tokens: list[int]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(ids=(token, 1), logprobs=(-0.5, -1.0), rank=2) for token in tokens)


def test_text_and_tokens_accumulate() -> None:
    request, tokens = state(), TOKENIZER.encode(" upon a time, café 👍")
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        assert request.push(delta([token], finish=FinishReason.LENGTH if last else None), 2.0 + index) is None
    output = request.output()
    [choice] = output.outputs
    assert (choice.text, choice.token_ids, choice.finish_reason) == (" upon a time, café 👍", tokens, "length")
    assert (output.request_id, output.prompt, output.finished) == ("mine", "Once", True)
    assert output.metrics == {
        "arrival_time": 1.0,
        "first_token_time": 2.0,
        "queued_s": 0.0,
        "finished_time": 1.0 + len(tokens),
    }


@given(
    text=st.text(max_size=30), takes=st.lists(st.booleans(), max_size=100), stop=st.sampled_from(["", "e", "on a", "é"])
)
def test_deltas_add_up_to_the_output_however_often_they_are_taken(text: str, takes: list[bool], stop: str) -> None:
    request, tokens = state(stop=stop or (), logprobs=1), TOKENIZER.encode("Once upon a time " + text)
    seen_text, seen_tokens, seen_logprobs, finish = "", [], [], None
    for index, token in enumerate(tokens):
        done = FinishReason.LENGTH if index == len(tokens) - 1 else None
        request.push(delta([token], logprobs=entries([token]), finish=done), 0)
        if done or (takes[index:] or [True])[0]:
            fresh = request.take()
            for choice in fresh.choices if fresh else ():
                seen_text += choice.text
                seen_tokens += choice.token_ids
                seen_logprobs += choice.logprobs or []
                finish = choice.finish_reason or finish
    [choice] = request.output().outputs
    assert (seen_text, seen_tokens, seen_logprobs) == (choice.text, choice.token_ids, choice.logprobs)
    assert finish == choice.finish_reason
    assert request.take() is None
    assert choice.cumulative_logprob == pytest.approx(-0.5 * len(choice.token_ids))


def test_eos_ends_without_text_or_reason() -> None:
    request = state(skip_special_tokens=False)
    request.push(delta([*TOKENIZER.encode(" a"), EOS], finish=FinishReason.STOP, stop_token=EOS), 0)
    [choice] = request.output().outputs
    assert (choice.text, choice.token_ids[-1], choice.finish_reason, choice.stop_reason) == (" a", EOS, "stop", None)


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xa")])
def test_a_stop_token_is_the_reason(include: bool, text: str) -> None:
    x, a = TOKENIZER.encode("x"), TOKENIZER.encode("a")
    request = state(stop_token_ids=a, include_stop_str_in_output=include)
    request.push(delta([*x, *a], finish=FinishReason.STOP, stop_token=a[0]), 0)
    [choice] = request.output().outputs
    assert (choice.text, choice.token_ids, choice.stop_reason) == (text, [*x, *a], a[0])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_ends_the_choice_and_is_cancelled(whole: bool, include: bool) -> None:
    tokens = TOKENIZER.encode(" upon a time, Lily") + TOKENIZER.encode("!!")
    request = state(stop=["time, L", "zzz"], include_stop_str_in_output=include, logprobs=1)
    if whole:
        cancelled = request.push(delta(tokens, logprobs=entries(tokens)), 0)
    else:
        names = [request.push(delta([token], logprobs=entries([token])), 0) for token in tokens]
        [cancelled] = [name for name in names if name]
    [choice] = request.output().outputs
    assert cancelled == "r"
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "time, L")
    assert choice.text == (" upon a time, L" if include else " upon a ")
    assert choice.token_ids == tokens[: len(choice.token_ids)] and len(choice.logprobs) == len(choice.token_ids)
    before = TOKENIZER.decode(choice.token_ids[:-1])
    assert "time, L" in TOKENIZER.decode(choice.token_ids) and "time, L" not in before


def test_a_stop_in_the_last_delta_needs_no_cancelling() -> None:
    request = state(stop="a")
    assert request.push(delta(TOKENIZER.encode("xa"), finish=FinishReason.LENGTH), 0) is None
    assert request.output().outputs[0].stop_reason == "a"


def test_stop_strings_wait_for_min_tokens() -> None:
    tokens = [token for letter in "abab" for token in TOKENIZER.encode(letter)]
    request = state(stop="b", min_tokens=2)
    request.push(delta(tokens), 0)
    assert request.output().outputs[0].text == "aba"


def test_text_held_back_comes_at_the_end() -> None:
    request = state(stop="time!")
    request.push(delta(TOKENIZER.encode(" time")), 0)
    assert request.take().choices[0].text == " "
    request.push(delta([EOS], finish=FinishReason.STOP, stop_token=EOS), 0)
    assert request.take().choices[0].text == "time"


def test_half_a_character_shows_when_the_answer_ends() -> None:
    request = state()
    request.push(delta(TOKENIZER.encode("ſ")[:1], finish=FinishReason.LENGTH), 0)
    assert request.output().outputs[0].text == "\ufffd"


def test_a_stopped_choice_is_muted_while_others_go_on() -> None:
    a, stop = TOKENIZER.encode("a"), TOKENIZER.encode("S")
    request = state(n=3, stop="S")
    assert request.push(delta([*a, *stop], choice=1), 0) == "r/1"
    assert request.push(delta(a, choice=1), 0) is None
    assert request.push(delta([*a, *a], choice=0, finish=FinishReason.LENGTH), 0) is None
    assert not request.finished
    assert request.push(delta(stop, choice=2), 0) == "r"
    ends = [(choice.text, choice.finish_reason) for choice in request.output().outputs]
    assert ends == [("aa", "length"), ("a", "stop"), ("", "stop")]


def test_prompt_logprobs_come_once() -> None:
    request = state(prompt_logprobs=1)
    prompt = (None, *entries([5]))
    request.push(delta([7], prompt_logprobs=prompt, cached_tokens=0), 0)
    request.push(delta([7]), 0)
    assert request.take().prompt_logprobs == list(prompt)
    request.push(delta([7]), 0)
    assert request.take().prompt_logprobs is None
    assert request.output().prompt_logprobs == list(prompt)


def test_errors_and_aborts_end_every_choice() -> None:
    request = state(n=2)
    request.push(delta([], choice=0, finish=FinishReason.ERROR, error="out of luck"), 1)
    request.end(FinishReason.ABORT, 2)
    output = request.output()
    assert output.finished and output.error == "out of luck"
    assert [choice.finish_reason for choice in output.outputs] == ["error", "abort"]


def test_without_detokenizing_there_is_no_text() -> None:
    request = state(detokenize=False)
    request.push(delta([5, 6], finish=FinishReason.LENGTH), 0)
    assert (request.output().outputs[0].text, request.output().outputs[0].token_ids) == ("", [5, 6])


def test_outputs_are_copies() -> None:
    request = state(logprobs=1)
    request.push(delta([5], logprobs=entries([5])), 0)
    first = request.output()
    request.push(delta([6], logprobs=entries([6])), 0)
    assert (first.outputs[0].token_ids, len(first.outputs[0].logprobs)) == ([5], 1)
