"""What is simulated: the shapes, page pools and step cost of one replica. Knows no trace and no time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec import structs

from jaxserve.config import EngineConfig
from jaxserve.engine.shapes import EngineShape
from jaxserve.scheduler import Limits
from jaxserve.sim.cost import CostModel, Published
from jaxserve.types import PAGE_TOKENS, PageClass, PageClasses

PUBLISHED_KV_TOKENS = 56_000
"""What an A100-80GB has left for KV beside the weights of OPT-13B."""
PUBLISHED_BYTES_PER_TOKEN = 819_200
"""OPT-13B: 40 layers, keys and values, 5120 numbers of 16 bits."""


@dataclass(frozen=True)
class Machine:
    """One replica. `host_s`: time of the engine's loop between two steps that the device does not hide."""

    name: str
    shape: EngineShape
    groups: tuple[PageClasses, ...]
    cost: CostModel
    lag: int = 1
    host_s: float = 0.0
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.shape.q != 1:
            raise ValueError(f"{self.name} decodes {self.shape.q} tokens a row; simulated rows are one token wide")

    @property
    def limits(self) -> Limits:
        return Limits(**self.shape.bounds, enable_prefix_caching=self.prefix_caching, lag=self.lag)

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

    def reshaped(self, **options: object) -> Machine:
        """The same machine with other engine options, by the names they have on the command line (`max_num_seqs`,
        `max_num_batched_tokens`, `decode_buckets`, `tile_buckets`).

        Raises:
            ConfigError: an option that does not exist or contradicts another.
        """
        shape = self.shape
        given = {
            "max_num_seqs": shape.slots,
            "max_num_batched_tokens": shape.budget,
            **options,
        }
        return replace(self, shape=EngineShape.of(EngineConfig.of(**given), shape.max_len, on_gpu=True))


def published(
    max_model_len: int = 16_384,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    kv_tokens: int = PUBLISHED_KV_TOKENS,
) -> Machine:
    """An A100 serving OPT-13B, with the cost that DistServe published."""
    config = EngineConfig.of(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    page = PageClass(name="kv", pages=kv_tokens // PAGE_TOKENS, bytes=PAGE_TOKENS * PUBLISHED_BYTES_PER_TOKEN)
    return Machine(
        name="A100, OPT-13B (published fit)",
        shape=EngineShape.of(config, max_model_len, on_gpu=True),
        groups=(PageClasses(classes=(page,)),),
        cost=Published(),
    )
