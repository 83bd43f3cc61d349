import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.sampling.bitmask import all_allowed, allowed_mask, of_tokens
from jaxserve.sampling.processors import unpacked


@settings(deadline=None)
@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)))
def test_mask_of_allowed_without_banned(allowed, banned):
    bits = np.asarray(unpacked(allowed_mask(100, sorted(allowed), sorted(banned))[None], 100))[0]
    assert set(np.flatnonzero(bits)) == allowed - banned


def test_no_list_allows_everything_and_an_empty_list_nothing():
    assert np.array_equal(allowed_mask(70, None), all_allowed(70))
    assert not allowed_mask(70, []).any()


@pytest.mark.parametrize("token", [-1, 100])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match=f"Token {token} is outside the vocabulary of 100"):
        of_tokens(100, [3, token])
