"""The static shapes of an engine: slots, rows, tiles and the buckets that programs are compiled for. Knows no jax."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.types import PAGE_TOKENS

INVARIANT_MIN_ROWS = 16
"""XLA's row reductions on CPUs (softmax, log-sum-exp) change their last bits below this number of rows."""


@dataclass(frozen=True)
class EngineShape:
    """`slots` sequences of up to `max_len` tokens; a step has up to `decode[-1]` rows of `q` tokens and `tiles[-1]`
    prefill tiles of `page_tokens` tokens, as many as a page has. `decode` and `tiles` are the bucket sizes, rising. No
    bucket but the largest has fewer than `min_rows` rows."""

    slots: int
    max_len: int
    q: int
    decode: tuple[int, ...]
    tiles: tuple[int, ...]
    min_rows: int = 1
    page_tokens: int = PAGE_TOKENS

    @property
    def max_pages(self) -> int:
        """Block-table entries of a sequence."""
        return -(-self.max_len // self.page_tokens)

    @property
    def hidden_rows(self) -> int:
        """Rows of the activation buffer between forward and head."""
        return self.decode[-1] * self.q + self.budget

    @property
    def budget(self) -> int:
        """Tokens that the largest step computes."""
        return self.tiles[-1] * self.page_tokens

    @property
    def mixed_decode(self) -> tuple[int, ...]:
        """Decode widths compiled together with tiles: a small one and the largest, so that buckets add."""
        small = next((d for d in self.decode if d >= 4), self.decode[-1])
        return tuple(sorted({small, self.decode[-1]}))

    @property
    def head_rows(self) -> tuple[int, ...]:
        """Row buckets of `head`: the decode widths, and one that holds every row a step can sample."""
        largest = self.decode[-1] + self.tiles[-1]
        return tuple(sorted({*(d for d in self.decode if d >= self.min_rows), largest}))

    def forward_buckets(self) -> tuple[tuple[int, int], ...]:
        """Every declared (decode rows, tiles), in the order in which it is best to have them."""
        pure = [(d, 0) for d in reversed(self.decode)]
        mixed = [(d, n) for n in reversed(self.tiles) for d in reversed(self.mixed_decode)]
        return (*pure, *mixed)

    def covering_buckets(self) -> tuple[tuple[int, int], ...]:
        """The buckets that any step fits: compiled before the engine is ready."""
        return (self.decode[-1], 0), (self.decode[-1], self.tiles[-1])

    def holding(self, rows: int, tiles: int) -> tuple[tuple[int, int], ...]:
        """The buckets that hold a step of `rows` decode rows and `tiles` tiles, the cheapest first."""
        if not tiles:
            return tuple((d, 0) for d in self.decode if d >= rows)
        enough = fit(self.mixed_decode, rows)
        return tuple((enough, n) for n in self.tiles if n >= tiles)

    @property
    def bounds(self) -> dict[str, Any]:
        """The fields of the scheduler's limits that follow from these shapes."""
        return {
            "max_num_seqs": self.slots,
            "max_num_batched_tokens": self.budget + self.decode[-1] * self.q,
            "max_model_len": self.max_len,
            "max_tiles": self.tiles[-1],
            "tile_buckets": self.tiles,
            "max_decode_rows": self.decode[-1],
            "q": self.q,
            "page_tokens": self.page_tokens,
        }

    @classmethod
    def of(cls, config: EngineConfig, max_len: int, on_gpu: bool) -> EngineShape:
        """The shape that a config asks for.

        Raises:
            ConfigError: an option that contradicts another.
        """
        slots = config.scheduler.max_num_seqs or (256 if on_gpu else 32)
        budget = config.scheduler.max_num_batched_tokens or (2048 if on_gpu else 512)
        page = config.cache.block_size
        if budget < page:
            raise ConfigError(
                f"--max-num-batched-tokens {budget} must be at least --block-size {page}: one prefill tile"
            )
        tiles_max = min(budget // page, -(-max_len // page) * slots)
        q = 1 + config.speculative.num_speculative_tokens if config.speculative.speculative_method else 1
        decode = _buckets("decode-buckets", config.runtime.decode_buckets, slots, ratio=4)
        tiles = _buckets("tile-buckets", config.runtime.tile_buckets, tiles_max, ratio=2)
        min_rows = INVARIANT_MIN_ROWS if config.runtime.batch_invariant else 1
        decode = tuple(d for d in decode if d >= min_rows or d == decode[-1])
        return cls(slots=slots, max_len=max_len, q=q, decode=decode, tiles=tiles, min_rows=min_rows, page_tokens=page)


def _buckets(name: str, given: tuple[int, ...], largest: int, ratio: int) -> tuple[int, ...]:
    if given:
        if min(given) < 1 or max(given) > largest:
            raise ConfigError(f"--{name} {' '.join(map(str, given))} must lie between 1 and {largest}")
        return tuple(sorted({*given, largest}))
    sizes = {largest}
    size = 1
    while size < largest:
        sizes.add(size)
        size *= ratio
    return tuple(sorted(sizes))


def fit(sizes: tuple[int, ...], needed: int) -> int:
    """The smallest bucket that holds `needed`."""
    return sizes[bisect_left(sizes, needed)]
