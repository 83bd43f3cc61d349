"""LLM: what scripts do with it, with a real engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, CachedPrefix, SamplingParams
from jaxserve.api import TransferError
from jaxserve.config import ConfigError
from jaxserve.engine.client import EngineDead
from jaxserve.types import ParamError

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["Once upon a time", "The red ball is with Tom. The blue cup is with Ann.", "Hi"]


@pytest.fixture(scope="module")
def llm(engine_options: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**engine_options) as llm:
        yield llm


def test_a_prompt_may_be_spelled_in_many_ways(llm: LLM) -> None:
    tokens = llm.get_tokenizer().encode(PROMPTS[0])
    ways: list[Any] = [
        PROMPTS[0],
        [PROMPTS[0]],
        tokens,
        [tokens],
        np.array(tokens),
        {"prompt": PROMPTS[0]},
        [{"prompt_token_ids": tokens, "cache_salt": "mine"}],
    ]
    outputs = [llm.generate(way, GREEDY, use_tqdm=False) for way in ways]
    assert all(len(one) == 1 and one[0].prompt_token_ids == tokens for one in outputs)
    assert len({one[0].outputs[0].text for one in outputs}) == 1
    assert [one[0].prompt for one in outputs[:3]] == [PROMPTS[0], PROMPTS[0], None]


def test_outputs_come_in_the_order_of_prompts(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (30, 3, 17)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    for output, one in zip(outputs, params, strict=True):
        [choice] = output.outputs
        assert len(choice.token_ids) == one.max_tokens and choice.finish_reason == "length" and output.finished
        assert choice.text == llm.get_tokenizer().decode(choice.token_ids)


def test_more_prompts_than_the_engine_runs_at_once(llm: LLM) -> None:
    outputs = llm.generate(["Hi"] * 30, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5] * 30


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["fine", [1, 2, 10**9]], GREEDY, "prompt 1: prompt names token 1000000000"),
        (["fine", ""], GREEDY, "prompt 1: the prompt has no tokens"),
        (["fine", "fine"], [GREEDY, SamplingParams(top_p=2)], "prompt 1: top_p must be above 0"),
        (["fine", 5], GREEDY, "prompt 1: a prompt must be text or token ids, not int"),
        (["fine", {"prompt": "x", "multi_modal_data": {}}], GREEDY, "prompt 1: a prompt given as a dict holds"),
        (["fine", "fine"], [GREEDY], "1 sampling_params for 2 prompts"),
        ([[5] * 1024], GREEDY, "prompt 0: the prompt has 1024 tokens"),
    ],
)
def test_nothing_runs_when_one_prompt_is_wrong(llm: LLM, prompts: list, params: Any, message: str) -> None:
    before = llm.stats().counters["prompt_tokens"]
    with pytest.raises(ParamError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.stats().counters["prompt_tokens"] == before


def test_a_stop_string_cuts_the_same_text(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = whole[9:13]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[stop])
    [choice] = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_choices_differ_and_seeds_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)
    first, second = (llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs for _ in range(2))
    assert [choice.index for choice in first] == [0, 1, 2]
    assert len({choice.text for choice in first}) == 3
    assert [choice.text for choice in first] == [choice.text for choice in second]
    free = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    assert len({output.outputs[0].text for output in llm.generate([PROMPTS[0]] * 3, free, use_tqdm=False)}) == 3


def test_logprobs_of_tokens_and_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [output] = llm.generate(PROMPTS[1], params, use_tqdm=False)
    [choice] = output.outputs
    assert [entry.ids[0] for entry in choice.logprobs] == choice.token_ids
    assert all(len(entry.ids) == 3 for entry in choice.logprobs)
    assert choice.cumulative_logprob == pytest.approx(sum(entry.logprobs[0] for entry in choice.logprobs))
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids) and output.prompt_logprobs[0] is None
    assert [entry.ids[0] for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]


def test_bad_words_do_not_come(llm: LLM) -> None:
    whole = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    word = next(word for word in whole.split() if word.isalpha())
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, bad_words=[word])
    assert f" {word} " not in llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].text


def test_chats_alone_and_together(llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("Hi!", "Where is the ball?")]
    together = llm.chat(chats, GREEDY, use_tqdm=False)
    alone = [llm.chat(chat, GREEDY, use_tqdm=False)[0] for chat in chats]
    assert [output.outputs[0].text for output in together] == [output.outputs[0].text for output in alone]
    assert "Where is the ball?" in together[1].prompt
    assert together[0].prompt_token_ids == llm.get_tokenizer().encode(together[0].prompt, add_special_tokens=False)


def test_a_chat_without_parameters_has_all_the_room(llm: LLM) -> None:
    [output] = llm.chat([{"role": "user", "content": "Hi!"}], use_tqdm=False)
    [choice] = output.outputs
    room = llm.limits.max_model_len - len(output.prompt_token_ids)
    assert choice.finish_reason == "stop" or len(choice.token_ids) == room


def test_a_chat_that_is_wrong_names_itself(llm: LLM) -> None:
    with pytest.raises(ParamError, match=r"prompt 1: messages\[0\].role"):
        llm.chat([[{"role": "user", "content": "x"}], [{"role": "wizard", "content": "x"}]])


def test_progress_shows_tokens_per_second(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr().err
    assert "3/3" in shown and "tokens/s" in shown


def test_a_closed_llm_says_so(engine_options: dict[str, Any]) -> None:
    llm = LLM(**engine_options)
    llm.close()
    llm.close()
    for call in (llm.stats, lambda: llm.generate("x")):
        with pytest.raises(EngineDead, match="closed"):
            call()


@pytest.mark.parametrize("options", [{"model": "/no/such/folder"}, {"max_model_len": 10**9}, {"maximum": 1}])
def test_what_cannot_be_served_is_an_error_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        LLM(**options)
    assert isinstance(error.value, ConfigError) or "no/such/folder" in str(error.value)


def test_a_script_that_forgets_to_close_ends_well(engine_options: dict[str, Any]) -> None:
    code = f"from jaxserve import LLM\nllm = LLM(**{engine_options!r})\nprint(llm.generate('Hi')[0].finished)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-2000:]


def test_turns_of_a_program_share_their_kv(llm: LLM) -> None:
    one = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    first = llm.generate(["Once there was", "The sun"], one, use_tqdm=False, program_id=["a", "b"])
    told = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in first]
    second = llm.generate([[*tokens, 5] for tokens in told], one, use_tqdm=False, program_id=["a", "b"], last_turn=True)
    assert [output.num_cached_tokens for output in second] == [len(tokens) - 1 for tokens in told]
    third = llm.generate([*told[0], 5], one, use_tqdm=False, program_id="a")
    assert third[0].num_cached_tokens == 0
    assert llm.stats().gauges["num_programs_pinned"] == 1
    llm.close_program("a")
    assert llm.stats().gauges["num_programs_pinned"] == 0


@pytest.mark.parametrize(
    "wrong", [{"program_id": "a"}, {"program_id": ["a", "a"]}, {"last_turn": True}, {"program_id": ["x" * 200, "y"]}]
)
def test_programs_that_make_no_sense_are_refused(llm: LLM, wrong: dict[str, Any]) -> None:
    with pytest.raises(ParamError, match="program_id"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, **wrong)


def test_a_prefix_goes_from_one_model_to_another(engine_options: dict[str, Any]) -> None:
    """The second answers as the first did, without computing what came; what it cannot use it refuses."""
    options = engine_options | {"kv_transfer": True, "batch_invariant": True}
    prompt = list(range(10, 210))
    with LLM(**options) as one, LLM(**options) as other:
        [first] = one.generate(prompt, GREEDY, use_tqdm=False)
        data = one.export_prefix(prompt).to_bytes()
        prefix = CachedPrefix.from_bytes(data)
        assert prefix.tokens == tuple(prompt[:192])
        assert other.import_prefix(prefix) == 192
        [second] = other.generate(prompt, GREEDY, use_tqdm=False)
        assert (second.num_cached_tokens, second.outputs[0].text) == (192, first.outputs[0].text)
        assert one.export_prefix("never seen " * 64).tokens == ()
        with pytest.raises(TransferError, match="salt"):
            other.import_prefix(prefix, salt="theirs")
        with pytest.raises(ValueError):
            CachedPrefix.from_bytes(data[:100])


def test_prefixes_move_only_where_that_is_switched_on(llm: LLM) -> None:
    with pytest.raises(TransferError, match="--kv-transfer"):
        llm.export_prefix("Once upon a time")
