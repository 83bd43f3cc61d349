"""Layers with equal KV into groups: a group has one window and one format. Knows no model and no options."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from jaxserve.kv.format import KVFormat
from jaxserve.types import KVGroup


def split_groups(
    groups: Sequence[KVGroup], layer_formats: Sequence[KVFormat]
) -> tuple[tuple[KVGroup, ...], tuple[KVFormat, ...]]:
    """The groups of a model, split so that each has one format; and that format of each.

    `layer_formats[i]`: of layer i. Layers of a group whose formats are equal values stay together, so a format whose
    parameters differ by layer yields groups as two formats do. Groups are in the order of their first layer.
    """
    members: dict[tuple[int, KVFormat], list[int]] = {}
    for layer, number in sorted((layer, number) for number, group in enumerate(groups) for layer in group.layers):
        members.setdefault((number, layer_formats[layer]), []).append(layer)
    split = [msgspec.structs.replace(groups[number], layers=tuple(layers)) for (number, _), layers in members.items()]
    return tuple(split), tuple(format for _, format in members)
