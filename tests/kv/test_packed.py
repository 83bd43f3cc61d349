"""Formats of packed pages as the rest of the house sees them: names, sizes, pages that travel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kv import formats
from jaxserve.kv.wire import BadPageError, export_page, import_page
from jaxserve.types import KVGroup

GROUP = KVGroup(layers=(0, 1), kv_heads=2, head_dim=128)
SEALED_BYTES = {"kivi2": 5120, "kivi4": 9216, "hack2": 5376, "hack4": 9728, "hack8": 17920, "hack2_p": 5376}


def sealed_page(name: str) -> dict[str, np.ndarray]:
    """One sealed page of random keys and values, as it is staged on the host."""
    k, v = jax.random.normal(jax.random.key(0), (2, 2, 2, 64, 128)).astype(jnp.bfloat16)
    codes = formats.get(name).layout.encode(k, v)  # type: ignore[attr-defined]
    return {key: np.asarray(x)[None] for key, x in codes.items()}


@pytest.mark.parametrize("name", SEALED_BYTES)
def test_bytes_of_a_page(name: str) -> None:
    layers_and_heads = 4
    kinds = formats.get(name).kinds(GROUP)
    assert [kind.bytes for kind in kinds] == [layers_and_heads * 32768, layers_and_heads * SEALED_BYTES[name]]


@pytest.mark.parametrize("name", ["kivi2", "hack4"])
def test_sealed_pages_travel_bit_for_bit(name: str) -> None:
    page = sealed_page(name)
    record = export_page(formats.get(name), 1, page, b"id")
    header, back = import_page(formats.get(name), GROUP, record)
    assert header.cls == 1 and len(record) < 4 * SEALED_BYTES[name] + 2000
    for key, x in page.items():
        np.testing.assert_array_equal(back[key], x)


@pytest.mark.parametrize("key", ["k_scale", "v_min"])
def test_pages_that_are_not_finite_are_refused(key: str) -> None:
    """Scales are held as bits: what is not finite must be found all the same."""
    page: dict[str, Any] = sealed_page("hack2")
    page[key] = page[key].copy()
    page[key].flat[5] = 0x7F80
    with pytest.raises(BadPageError, match="not finite"):
        import_page(formats.get("hack2"), GROUP, export_page(formats.get("hack2"), 1, page, b""))


def test_a_head_dim_without_packed_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim of 64 or 128, not 96"):
        formats.get("hack2").kinds(KVGroup(layers=(0,), kv_heads=1, head_dim=96))
