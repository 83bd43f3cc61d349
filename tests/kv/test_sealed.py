"""Two page classes on the device: the reading rule against float64, and the same bits whichever way KV came about."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kv import ABSENT, KVState, SealedFormat, allocate, attend_layer, build_meta, formats, kv_shapes
from jaxserve.kv.pages import gather_pages, grant, scatter_pages
from jaxserve.kv.rotation import rotated_keys
from jaxserve.kv.wire import export_page, import_page
from jaxserve.types import PAGE_TOKENS, KVGroup
from tests.kv import layouts  # noqa: F401  registers its formats

HEADS, KV_HEADS, DIM, LAYERS, SLOTS, PAGES = 4, 2, 64, 2, 5, 24
LENGTH = 330
GROUP = KVGroup(layers=tuple(range(LAYERS)), kv_heads=KV_HEADS, head_dim=DIM)
ROWS, TILES, LAYER = 3, 4, 1


class Spec(NamedTuple):
    scale: float = DIM**-0.5
    window: int | None = None
    softcap: float | None = None


PLAIN = Spec()


class Work(NamedTuple):
    slot: int
    start: int
    count: int


@functools.cache
def sequence(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [LENGTH, heads, dim], k and v [LENGTH, kv_heads, dim]; channel 3 of k stands out."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((LENGTH, h, DIM)).astype(np.float32) for h in (HEADS, KV_HEADS, KV_HEADS))
    k[..., 3] *= 6
    return q, k, v


class Host:
    """Plays the scheduler for slots 1 and 3: grants pages, seals what rows filled, spoils what it gives back."""

    def __init__(self, format: SealedFormat, spec: Spec = PLAIN):
        kv = allocate(kv_shapes([GROUP], [format], [(PAGES, PAGES)], SLOTS, LENGTH))
        self.kv, self.format, self.spec = kv, format, spec
        self.held: dict[tuple[int, int, int], int] = {}
        self.got: dict[tuple[int, int], np.ndarray] = {}
        self._free = [np.random.default_rng(7).permutation(PAGES).tolist() for _ in range(2)]

    def run(self, rows: Sequence[Work] = (), tiles: Sequence[Work] = (), width: int = 1) -> None:
        new = []
        for work in (*rows, *tiles):
            end = work.start + work.count
            chunk = max(other.start + other.count for other in (*rows, *tiles) if other.slot == work.slot)
            index, full = work.start // PAGE_TOKENS, chunk // PAGE_TOKENS
            stays = index < self.format.sink_pages or index > full - self.format.residual_pages
            for cls, wanted in enumerate((stays or work in rows, end % PAGE_TOKENS == 0)):
                key = (cls, work.slot, index)
                if wanted and key not in self.held and not (cls and index < self.format.sink_pages):
                    self.held[key] = self._free[cls].pop()
                    new.append((*key, self.held[key]))
        if new:
            new += [(0, SLOTS, 0, 0)] * (8 - len(new))
            self.kv = give(self.kv, *(np.array(column, np.int32) for column in zip(*new, strict=True)))
        self._attend(rows, tiles, width)
        for work in rows:
            index, last = divmod(work.start + work.count, PAGE_TOKENS)
            if last == 0 and index - 1 >= self.format.sink_pages:
                src, dst = (self.held[cls, work.slot, index - 1] for cls in (0, 1))
                self.kv = seal(self.kv, np.array([[src, ABSENT], [dst, ABSENT]], np.int32))
        for slot in {work.slot for work in (*rows, *tiles)}:
            end = max(w.start + w.count for w in (*rows, *tiles) if w.slot == slot)
            self._give_back(slot, end // PAGE_TOKENS - self.format.residual_pages)

    def _give_back(self, slot: int, last: int) -> None:
        for key in [k for k in self.held if k[:2] == (0, slot) and self.format.sink_pages <= k[2] <= last]:
            page = self.held.pop(key)
            self._free[0].insert(0, page)
            self.kv = spoil(self.kv, np.int32(page))

    def _attend(self, rows: Sequence[Work], tiles: Sequence[Work], width: int) -> None:
        flat: list[list[np.ndarray]] = [[], [], []]
        ints = []
        for works, bucket, tokens in ((rows, ROWS, width), (tiles, TILES, PAGE_TOKENS)):
            if not works:
                ints.append((np.zeros(0, np.int32),) * 3)
                continue
            padded = [*works, *[Work(SLOTS, 7, 0)] * (bucket - len(works))]
            ints.append(tuple(np.array(column, np.int32) for column in zip(*padded, strict=True)))
            for work in padded:
                for out, x in zip(flat, sequence(work.slot), strict=True):
                    block = np.full((tokens, *x.shape[1:]), np.nan, np.float32)
                    block[: work.count] = x[work.start : work.start + work.count]
                    out.append(block)
        self.kv, out = step(self.kv, *(np.concatenate(x) for x in flat), *ints, spec=self.spec)
        o, at = np.asarray(out), 0
        for works, bucket, tokens in ((rows, ROWS, width), (tiles, TILES, PAGE_TOKENS)):
            for i, work in enumerate(works):
                for t in range(work.count):
                    self.got[work.slot, work.start + t] = o[at + i * tokens + t]
            at += bucket * tokens if works else 0
        assert np.all(np.isfinite(o))

    def page(self, cls: int, slot: int, index: int) -> dict[str, np.ndarray]:
        part = self.format.part(self.kv.pools[0], cls)
        return jax.tree.map(np.asarray, gather_pages(part, jnp.array([self.held[cls, slot, index]])))


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=0)
def step(kv: KVState, q, k, v, rows, tiles, *, spec: Spec):
    meta = build_meta(kv.tables, *rows, *tiles, rules=[f.rule for f in kv.formats])
    return attend_layer(kv, 0, LAYER, q, k, v, meta, spec)


@functools.partial(jax.jit, donate_argnums=0)
def seal(kv: KVState, packed) -> KVState:
    return kv.with_pool(0, kv.formats[0].seal(kv.pools[0], *packed))


@functools.partial(jax.jit, donate_argnums=0)
def spoil(kv: KVState, page) -> KVState:
    format, shape = kv.formats[0], (1, KV_HEADS, PAGE_TOKENS, DIM)
    nonsense = jnp.full(shape, 99.0, format.dtype)
    open = kv.pools[0]["open"]
    for layer in range(LAYERS):
        open = format.open.put_pages(open, layer, nonsense, nonsense, page[None], jnp.ones((1, PAGE_TOKENS), bool))
    return kv.with_pool(0, kv.pools[0] | {"open": open})


@functools.partial(jax.jit, donate_argnums=0)
def give(kv: KVState, classes, slots, indices, pages) -> KVState:
    return grant(kv, 0, classes, slots, indices, pages)


def chunk(slot: int, start: int, end: int) -> list[Work]:
    works = []
    while start < end:
        stop = min(end, (start // PAGE_TOKENS + 1) * PAGE_TOKENS)
        works.append(Work(slot, start, stop - start))
        start = stop
    return works


def whole(host: Host) -> Host:
    host.run(tiles=chunk(1, 0, 256))
    host.run(tiles=chunk(1, 256, LENGTH))
    return host


def mixed(host: Host) -> Host:
    """Chunks, rows of one and two tokens, tiles that begin inside a page, another sequence beside it."""
    host.run(tiles=[*chunk(1, 0, 64), *chunk(3, 0, 40)])
    host.run(tiles=chunk(1, 64, 100))
    host.run(tiles=[*chunk(1, 100, 192), *chunk(3, 40, 128)])
    for start in range(192, 256, 2):
        host.run(rows=[Work(1, start, 2), Work(3, start - 64, 1)], width=2)
        host.run(rows=[Work(3, start - 63, 1)], width=2)
    host.run(tiles=chunk(3, 192, 256), rows=[Work(1, 256, 1)])
    for start in range(257, LENGTH):
        host.run(rows=[Work(1, start, 1)])
    return host


def one_by_one(host: Host) -> Host:
    for start in range(LENGTH):
        host.run(rows=[Work(1, start, 1)])
    return host


def expected(format: SealedFormat, spec: Spec, slot: int) -> np.ndarray:
    """The reading rule, query by query, in float64."""
    q, k, v = sequence(slot)
    k, v = (np.asarray(jnp.asarray(x, format.dtype), np.float32) for x in (k, v))
    sealed = []
    for x in (k, v):
        pad = np.pad(x, ((0, -LENGTH % PAGE_TOKENS), (0, 0), (0, 0)))
        sealed.append(pad.reshape(-1, PAGE_TOKENS, KV_HEADS, DIM).swapaxes(1, 2))
    held = format.channels or (DIM, DIM)
    cut = [jnp.asarray(x[..., :n], format.dtype) for x, n in zip(sealed, held, strict=True)]
    if format.key_rotation == "hadamard":
        cut[0] = rotated_keys(cut[0])
    codes = format.layout.encode(*cut)
    pool = {name: np.asarray(x)[:, None] for name, x in codes.items()}
    read = list(format.layout.fetch(jax.tree.map(jnp.asarray, pool), 0, jnp.arange(len(sealed[0]))))
    if format.key_rotation == "hadamard":
        read[0] = rotated_keys(read[0])  # of 64 channels: its own inverse
    if format.name == "zeroc":
        read[0] = read[0].swapaxes(2, 3)  # its keys are columns
    read = [np.pad(x, [(0, 0)] * 3 + [(0, DIM - x.shape[-1])]) for x in read]
    flat = [np.asarray(x, np.float64).swapaxes(1, 2).reshape(-1, KV_HEADS, DIM) for x in read]
    out = np.zeros((LENGTH, HEADS, DIM))
    for p in range(LENGTH):
        index = np.arange(p + 1) // PAGE_TOKENS
        dense = (index < format.sink_pages) | (index > p // PAGE_TOKENS - format.residual_pages)
        keys, values = (
            np.repeat(np.where(dense[:, None, None], x[: p + 1], y[: p + 1]), HEADS // KV_HEADS, axis=1)
            for x, y in zip((k, v), flat, strict=True)
        )
        s = np.einsum("hd,khd->hk", q[p], keys) * spec.scale
        if spec.window:
            s[:, : max(0, p + 1 - spec.window)] = -np.inf
        w = np.exp(s - s.max(-1, keepdims=True))
        out[p] = np.einsum("hk,khd->hd", w / w.sum(-1, keepdims=True), values)
    return out


@pytest.mark.parametrize(
    ("sinks", "residual", "window", "backend"), [(1, 1, None, "invariant"), (2, 2, 100, None), (0, 1, 50, None)]
)
def test_the_reading_rule(sinks: int, residual: int, window: int | None, backend: str | None) -> None:
    format = formats.get("test-rounded", sink_pages=sinks, residual_pages=residual, backend=backend)
    spec = Spec(window=window)
    host = mixed(Host(format, spec))
    for slot in (1, 3):
        positions = sorted(p for s, p in host.got if s == slot)
        got = np.stack([host.got[slot, p] for p in positions])
        np.testing.assert_allclose(got, expected(format, spec, slot)[positions], atol=3e-5)


@pytest.mark.parametrize(
    ("name", "sinks", "residual", "backend"),
    [("test-rounded", 1, 1, "invariant"), ("test-rounded", 0, 2, "tiled"), ("test-plain", 1, 2, "invariant")],
)
def test_the_same_bits_whichever_way(name: str, sinks: int, residual: int, backend: str) -> None:
    """Whole prefill, chunks and token by token: outputs and sealed codes, in the mode where bits do not depend on
    shapes."""
    make = lambda: Host(formats.get(name, sink_pages=sinks, residual_pages=residual, backend=backend))  # noqa: E731
    first, *others = whole(make()), mixed(make()), one_by_one(make())
    for host in others:
        for p in range(LENGTH):
            assert np.array_equal(host.got[1, p], first.got[1, p]), p
        for index in range(sinks, LENGTH // PAGE_TOKENS):
            codes = host.page(1, 1, index)
            same = (np.array_equal(codes[n][:, LAYER], x[:, LAYER]) for n, x in first.page(1, 1, index).items())
            assert all(same), index


@pytest.mark.parametrize("channels", [(64, 64), (48, 32)])
def test_sealed_pages_of_leading_channels(channels: tuple[int, int]) -> None:
    """16-bit pages whole, sealed ones without their last channels, in float64. Other ways give the same bits: see
    below."""
    format = formats.get("zeroc", channels=channels, dtype="float32")
    host = whole(Host(format))
    positions = sorted(p for s, p in host.got if s == 1)
    got = np.stack([host.got[1, p] for p in positions])
    exact = expected(format, PLAIN, 1)[positions]
    np.testing.assert_allclose(got, exact, atol=3e-5)
    dense = np.abs(exact - expected(formats.get("test-plain"), PLAIN, 1)[positions]).max()
    assert dense < 1e-12 if channels == (64, 64) else dense > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [("hack4", {"channels": (64, 32)}), ("kivi2", {"key_rotation": "hadamard"})],
    ids=["leading channels", "rotated keys in clipped ranges"],
)
def test_packed_pages_have_the_same_bits_whichever_way(name: str, options: dict[str, Any]) -> None:
    make = lambda: Host(formats.get(name, backend="invariant", **options))  # noqa: E731
    first, *others = whole(make()), mixed(make())
    for host in others:
        assert all(np.array_equal(host.got[1, p], first.got[1, p]) for p in range(LENGTH))
        for index in range(1, LENGTH // PAGE_TOKENS):
            for name, codes in first.page(1, 1, index).items():
                assert np.array_equal(host.page(1, 1, index)[name][:, LAYER], codes[:, LAYER])


def test_rotated_keys_meet_rotated_queries() -> None:
    """Sealed pages of turned keys, 16-bit pages of keys as they are, in float64."""
    format = formats.get("test-rounded", key_rotation="hadamard", dtype="float32")
    host = whole(Host(format))
    positions = sorted(p for s, p in host.got if s == 1)
    got = np.stack([host.got[1, p] for p in positions])
    np.testing.assert_allclose(got, expected(format, PLAIN, 1)[positions], atol=3e-5)


def test_pages_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two of channels in a key, not 48"):
        formats.get("zeroc", channels=(48, 64), key_rotation="hadamard").kinds(GROUP)


def test_pages_without_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold 80 of the 64 channels"):
        formats.get("zeroc", channels=(80, 64)).kinds(GROUP)
    with pytest.raises(ValueError, match="multiple of 16, not 40"):
        formats.get("zeroc", channels=(40, 64)).kinds(GROUP)
    with pytest.raises(ValueError, match="64 or 128, not 32"):
        formats.get("hack2", channels=(64, 32)).kinds(GROUP)


def test_bytes_of_a_page_follow_its_channels() -> None:
    open, sealed = formats.get("zeroc", channels=(48, 32)).kinds(GROUP)
    assert open.bytes == LAYERS * KV_HEADS * PAGE_TOKENS * 2 * DIM * 2
    assert sealed.bytes == LAYERS * KV_HEADS * PAGE_TOKENS * (48 + 32) * 2


def test_pages_that_a_chunk_completes_take_no_16_bit_page() -> None:
    host = Host(formats.get("test-rounded"))
    host.run(tiles=chunk(1, 0, 256))
    assert sorted(k for k in host.held) == [(0, 1, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]


def test_prefill_exact_reads_its_chunk_in_16_bits() -> None:
    exact = Host(formats.get("test-rounded", prefill_exact=True, dtype="float32"))
    exact.run(tiles=chunk(1, 0, 256))
    plain = formats.get("test-plain")
    got = np.stack([exact.got[1, p] for p in range(256)])
    np.testing.assert_allclose(got, expected(plain, PLAIN, 1)[:256], atol=3e-5)
    exact.run(tiles=chunk(1, 256, LENGTH))
    got = np.stack([exact.got[1, p] for p in range(256, LENGTH)])
    wrong = np.abs(got - expected(plain, PLAIN, 1)[256:]).max()
    assert wrong > 1e-3, "pages of the chunk before are sealed"


def test_sealing_twice_changes_nothing_and_ids_out_of_range_are_skipped() -> None:
    format = formats.get("test-rounded")
    host = Host(format)
    for start in range(64, 128):
        host.run(rows=[Work(1, start, 1)])
    before = jax.tree.map(np.asarray, host.kv.pools[0]["sealed"])
    pool = host.kv.pools[0]
    ids = jnp.array([ABSENT, ABSENT], jnp.int32)
    after = jax.jit(format.seal)(pool, jnp.array([0, ABSENT], jnp.int32), ids)
    assert all(np.array_equal(before[n], x) for n, x in after["sealed"].items())


def test_steps_and_seals_are_in_place() -> None:
    """No copy of a pool in any program: its bytes are those of the pools it was given."""
    format = formats.get("test-rounded")
    kv = jax.eval_shape(lambda: allocate(kv_shapes([GROUP], [format], [(512, 512)], SLOTS, LENGTH)))
    smallest = min(
        x.size * x.dtype.itemsize for x in (*jax.tree.leaves(kv.pools[0]["open"]), kv.pools[0]["sealed"]["k"])
    )
    tokens = lambda n, h: jax.ShapeDtypeStruct((n, h, DIM), jnp.float32)  # noqa: E731
    ints = lambda n: (jax.ShapeDtypeStruct((n,), jnp.int32),) * 3  # noqa: E731
    n = ROWS + TILES * PAGE_TOKENS
    args = (tokens(n, HEADS), tokens(n, KV_HEADS), tokens(n, KV_HEADS), ints(ROWS), ints(TILES))
    compiled = step.lower(kv, *args, spec=Spec()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < smallest
    sealing = seal.lower(kv, jax.ShapeDtypeStruct((2, 4), jnp.int32)).compile()
    assert sealing.memory_analysis().temp_size_in_bytes < smallest
    assert sealing.memory_analysis().alias_size_in_bytes >= 2 * smallest


def test_both_classes_travel() -> None:
    format = formats.get("test-rounded")
    host = whole(Host(format))
    for cls, index in ((0, 0), (1, 2)):
        page = host.page(cls, 1, index)
        record = export_page(format, cls, page, b"chain")
        header, back = import_page(format, GROUP, record)
        assert header.cls == cls
        empty = jax.tree.map(jnp.zeros_like, format.part(host.kv.pools[0], cls))
        pool = scatter_pages(empty, jnp.array([5], jnp.int32), jax.tree.map(jnp.asarray, back))
        again = gather_pages(pool, jnp.array([5], jnp.int32))
        same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), again, page)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "option",
    [{"sink_pages": -1}, {"residual_pages": 3}, {"residual_pages": 0}, {"dtype": "int8"}, {"key_rotation": "dct"}],
)
def test_options_out_of_range_are_named(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(option.values())))):
        formats.get("test-rounded", **option)
