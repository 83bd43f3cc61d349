"""The choice of channels, with losses that are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.calibrate.choice import fewest, in_groups, path
from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.checkpoint.kv_calibration import share
from jaxserve.config import ConfigError

SIZES = (16, 32, 48, 64)
PAIRS = st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)), min_size=1, max_size=8).map(tuple)


def lose(channels):
    """Layer 1 does not matter, values of layer 0 little, its keys much."""
    keys, values = channels[0]
    return 1.0 + (64 - keys) * 0.1 + (64 - values) * 0.01


def test_what_costs_least_goes_first() -> None:
    calls = []
    found = path(2, 64, SIZES, lose, lambda: calls.append(1))
    assert len(calls) == 2 * 2 * 3 and len(found) == 1 + 2 * 2 * 3
    assert found[0] == ((64, 64), (64, 64)) and found[-1] == ((16, 16), (16, 16))
    assert found[6] == ((64, 64), (16, 16)), "what does not matter"
    assert found[9] == ((64, 16), (16, 16)), "then what matters little"
    shares = [share(choice, 64) for choice in found]
    assert shares == sorted(shares, reverse=True)


def test_the_fewest_that_are_allowed() -> None:
    choices = path(2, 64, SIZES, lose)
    assert fewest(choices, lambda choice: lose(choice) <= 1.0, 64) == ((64, 64), (16, 16))
    assert fewest(choices, lambda choice: lose(choice) <= 1.35, 64) == ((64, 32), (16, 16))
    assert fewest(choices, lambda choice: False, 64) == ((64, 64), (64, 64))
    assert fewest(choices, lambda choice: True, 64) == ((16, 16), (16, 16))


@given(PAIRS, st.integers(1, 5))
def test_few_groups_that_take_nothing_away(channels, groups: int) -> None:
    joined = in_groups(channels, groups, 64)
    assert len(set(joined)) <= groups
    assert all(k >= a and v >= b for (k, v), (a, b) in zip(joined, channels, strict=True))
    if len(set(channels)) <= groups:
        assert joined == channels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_bound": -1}, "--loss-bound -1 must"),
        ({"keep": 0.0}, "--keep 0.0 must"),
        ({"groups": 0}, "--groups 0 must"),
        ({"window": 1024, "tokens": 512}, "--window 1024 must"),
    ],
)
def test_options_out_of_range_are_refused(options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CalibrateOptions(**options)


def test_numbers_of_channels_are_multiples_of_16() -> None:
    assert CalibrateOptions().sizes(64) == (16, 32, 48, 64)
    assert CalibrateOptions(channels=(32,)).sizes(128) == (32, 128)
    for size, head_dim in ((40, 64), (80, 64), (0, 64)):
        with pytest.raises(ConfigError, match=f"--channels {size}"):
            CalibrateOptions(channels=(size,)).sizes(head_dim)
    with pytest.raises(ConfigError, match="24 channels"):
        CalibrateOptions().sizes(24)
