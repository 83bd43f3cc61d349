"""Slices of fused leaves are slices of the whole, and sources come back out."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoint.layout import gather, scatter, source_shapes
from jaxserve.models.names import Columns, Copy, Stack

columns = st.builds(Columns, st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))


@st.composite
def leaves(draw):
    """(layout, shape of a leaf it fits)"""
    layout = draw(st.one_of(columns, st.just(Copy()), st.just(Stack())))
    if isinstance(layout, Columns):
        width = layout.blocks * sum(layout.widths)
        return layout, draw(st.sampled_from([(3, width), (width,)]))
    return layout, draw(st.sampled_from([(2, 6), (4, 3)]))


def make_sources(layout, shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=source) for source in source_shapes(layout, shape)]


@given(leaves(), st.data())
def test_a_gathered_slice_is_a_slice_of_the_whole(leaf, data):
    layout, shape = leaf
    sources = make_sources(layout, shape)
    whole = gather(layout, sources, shape, (slice(None),) * len(shape), np.float64)
    index = tuple(data.draw(st.slices(n).filter(lambda s: s.step in (None, 1))) for n in shape)
    index = tuple(slice(s.indices(n)[0], max(s.indices(n)[:2])) for s, n in zip(index, shape, strict=True))
    np.testing.assert_array_equal(gather(layout, sources, shape, index, np.float64), whole[index])


@given(leaves())
def test_scatter_inverts_gather(leaf):
    layout, shape = leaf
    sources = make_sources(layout, shape)
    whole = gather(layout, sources, shape, (slice(None),) * len(shape), np.float64)
    for number, source in enumerate(sources):
        np.testing.assert_array_equal(scatter(layout, whole, number), source)


def test_columns_interleave_by_block():
    first, second = np.arange(4)[:, None], 10 + np.arange(2)[:, None]
    layout = Columns(2, (2, 1))
    whole = gather(layout, [first, second], (1, 6), (slice(None), slice(None)), np.int64)
    assert whole.tolist() == [[0, 1, 10, 2, 3, 11]]
