"""Where a leaf of the parameter tree lies in a checkpoint: names and layouts as data. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.fused import mlp_blocks, qkv_widths

Path = tuple[str | int, ...]
"""Keys from the root of the parameter tree to a leaf."""


def at(tree: Any, path: Path) -> Any:
    """What lies at `path` of a nested dict."""
    for key in path:
        tree = tree[key]
    return tree


@dataclass(frozen=True)
class Copy:
    """The leaf is its one source, dimension for dimension."""


@dataclass(frozen=True)
class Stack:
    """The leaf [n, ...] stacks its n sources."""


@dataclass(frozen=True)
class Columns:
    """The leaf [in, out] interleaves the columns of its sources, which checkpoints store as [out, in].

    There are `blocks` blocks; each takes widths[i] columns of source i, in order. A bias [out] is laid out the same.
    """

    blocks: int
    widths: tuple[int, ...]


Layout = Copy | Stack | Columns


@dataclass(frozen=True)
class Leaf:
    """One leaf: its path, the checkpoint tensors it is made of, and how."""

    path: Path
    sources: tuple[str, ...]
    layout: Layout


def decoder_leaves(config: DecoderConfig, prefix: str, head: str) -> Iterator[Leaf]:
    """Leaves outside the layers, under Hugging Face's usual names."""
    yield Leaf(("embedding", "table"), (prefix + "embed_tokens.weight",), Copy())
    yield Leaf(("norm", "weight"), (prefix + "norm.weight",), Copy())
    if not config.tie_embeddings:
        yield Leaf(("embedding", "head"), (head,), Columns(1, (config.vocab_size,)))


def projection_leaves(config: DecoderConfig, source: str, target: Path) -> Iterator[Leaf]:
    """Leaves of a layer's attention and MLP (norms around them excepted), under Hugging Face's usual names."""
    attention, mlp = source + "self_attn.", source + "mlp."
    qkv = Columns(config.kv_heads, qkv_widths(config))
    blocks = mlp_blocks(config)
    gate_up = Columns(blocks, (config.intermediate // blocks,) * 2)
    whole = Columns(1, (config.hidden,))

    def leaf(part: str, name: str, prefix: str, projections: tuple[str, ...], kind: str, layout: Layout) -> Leaf:
        return Leaf((*target, part, name), tuple(f"{prefix}{p}.{kind}" for p in projections), layout)

    yield leaf("attention", "qkv", attention, ("q_proj", "k_proj", "v_proj"), "weight", qkv)
    yield leaf("attention", "o", attention, ("o_proj",), "weight", whole)
    yield leaf("mlp", "gate_up", mlp, ("gate_proj", "up_proj"), "weight", gate_up)
    yield leaf("mlp", "down", mlp, ("down_proj",), "weight", whole)
    if config.qk_norm:
        yield leaf("attention", "qk_norm", attention, ("q_norm", "k_norm"), "weight", Stack())
    if config.qkv_bias:
        yield leaf("attention", "qkv_bias", attention, ("q_proj", "k_proj", "v_proj"), "bias", qkv)
    if config.o_bias:
        yield leaf("attention", "o_bias", attention, ("o_proj",), "bias", Copy())
    if config.mlp_bias:
        yield leaf("mlp", "gate_up_bias", mlp, ("gate_proj", "up_proj"), "bias", gate_up)
        yield leaf("mlp", "down_bias", mlp, ("down_proj",), "bias", Copy())
