"""The KV format seam: what a format owns and how one is found by name. Knows no model, no scheduler, no transport."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kv.meta import Rows
from jaxserve.kv.reading import ReadingRule
from jaxserve.types import KVGroup
from pallas_kernels.merge import Attended

Pool = Any
"""The arrays of one group: a pytree whose leaves have the pages of one class as their first axis."""


Layer = int | jax.Array
"""Index of a layer within its group: static when depth is unrolled, an int32 scalar under a scan."""


class AttentionSpec(Protocol):
    """What attention needs to know of a layer. Models bring their own frozen value."""

    @property
    def scale(self) -> float: ...
    @property
    def window(self) -> int | None: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True)
class PageKind:
    """A page class as its format declares it, before the number of pages is known."""

    name: str
    bytes: int
    """Of one page, all layers of the group."""


class KVFormat:
    """How the KV of a group is stored, written and read.

    A format is a frozen dataclass. Its pool is a pytree of arrays; every array's first axis is the pages of one class
    and `kv_heads` is the axis that tensor parallelism shards, wherever it stands (`heads_axis`). Scheduling, prefix
    sharing, tiers and transport never ask which format they carry.

    Invariants: a pool holds finite values only (a masked key enters P V as 0 * value); `write` of a row or tile changes
    no byte outside the positions it names; a page, once all its positions are written, is not written again.
    """

    name: ClassVar[str] = ""
    """Set by `formats.register`."""
    sink_pages: int = 0
    residual_pages: int = 0

    @property
    def rule(self) -> ReadingRule | None:
        """Two classes: which pages are read in which form."""
        return None

    def kinds(self, group: KVGroup) -> tuple[PageKind, ...]:
        """The page classes of `group`: one if tokens are written in final form, two if full pages are sealed."""
        raise NotImplementedError

    def payload(self, group: KVGroup, pages: tuple[int, ...]) -> Any:
        """Pytree of `jax.ShapeDtypeStruct`: the pool of `group` with `pages[c]` pages of class c."""
        raise NotImplementedError

    def part(self, pool: Any, cls: int) -> Any:
        """The arrays of `pool` (or of a pytree like it) that hold pages of class `cls`. One class: all of them."""
        return pool

    def with_part(self, pool: Any, cls: int, part: Any) -> Any:
        """`pool` with `part` in place of the arrays of class `cls`."""
        return part

    def heads_axis(self, group: KVGroup) -> Any:
        """Pytree like `payload`: the axis of each array that holds kv_heads."""
        raise NotImplementedError

    def pages_held(self, pages: int) -> tuple[int, ...]:
        """Pages of each class that a sequence holds while `pages` of its pages are live."""
        raise NotImplementedError

    def write_rows(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, rows: Rows) -> Pool:
        """Stores k, v [rows, q_tokens, kv_heads, head_dim] of decode rows at their positions."""
        raise NotImplementedError

    def write_tiles(self, pool: Pool, layer: Layer, k: jax.Array, v: jax.Array, tiles: Rows) -> Pool:
        """Stores k, v [tiles, page_tokens, kv_heads, head_dim] of prefill tiles, each within one page."""
        raise NotImplementedError

    def attend_rows(self, q: jax.Array, pool: Pool, layer: Layer, rows: Rows, spec: AttentionSpec) -> Attended:
        """Attention of decode rows, q [rows, q_tokens, heads, head_dim], over all positions up to their own."""
        raise NotImplementedError

    def attend_tiles(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, layer: Layer, tiles: Rows, spec: AttentionSpec
    ) -> Attended:
        """Attention of prefill tiles, q [tiles, page_tokens, heads, head_dim], after all writes of the layer.

        k, v: what `write_tiles` was given, for formats that read a tile's own page before it is quantized.
        """
        raise NotImplementedError

    def finite(self, page: Any) -> bool:
        """Whether the host arrays of a page hold finite values only, as a pool must. uint16 is bfloat16 in every pool:
        nothing else is held in it. A format whose codes are floats held as other integers says so itself."""
        leaves = (leaf.view(jnp.bfloat16) if leaf.dtype == np.uint16 else leaf for leaf in jax.tree.leaves(page))
        floats = (leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
        return all(bool(np.isfinite(leaf.astype(np.float32)).all()) for leaf in floats)

    def seal(self, pool: Pool, src: jax.Array, dst: jax.Array) -> Pool:
        """Two classes: pages dst int32 [n] of class 1 are made from the full pages src of class 0; ids out of range
        are skipped. A format with one class is never asked to."""
        raise NotImplementedError


FLAGS = {
    "sink_pages": "--kv-sink-pages",
    "residual_pages": "--kv-residual-pages",
    "key_rotation": "--kv-key-rotation",
    "quant_group": "--kv-quant-group",
    "prefill_exact": "--prefill-exact",
}
"""How users write the options of formats."""


class Registry:
    """KV formats by name."""

    def __init__(self) -> None:
        self._formats: dict[str, Callable[..., KVFormat]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[type[KVFormat]], type[KVFormat]]:
        """Class decorator: the format is known as `name`, and found by its `aliases` too. ValueError if a name is
        taken."""

        def add(cls: type[KVFormat]) -> type[KVFormat]:
            for taken in {name, *aliases} & set(self.choices()):
                raise ValueError(f"KV format {taken!r} is registered twice.")
            cls.name = name
            self._formats[name] = cls
            self._aliases |= dict.fromkeys(aliases, name)
            return cls

        return add

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._formats))

    def choices(self) -> tuple[str, ...]:
        """Names and aliases."""
        return tuple(sorted((*self._formats, *self._aliases)))

    def get(self, name: str, **options: Any) -> KVFormat:
        """The format called `name`. ValueError, with the known names, if there is none, or if it lacks an option."""
        for option in sorted(set(options) - self.options(name)):
            having = [other for other in self.names() if option in self.options(other)]
            flag = FLAGS.get(option, option)
            raise ValueError(f"--kv-cache-dtype {name} has no {flag}; these have: {', '.join(having)}.")
        return self._kind(name)(**options)

    def options(self, name: str) -> frozenset[str]:
        """What `get` takes for the format called `name`. ValueError if there is none."""
        return frozenset(f.name for f in dataclasses.fields(self._kind(name)))  # type: ignore[arg-type]

    def _kind(self, name: str) -> Callable[..., KVFormat]:
        if name not in self.choices():
            raise ValueError(f"--kv-cache-dtype {name} is not known; choose one of {', '.join(self.choices())}.")
        return self._formats[self._aliases.get(name, name)]


formats = Registry()
