"""Packed pages: their bytes, how they are made, what they refuse, and the algebra of products on codes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import Kivi, hack
from pallas_kernels.layouts.packed import page_bytes
from pallas_kernels.layouts.packing import from_bits, to_bits
from tests.kernels.packed_cases import LAYOUTS, Packed, outliers

EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
HACKS = {name: layout for name, layout in LAYOUTS.items() if name.startswith("hack")}
HOMOMORPHIC = pytest.mark.parametrize("layout", HACKS.values(), ids=HACKS)


def page(layout: Packed, k: np.ndarray, v: np.ndarray) -> dict[str, jax.Array]:
    """One page [1, 1, ...] of k, v [page_tokens, head_dim]."""
    return _encode(layout, *(x.astype(jnp.bfloat16)[None, None] for x in (k, v)))


@functools.partial(jax.jit, static_argnums=0)
def _encode(layout: Packed, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
    return layout.encode(k, v)


@functools.partial(jax.jit, static_argnums=0)
def decode(layout: Packed, made: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return layout.decode(made)


def fetched(layout: Packed, made: dict[str, jax.Array]):
    return layout.fetch({name: x[:, None] for name, x in made.items()}, 0, jnp.zeros(1, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def scores(layout: Packed, q: jax.Array, made: dict[str, jax.Array]) -> jax.Array:
    return layout.scores(layout.prepare(q), fetched(layout, made))


@functools.partial(jax.jit, static_argnums=0)
def mix(layout: Packed, p: jax.Array, made: dict[str, jax.Array]) -> jax.Array:
    return layout.mix(p, fetched(layout, made))


@pytest.mark.parametrize(
    ("layout", "head_dim", "page_tokens", "expected"),
    [
        (hack(2), 128, 64, 5376),
        (hack(2, "P"), 128, 64, 5376),
        (Kivi(2), 128, 64, 5120),
        (Kivi(4), 128, 64, 9216),
        (hack(4), 128, 64, 9728),
        (hack(8), 128, 64, 17920),
        (hack(2), 64, 64, 2688),
        (hack(2), 128, 32, 3008),
        (hack(2), 128, 128, 10240),  # sums over 128 tokens take 16 bits
        (Kivi(2, group=32), 128, 64, 5632),
    ],
)
def test_bytes_per_page_and_head(layout: Packed, head_dim: int, page_tokens: int, expected: int) -> None:
    for kv_heads in (1, 8):
        assert page_bytes(layout.shapes(kv_heads, page_tokens, head_dim)) == kv_heads * expected


@EACH
@pytest.mark.parametrize(("page_tokens", "head_dim"), [(32, 64), (64, 128), (128, 128)])
def test_pages_are_what_shapes_says(layout: Packed, page_tokens: int, head_dim: int) -> None:
    k = v = jax.ShapeDtypeStruct((3, 2, page_tokens, head_dim), jnp.bfloat16)
    pages = jax.eval_shape(layout.encode, k, v)
    shapes = layout.shapes(2, page_tokens, head_dim)
    assert {n: (x.shape[1:], x.dtype) for n, x in pages.items()} == {n: (s.shape, s.dtype) for n, s in shapes.items()}
    pool = {n: jax.ShapeDtypeStruct((3, 1, *s.shape), s.dtype) for n, s in shapes.items()}
    assert layout.page_shape(pool) == (3, 2, page_tokens, head_dim, head_dim)


@EACH
def test_a_page_depends_on_its_own_tokens_alone(layout: Packed) -> None:
    k, v = (outliers((3, 2, 128, 128), seed).astype(jnp.bfloat16) for seed in (0, 1))
    together, alone = _encode(layout, k, v), _encode(layout, k[1:2], v[1:2])
    for name, x in alone.items():
        np.testing.assert_array_equal(x, np.asarray(together[name])[1:2], err_msg=name)


@EACH
def test_codes_stand_for_the_nearest_level_of_their_own_scale(layout: Packed) -> None:
    k, v = outliers((64, 128), 0), outliers((64, 128), 1)
    made = page(layout, k, v)
    decoded = decode(layout, made)
    for name, x, got in (("k", k, decoded[0]), ("v", v, decoded[1])):
        axis = layout.k_axis if name == "k" else layout.v_axis

        def meta(which: str, name: str = name, axis: str = axis) -> np.ndarray:
            found = np.asarray(from_bits(made[f"{name}_{which}"][0, 0]), np.float64)
            return found[None, :] if axis == "channel" else np.repeat(found.T, layout.group, axis=1)

        exact = x.astype(jnp.bfloat16).astype(np.float64)
        levels = meta("min") + meta("scale") * np.arange(2**layout.bits)[:, None, None]
        nearest = np.abs(levels - exact).min(axis=0)
        np.testing.assert_allclose(np.abs(np.asarray(got[0, 0]) - exact), nearest, atol=1e-4 * meta("scale").max())
        if layout.bits > 2:
            assert np.all(nearest <= meta("scale") * (0.5 + 2**layout.bits * 2**-8)), "the levels span the values"


@HOMOMORPHIC
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_algebra_is_exact_on_codes(layout: Packed, head_dim: int) -> None:
    """Where 8 bits hold q and p exactly, the products are those with the dequantized page: the identity to 1e-6."""
    rng = np.random.default_rng(5)
    made = page(layout, outliers((64, head_dim), 0), rng.standard_normal((64, head_dim)))
    # Powers of two fold into q and p without rounding.
    for name in ("k_scale", "v_scale"):
        made[name] = to_bits(jnp.exp2(jnp.round(jnp.log2(from_bits(made[name])))).astype(jnp.bfloat16))
    k, v = (np.asarray(x[0, 0], np.float64) for x in decode(layout, made))

    def grid(m: int, n: int, step: np.ndarray) -> jax.Array:
        """Vectors that are 8-bit codes once `step` is folded in, each group of which spans the whole range."""
        codes = rng.integers(0, 256, (m, n)).astype(np.float64)
        codes[:, :: layout.group], codes[:, 1 :: layout.group] = 0, 255
        return jnp.asarray(codes / step, jnp.float32)[None, None]

    folded = layout.k_axis == "channel"
    step_q = np.asarray(from_bits(made["k_scale"][0, 0]), np.float64) if folded else np.ones(head_dim)
    q = grid(16, head_dim, step_q)
    got = scores(layout, q, made)[0, 0]
    expected = np.asarray(q[0, 0], np.float64) @ k.T
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(np.asarray(q[0, 0])).max() * np.abs(k).sum(1).max())

    for partition in range(head_dim // layout.group if folded else 1):
        step_p = np.asarray(from_bits(made["v_scale"][0, 0, partition]), np.float64) if folded else np.ones(64)
        p = rng.integers(0, 256, (16, 64)).astype(np.float64)
        p[:, 0], p[:, 1] = 0, 255
        p = jnp.asarray(p / step_p, jnp.float32)[None, None]
        mixed = mix(layout, p, made)[0, 0]
        channels = slice(partition * layout.group, (partition + 1) * layout.group) if folded else slice(None)
        expected = np.asarray(p[0, 0], np.float64) @ v[:, channels]
        bound = 1e-6 * np.abs(np.asarray(p[0, 0])).max() * np.abs(v).sum(0).max()
        np.testing.assert_allclose(mixed[:, channels], expected, atol=bound)


@HOMOMORPHIC
@pytest.mark.parametrize(("outlier_keys", "bound"), [(False, 0.03), (True, 0.05)])
def test_eight_bit_queries_stay_close_to_the_dequantized_page(layout: Packed, outlier_keys: bool, bound: float) -> None:
    rng = np.random.default_rng(2)
    normal = rng.standard_normal((2, 64, 128))
    made = page(layout, outliers((64, 128), 0) if outlier_keys else normal[0], normal[1])
    k, v = (np.asarray(x, np.float64) for x in decode(layout, made))
    q = rng.standard_normal((1, 1, 16, 128)).astype(np.float32)
    exact = q @ k.swapaxes(-1, -2)
    assert np.linalg.norm(scores(layout, q, made) - exact) <= bound * np.linalg.norm(exact)
    p = np.exp(rng.standard_normal((1, 1, 16, 64)).astype(np.float32))
    assert np.linalg.norm(mix(layout, p, made) - p @ v) <= bound * np.linalg.norm(p @ v)


@EACH
def test_nothing_seen_adds_nothing(layout: Packed) -> None:
    made = page(layout, outliers((64, 128), 0), outliers((64, 128), 1))
    assert not np.any(mix(layout, np.zeros((1, 1, 16, 64), np.float32), made))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hack(2).shapes(2, 64, 96), "head_dim of 64 or 128, not 96"),
        (lambda: Kivi(2).shapes(2, 16, 64), "32, 64 or 128 tokens, not 16"),
        (lambda: hack(3), "2, 4 or 8 bits, not 3"),
        (lambda: Kivi(8), "2 or 4 bits"),
        (lambda: hack(2, group=48), "32 or 64 channels, not 48"),
        (lambda: hack(2, "Q"), "forms F and P, not 'Q'"),  # type: ignore[arg-type]
    ],
)
def test_what_the_algebra_does_not_allow_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
