"""Random workloads against the symbolic device: content of pages, conservation, progress, replay."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler import policy_names, replay
from tests.scheduler.driver import Driver, accept_randomly, groups_of, limits_of

WINDOWS = (None, 40, 64, 65, 130, 200)


@st.composite
def setups(draw):
    q = draw(st.sampled_from([1, 4]))
    slots = draw(st.integers(1, 5))
    tiles = draw(st.integers(1, 6))
    max_len = draw(st.sampled_from([150, 256, 400]))
    limits = limits_of(
        q=q,
        lag=draw(st.sampled_from([0, 1])),
        max_num_seqs=slots,
        max_decode_rows=draw(st.integers(1, slots)),
        max_tiles=tiles,
        max_num_batched_tokens=draw(st.integers(64, 64 * tiles + slots * q)),
        max_model_len=max_len,
        enable_prefix_caching=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.1])),
    )
    entries = -(-max_len // 64)
    windows = draw(st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=3))
    pools = [(draw(st.integers(entries, 3 * entries)), window) for window in windows]
    return limits, groups_of(*pools)


@pytest.mark.parametrize("policy", policy_names())
@settings(max_examples=60, deadline=None)
@given(setup=setups(), seed=st.integers(0, 10**6), count=st.integers(1, 14))
def test_random_workloads(policy, setup, seed, count):
    limits, groups = setup
    rng = random.Random(seed)
    driver = Driver(policy, limits, groups, accept_randomly(seed, limits.q))
    stems = [[rng.randrange(997) for _ in range(limits.max_model_len)] for _ in range(2)]
    arrived = 0
    while arrived < count:
        prompt = rng.choice(stems)[: rng.randrange(1, limits.max_model_len - 1)]
        if rng.random() < 0.5:
            cut = rng.randrange(len(prompt))
            prompt = prompt[:cut] + [rng.randrange(997) for _ in prompt[cut:]]
        max_new = rng.randrange(1, limits.max_model_len - len(prompt) + 1)
        salt, choices = rng.randrange(2), rng.choice([1, 1, 1, 3])
        fields = {"priority": rng.randrange(3), "whole_prompt": rng.random() < 0.1, "salt": salt}
        first = arrived
        for choice in range(choices):
            stop = rng.randrange(1, max_new + 1)
            parent = first if choice else None
            driver.arrive(arrived, prompt, max_new, stop, parent, choice, **fields)
            arrived += 1
        for _ in range(rng.randrange(6)):
            driver.step()
        if rng.random() < 0.15:
            seq = rng.randrange(arrived)
            if not driver.hosts[seq].finished:
                driver.abort(seq)
    driver.run()
    driver.scheduler.check_integrity()
    assert driver.scheduler.gauges["kv_cache_usage_perc"] == 0.0
    plans = list(replay(driver.record.getvalue()))
    assert plans == driver.plans
