"""What a calibration is asked for. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.config import ConfigError

STEP = 16
"""Channels come in multiples of the smallest dimension of a product on tensor cores."""


@dataclass(frozen=True)
class CalibrateOptions:
    """`loss_bound`: rise of perplexity on held-out text that is allowed, in percent. `keep`: share of the channels to
    keep, instead. `channels`: numbers of channels that a head may keep; empty: all multiples of 16. `groups`: most
    different choices among the layers. `tokens`, `held_out`: of the text, to calibrate with and to measure on, in
    windows of `window`."""

    loss_bound: float = 0.5
    keep: float | None = None
    channels: tuple[int, ...] = ()
    groups: int = 4
    tokens: int = 16384
    held_out: int = 8192
    window: int = 1024

    def __post_init__(self) -> None:
        if self.loss_bound < 0:
            raise ConfigError(f"--loss-bound {self.loss_bound} must be at least 0 percent")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"--keep {self.keep} must be more than 0 and at most 1")
        if self.groups < 1:
            raise ConfigError(f"--groups {self.groups} must be at least 1")
        if self.window < 2 or self.tokens < self.window or self.held_out < self.window:
            raise ConfigError(
                f"--window {self.window} must be at least 2 and fit into --tokens {self.tokens} and "
                f"--held-out {self.held_out}"
            )

    def sizes(self, head_dim: int) -> Sequence[int]:
        """Numbers of channels to choose from, `head_dim` among them.

        Raises:
            ConfigError: a number that no head of this model can keep.
        """
        for size in self.channels:
            if size % STEP or not 0 < size <= head_dim:
                raise ConfigError(
                    f"--channels {size}: a head of this model keeps a multiple of {STEP} up to {head_dim}"
                )
        if head_dim % STEP:
            raise ConfigError(
                f"heads of {head_dim} channels do not divide into blocks of {STEP}: ZeroC cannot cut them"
            )
        return tuple(sorted({*(self.channels or range(STEP, head_dim, STEP)), head_dim}))
