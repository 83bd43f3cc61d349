"""Uncertainty of scores: bootstrap over documents, since turns of one document are not independent. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval (95 %, percentiles)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(scores: Sequence[float], clusters: Sequence[object], seed: int = 0) -> Interval:
    """The mean of `scores`; whole `clusters` (documents) are resampled."""
    return _interval(np.asarray(scores, np.float64), clusters, seed)


def paired_interval(
    scores: Sequence[float], base: Sequence[float], clusters: Sequence[object], seed: int = 0
) -> Interval:
    """The mean of `scores - base`, item by item on the same items.

    Pairing removes what is hard about the items themselves: the interval of a difference is mostly much narrower than
    the two scores' own, and one that excludes 0 is a difference.
    """
    return _interval(np.asarray(scores, np.float64) - np.asarray(base, np.float64), clusters, seed)


def _interval(values: np.ndarray, clusters: Sequence[object], seed: int) -> Interval:
    if not len(values):
        raise ValueError("there are no scores to average")
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} scores for {len(clusters)} cluster names")
    number = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    owner = np.asarray([number[name] for name in clusters])
    sums = np.bincount(owner, values, len(number))
    sizes = np.bincount(owner, minlength=len(number))
    drawn = np.random.default_rng(seed).integers(len(number), size=(RESAMPLES, len(number)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))
