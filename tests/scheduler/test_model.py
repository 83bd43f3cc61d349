"""Random workloads against the symbolic device: content of pages, conservation, progress, replay."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler import make_policy, policy_names, replay
from jaxserve.types import PAGE_SIZES
from tests.scheduler import chaos
from tests.scheduler.driver import Driver, accept_randomly, groups_of, limits_of, two_classes

EXAMPLES = int(os.environ.get("SCHEDULER_EXAMPLES", "25"))
WINDOWS = (None, 1, 40, 64, 65, 130, 200)


@st.composite
def setups(draw):
    """Limits and groups, from roomy to so small that many requests cannot run at all."""
    q = draw(st.sampled_from([1, 4]))
    slots = draw(st.integers(1, 6))
    tiles = draw(st.integers(1, 6))
    max_len = draw(st.sampled_from([150, 256, 400]))
    page = draw(st.sampled_from(PAGE_SIZES))
    limits = limits_of(
        q=q,
        lag=draw(st.sampled_from([0, 1])),
        max_num_seqs=slots,
        max_decode_rows=draw(st.integers(1, slots)),
        max_tiles=tiles,
        tile_buckets=draw(st.sampled_from([(), (1, 2, 4), (2, 6)])),
        max_num_batched_tokens=draw(st.integers(page, page * tiles + slots * q)),
        max_model_len=max_len,
        page_tokens=page,
        enable_prefix_caching=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        pin_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        pin_ttl_s=draw(st.sampled_from([0.0, 10.0, 1e9])),
    )
    entries = -(-max_len // page)
    windows = draw(st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=3))
    made = tuple(msgspec.structs.replace(draw(groups(entries, window)), page_tokens=page) for window in windows)
    if draw(st.booleans()):
        sizes = tuple(draw(st.integers(0, 2 * entries)) for group in made for _ in group.classes)
        limits = msgspec.structs.replace(limits, host_pages=sizes)
    return limits, made


@st.composite
def groups(draw, entries, window):
    """One page class or two."""
    if draw(st.booleans()):
        return groups_of((draw(st.integers(2, 3 * entries)), window))[0]
    open, sealed = draw(st.integers(2, 3 * entries)), draw(st.integers(2, 3 * entries))
    return two_classes(open, sealed, window, sinks=draw(st.integers(0, 2)), residual=draw(st.integers(1, 2)))


@pytest.mark.parametrize("policy", [*policy_names(), "slora+mlfq", "prepacking+fairness", chaos.Chaos.name])
@settings(max_examples=EXAMPLES, deadline=None)
@given(setup=setups(), seed=st.integers(0, 10**6), count=st.integers(1, 10))
def test_random_workloads(policy, setup, seed, count):
    limits, groups = setup
    rng = random.Random(seed)
    params = {"seed": seed} if policy == chaos.Chaos.name else {}
    moves = rng.randrange(1, 5)
    driver = Driver(make_policy(policy, **params), limits, groups, accept_randomly(seed, limits.q), moves)
    stems = [[rng.randrange(997) for _ in range(limits.max_model_len)] for _ in range(2)]
    for request in range(0, 3 * count, 3):
        prompt = rng.choice(stems)[: rng.randrange(1, limits.max_model_len)]
        if driver.hosts and rng.random() < 0.4:  # the next turn of a conversation
            prompt = [*rng.choice(list(driver.hosts.values())).tokens, rng.randrange(997)][: limits.max_model_len - 1]
        elif rng.random() < 0.5:
            cut = rng.randrange(len(prompt))
            prompt = prompt[:cut] + [rng.randrange(997) for _ in prompt[cut:]]
        max_new = rng.randrange(1, min(150, limits.max_model_len - len(prompt)) + 1)
        stop_early = rng.random() < 0.5
        salt, choices = rng.randrange(2), rng.choice([1, 1, 1, 3])
        fields = {"salt": salt, "priority": rng.randrange(3), "whole_prompt": rng.random() < 0.1}
        fields |= {"tenant": str(rng.randrange(3)), "tool": str(rng.randrange(2))}
        fields |= {"deadline": rng.choice([None, 5.0, 500.0]), "output": rng.choice([None, max_new])}
        if choices == 1 and rng.random() < 0.5:
            program = f"{rng.randrange(3)}/{salt}"
            pinned = driver.scheduler.pinned(program)
            if pinned is not None and rng.random() < 0.8:
                said = driver.hosts[pinned].tokens
                kept = said[: rng.randrange(len(said))] if rng.random() < 0.3 else said
                prompt = [*kept, *(rng.randrange(997) for _ in range(rng.randrange(1, 80)))]
                prompt = prompt[: limits.max_model_len - 1]
                max_new = min(max_new, limits.max_model_len - len(prompt))
            fields |= {"program": program, "last_turn": rng.random() < 0.1}
        for choice in range(choices):
            stop = rng.randrange(1, max_new + 1) if stop_early else max_new
            driver.arrive(request + choice, prompt, max_new, stop, request if choice else None, choice, **fields)
        for _ in range(rng.randrange(6)):
            driver.step()
        if rng.random() < 0.1:
            driver.close(f"{rng.randrange(3)}/{rng.randrange(2)}")
        if driver.hosts and rng.random() < 0.15:
            seq = rng.choice(list(driver.hosts))
            if not driver.hosts[seq].finished:
                driver.abort(seq)
    driver.run()
    for program in range(3):
        for salt in range(2):
            driver.close(f"{program}/{salt}")
    driver.scheduler.check_integrity()
    for _ in range(moves + 1):  # what is on its way
        driver.step()
    assert driver.scheduler.gauges["kv_cache_usage_perc"] == 0.0
    assert limits.enable_prefix_caching or driver.scheduler.gauges["swap_usage_perc"] == 0.0
    assert all(host.finished for host in driver.hosts.values())
    assert not driver.scheduler.counters["policy_errors"], driver.scheduler.policy_error
    assert list(replay(driver.record.getvalue())) == driver.plans
