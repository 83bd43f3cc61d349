"""How many channels each layer keeps: a path from all to few, and the point on it that a bound allows.

Knows no model: the loss is a function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from jaxserve.checkpoint.kv_calibration import Channels, share

Lose = Callable[[Channels], float]
"""The loss of a choice, in nats a token."""


def path(
    layers: int, head_dim: int, sizes: Sequence[int], lose: Lose, done: Callable[[], object] = lambda: None
) -> list[Channels]:
    """Choices from all channels down to the fewest, each one step of one layer's keys or values below the last.

    The next step is always the one that costs least for each channel saved. Costs are measured one layer and one side
    at a time, everything else whole: `layers * 2 * (len(sizes) - 1)` losses, after each of which `done` is called.
    `sizes`: numbers of channels that there may be, among them `head_dim`.
    """
    falling = sorted(set(sizes), reverse=True)
    everything = ((head_dim, head_dim),) * layers
    base = lose(everything)
    cost: dict[tuple[int, int, int], float] = {}
    for layer, side in itertools.product(range(layers), range(2)):
        cost[layer, side, head_dim] = worst = 0.0
        for size in falling[1:]:
            # Fewer channels cannot be better than more: a negative cost is chance.
            worst = max(worst, lose(_with(everything, layer, side, size)) - base)
            cost[layer, side, size] = worst
            done()

    def price(step: tuple[int, int]) -> float:
        layer, side = step
        size = current[layer][side]
        less = falling[falling.index(size) + 1]
        return (cost[layer, side, less] - cost[layer, side, size]) / (size - less)

    current, found = everything, [everything]
    while steps := [
        (n, side) for n, side in itertools.product(range(layers), range(2)) if current[n][side] > falling[-1]
    ]:
        layer, side = min(steps, key=price)
        less = falling[falling.index(current[layer][side]) + 1]
        current = _with(current, layer, side, less)
        found.append(current)
    return found


def fewest(choices: Sequence[Channels], allowed: Callable[[Channels], bool], head_dim: int) -> Channels:
    """The one of `choices` with the fewest channels that is allowed, tried in that order; the one with the most always
    is."""
    rising = sorted(set(choices), key=lambda choice: (share(choice, head_dim), choice))
    return next((choice for choice in rising[:-1] if allowed(choice)), rising[-1])


def in_groups(channels: Channels, groups: int, head_dim: int) -> Channels:
    """`channels` with at most `groups` different pairs: the two that cost least to join become the larger of both, side
    by side, until there are few enough. Layers with the same pair share pools and programs."""
    while len(kinds := sorted(set(channels))) > groups:

        def joined(a: tuple[int, int], b: tuple[int, int]) -> Channels:
            both = (max(a[0], b[0]), max(a[1], b[1]))
            return tuple(both if pair in (a, b) else pair for pair in channels)  # noqa: B023

        channels = min((joined(a, b) for a, b in itertools.combinations(kinds, 2)), key=lambda c: share(c, head_dim))
    return channels


def _with(channels: Channels, layer: int, side: int, size: int) -> Channels:
    pair = list(channels[layer])
    pair[side] = size
    return (*channels[:layer], (pair[0], pair[1]), *channels[layer + 1 :])
