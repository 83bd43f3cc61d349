"""What is simulated: the shapes, page pools and step cost of one replica. Knows no trace and no time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from jaxserve.config import EngineConfig
from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import Limits
from jaxserve.sim.cost import CostModel, Published
from jaxserve.sim.link import LINKS, Link
from jaxserve.types import PAGE_TOKENS, PageClass, PageClasses

PUBLISHED_KV_TOKENS = 56_000
"""What an A100-80GB has left for KV beside the weights of OPT-13B."""
PUBLISHED_BYTES_PER_TOKEN = 819_200
"""OPT-13B: 40 layers, keys and values, 5120 numbers of 16 bits."""

SHAPE_OPTIONS = ("max_num_seqs", "max_num_batched_tokens")
LIMIT_OPTIONS = ("enable_prefix_caching", "pin_share", "pin_ttl_s")
HOST_OPTIONS = ("host_kv_tokens", "host_link_gbps", "host_copies")
"""Host memory to swap to, in tokens of each pool; the rate of copies to and from it, in GB/s a direction; and how they
are made, by the names in link.py."""
OPTIONS = (*SHAPE_OPTIONS, *LIMIT_OPTIONS, *HOST_OPTIONS)


@dataclass(frozen=True)
class Machine:
    """One replica. `host_s`: time of the engine's loop between two steps that the device does not hide."""

    name: str
    shape: EngineShape
    limits: Limits
    groups: tuple[PageClasses, ...]
    cost: CostModel
    host_s: float = 0.0
    link: Link = LINKS["gathered"]

    def __post_init__(self) -> None:
        if self.limits.page_tokens != PAGE_TOKENS:
            raise ValueError(
                f"{self.name} has pages of {self.limits.page_tokens} tokens; simulated pages have {PAGE_TOKENS}"
            )
        if self.shape.q != 1:
            raise ValueError(f"{self.name} decodes {self.shape.q} tokens a row; simulated rows are one token wide")

    @property
    def kv_tokens(self) -> int:
        """Tokens that the smallest pool holds."""
        return min(c.pages for group in self.groups for c in group.classes) * PAGE_TOKENS

    def with_kv_tokens(self, tokens: int) -> Machine:
        """The same machine with pools of `tokens` each."""
        pages = max(1, tokens // PAGE_TOKENS)
        groups = tuple(
            structs.replace(group, classes=tuple(structs.replace(c, pages=pages) for c in group.classes))
            for group in self.groups
        )
        return replace(self, groups=groups)

    def with_options(self, **options: Any) -> Machine:
        """The same machine with other engine options, by the names in OPTIONS.

        Raises:
            ConfigError, ValueError: an option that contradicts another.
        """
        sizes = {"max_num_seqs": self.shape.slots, "max_num_batched_tokens": self.shape.budget}
        asked = {**sizes, **{name: options[name] for name in SHAPE_OPTIONS if name in options}}
        shape = self.shape
        if asked != sizes:
            if not isinstance(self.cost, Published):
                raise ValueError(f"{self.name} holds for the shapes it was taken with: profile with {options}")
            shape = EngineShape.of(EngineConfig.of(**asked), shape.max_len, on_gpu=True)
        names = ("lag", "watermark", "host_pages", "host_link_bytes_s", *LIMIT_OPTIONS)
        kept: dict[str, Any] = {name: getattr(self.limits, name) for name in names}
        changed: dict[str, Any] = {name: options[name] for name in LIMIT_OPTIONS if name in options}
        if "host_kv_tokens" in options:
            pools = sum(len(group.classes) for group in self.groups)
            changed["host_pages"] = (int(options["host_kv_tokens"]) // PAGE_TOKENS,) * pools
        if "host_link_gbps" in options:
            changed["host_link_bytes_s"] = options["host_link_gbps"] * 1e9 / 8
        link = self.link
        if "host_copies" in options:
            name = options["host_copies"]
            if name not in LINKS:
                raise ValueError(f"host_copies={name} is none of {', '.join(LINKS)}")
            link = LINKS[name]
        return replace(self, shape=shape, limits=Limits(**shape.bounds, **kept | changed), link=link)


def published(
    max_model_len: int = 16_384,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    kv_tokens: int = PUBLISHED_KV_TOKENS,
) -> Machine:
    """An A100 serving OPT-13B, with the cost that DistServe published."""
    config = EngineConfig.of(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    shape = EngineShape.of(config, max_model_len, on_gpu=True)
    page = PageClass(name="kv", pages=kv_tokens // PAGE_TOKENS, bytes=PAGE_TOKENS * PUBLISHED_BYTES_PER_TOKEN)
    return Machine(
        name="A100, OPT-13B (published fit)",
        shape=shape,
        limits=Limits(**shape.bounds),
        groups=(PageClasses(classes=(page,)),),
        cost=Published(),
    )
