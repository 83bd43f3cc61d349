"""What must change no bit, or no token, whatever holds the KV: checked with --batch-invariant on any engine."""

from __future__ import annotations

from tests.engine.driver import Driver, alone, answers, prompts, same


def decoded_is_prefilled_is_crowded(driver: Driver, cases: list[list[int]], cuts: tuple[int, ...] = (10, 70)) -> None:
    """Each case alone, in a crowd, and with the first tokens of its answer as part of the prompt."""
    first = alone(driver, cases)
    same(answers(driver, cases, salt="crowd"), first)
    for cut in cuts:
        longer = [[*case, *answer.tokens[:cut]] for case, answer in zip(cases, first, strict=True)]
        rest = answers(driver, longer, salt=f"cut {cut}", max_tokens=80 - cut)
        for a, b in zip(rest, first, strict=True):
            assert a.tokens == b.tokens[cut:] and a.logprobs == b.logprobs[cut:]


def chunked_is_whole(narrow: Driver, wide: Driver, cases: list[list[int]]) -> None:
    same(answers(narrow, cases), answers(wide, cases, salt="whole"))


def preempted_is_undisturbed(tight: Driver, roomy: Driver, lengths: tuple[int, ...] = (150, 200, 180, 130)) -> None:
    """Sequences that take turns in `tight`, by whatever it does with those that it preempts."""
    cases = prompts(list(lengths), seed=5)
    params = {"temperature": 0.8, "seed": 5, "max_tokens": 150}
    same(answers(tight, cases, **params), answers(roomy, cases, salt="roomy", **params))
    assert tight.counter("num_preemptions") > 0
    assert tight.gauge("kv_cache_usage_perc") == 0


def speculated_is_plain(speculative: Driver, plain: Driver, **params: object) -> None:
    """Tokens; drafts are accepted and rejected."""
    text = prompts([12], seed=6)[0] * 6
    cases = [text, prompts([90], seed=7)[0], text[:50]]
    got = answers(speculative, cases, max_tokens=200, logprobs=None, **params)
    expected = answers(plain, cases, max_tokens=200, logprobs=None, salt="plain", **params)
    assert [a.tokens for a in got] == [a.tokens for a in expected]
    assert speculative.counter("spec_decode_num_accepted_tokens") > 0
    assert speculative.gauge("kv_cache_usage_perc") == 0


def a_program_keeps_two_pages(driver: Driver) -> None:
    """`driver` has no prefix cache: the second turn of 163 tokens finds 128 that the first one left."""
    prompt = prompts([100], seed=8)[0]
    driver.submit("a", prompt, program_id="p", max_tokens=60, ignore_eos=True)
    turn = [*prompt, *driver.run()["a", 0].tokens, 5, 6, 7]
    driver.submit("b", turn, program_id="p", last_turn=True, max_tokens=20, ignore_eos=True, logprobs=3)
    second = driver.run()["b", 0]
    assert second.cached_tokens == 128
    same([second], alone(driver, [turn], max_tokens=20))
