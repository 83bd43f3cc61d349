"""What a step and an engine can hold. Knows nothing of sequences."""

from __future__ import annotations

import msgspec

from jaxserve.types import PAGE_TOKENS


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Static bounds that every plan respects.

    `max_num_batched_tokens` counts what a step costs, not what it is asked for: a prefill tile costs `page_tokens`
    tokens however few of them are used (padding is computed too), a decode row costs `q`.
    """

    max_num_seqs: int
    """Slots: sequences that hold device state at once."""
    max_num_batched_tokens: int
    max_model_len: int
    """Prompt and output tokens of a sequence together. The device must drop KV writes at and beyond it."""
    max_tiles: int
    """Prefill tiles in a step."""
    max_decode_rows: int
    tile_buckets: tuple[int, ...] = ()
    """Numbers of tiles that programs exist for; a step is padded up to one of them. Empty: any number."""
    q: int = 1
    """Tokens of a decode row: 1, or the verification width of speculation."""
    lag: int = 1
    """Steps planned whose StepDone has not been seen when the next plan is made: 0 or 1."""
    max_waiting: int | None = None
    """The front end refuses arrivals beyond this; the scheduler only reports `num_requests_waiting`."""
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    """Share of each pool that stays free when a sequence is admitted beside others: room for their growth."""
    pin_share: float = 0.5
    """Share of each pool that programs may hold between their turns against everybody else."""
    pin_ttl_s: float = 60.0
    """Seconds for which they may, unless the policy says otherwise. Afterwards their pages are cached like others."""

    page_tokens: int = PAGE_TOKENS
    """Of every KV page, and of a prefill tile."""
    host_pages: tuple[int, ...] = ()
    """Pages of host memory for each pool, group by group and class by class, to swap to. Empty: none."""
    host_link_bytes_s: float = 24e9
    """Rate of copies between device and host."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_tiles", "max_decode_rows", "q", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_batched_tokens < max(self.page_tokens, self.q):
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; one prefill tile of {self.page_tokens} "
                f"tokens and one decode row of {self.q} must fit"
            )
        if self.lag not in (0, 1):
            raise ValueError(f"lag is {self.lag}; plans are made at most one step ahead (0 or 1)")
        if not 0.0 <= self.watermark < 1.0:
            raise ValueError(f"watermark is {self.watermark}; it is a share of the pool in [0, 1)")
        if not 0.0 <= self.pin_share <= 1.0:
            raise ValueError(f"pin_share is {self.pin_share}; it is a share of the pool in [0, 1]")
        if self.pin_ttl_s < 0:
            raise ValueError(f"pin_ttl_s is {self.pin_ttl_s}; it is a number of seconds, at least 0")
