"""A model as the engine, the training script and the checkpoint code see it: static graph here, parameters outside.

Knows nothing of pages, batches or devices: attention is the caller's `attend`, parameters are a plain nested dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import AttentionSpec, DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.layers.attention import Attend
from jaxserve.models.layers.embedding import Embedding
from jaxserve.models.registry import build
from jaxserve.quant import LinearContext, QTensor, weight_format
from jaxserve.types import KVGroup

Params = dict[Any, Any]
"""Nested dict of arrays and QTensors; `layers` has one dict for each layer index."""

_PLAIN = LinearContext()


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static graph of a module and its parameters as a plain nested dict."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


@lru_cache(maxsize=8)
def _abstract(config: DecoderConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.State]:
    """Building takes Python time for each parameter, and loading asks for it several times."""
    return nnx.split(build(config, dtype))


@lru_cache(maxsize=8)
def _abstract_embedding(config: DecoderConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.split(Embedding(config, dtype))[0]


def _attend_first(attend: Attend, count: int) -> Attend:
    """`attend` for the first `count` rows; the rows after them are padding that it must not see."""

    def padded(layer: int, kv: Any, *qkv: jax.Array) -> tuple[Any, jax.Array]:
        kv, o = attend(layer, kv, *(rows[:count] for rows in qkv))
        return kv, jnp.pad(o, ((0, qkv[0].shape[0] - count), (0, 0), (0, 0)))

    return padded


@dataclass(frozen=True)
class Model:
    """Pure functions over a parameter tree.

    Attributes:
        config: what the model is.
        dtype: of parameters and activations.
        graph: the NNX graph; `params` of every method is a tree of the shape that `abstract_params` shows, in which
            matrices may be QTensors.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    graph: nnx.GraphDef = field(repr=False)

    @classmethod
    def from_config(cls, config: DecoderConfig, dtype: Any) -> Model:
        return cls(config, jnp.dtype(dtype), _abstract(config, jnp.dtype(dtype))[0])

    def bind(self, params: Params) -> Decoder:
        """The module with these parameters. For use while tracing: it costs Python time for each parameter."""
        return nnx.merge(self.graph, params)

    def forward(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        kv: Any,
        attend: Attend,
        ctx: LinearContext = _PLAIN,
        schedule: Sequence[int] | None = None,
        read: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """tokens, positions [T] int32 -> (hidden [T, hidden] after the final norm, kv).

        Rows at position -1 are padding: they hold anything finite afterwards, and kernels that can leave them out do.

        `attend(layer, kv, q, k, v) -> (kv, o)` receives q [T, heads, head_dim] and k, v [T, kv_heads, head_dim] after
        RoPE and qk-norm, and must apply `attention_spec(layer)`. `kv` is any pytree; it is threaded through the layers.
        `schedule` lists the layers to run, in order; by default all, once. `read` bool [T]: whose hidden is read after;
        by default that of all. Of the others only the keys and values are wanted.
        """
        module = self.bind(params)
        layers = range(self.config.layers) if schedule is None else schedule
        count = tokens.shape[0]
        padding = -count % (ctx.invariant_rows or 1)
        if padding:
            # Norms need the rows as well: below 64, XLA's row reductions on CPUs have other bits.
            tokens, positions = jnp.pad(tokens, (0, padding)), jnp.pad(positions, (0, padding), constant_values=-1)
            attend = _attend_first(attend, count)
            read = None if read is None else jnp.pad(read, (0, padding))
        kv, x = module.run_layers(module.embedding(tokens), positions, read, kv, attend, ctx, layers)
        return module.norm(x)[:count], kv

    def logits(self, params: Params, hidden: jax.Array, ctx: LinearContext = _PLAIN) -> jax.Array:
        """hidden [R, hidden] as `forward` returns it -> [R, vocab] float32. Reads `head_params` alone."""
        graph = _abstract_embedding(self.config, self.dtype)
        embedding: Embedding = nnx.merge(graph, params["embedding"])
        return embedding.logits(hidden, ctx)

    def head_params(self, params: Params) -> Params:
        """The part of a parameter tree that `logits` reads."""
        return {"embedding": params["embedding"]}

    def attention_spec(self, layer: int) -> AttentionSpec:
        return self.config.attention_spec(layer)

    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers that share a KV shape and a window, in the order of their first layer."""
        c = self.config
        members: dict[int | None, list[int]] = {}
        for layer, window in enumerate(c.windows):
            members.setdefault(window, []).append(layer)
        return tuple(
            KVGroup(layers=tuple(layers), kv_heads=c.kv_heads, head_dim=c.head_dim, window=window)
            for window, layers in members.items()
        )

    def abstract_params(self, quantization: str | None = None) -> Params:
        """The parameter tree as jax.ShapeDtypeStruct. With `quantization`, the name of a weight format, the matrices of
        the layers are QTensors; embedding, head, norms and biases never are."""
        plain = nnx.to_pure_dict(_abstract(self.config, self.dtype)[1])
        if quantization is None:
            return plain
        quantize = weight_format(quantization).quantize

        def leaf(value: jax.ShapeDtypeStruct, init: str) -> Any:
            return jax.eval_shape(quantize, value) if init in ("matrix", "residual") else value

        return plain | {"layers": jax.tree.map(leaf, plain["layers"], self._metadata("init")["layers"])}

    def logical_axes(self, params: Params | None = None) -> Params:
        """Tree of the shape of `params` whose leaves are tuples of logical axis names, one for each dimension.

        Names: embed, heads, mlp, vocab; norm and None are never sharded. Without `params`: of the unquantized tree.
        """
        axes = self._metadata("axes")
        if params is None:
            return axes

        def fit(leaf: Any, names: tuple[str | None, ...]) -> Any:
            return weight_format(leaf.format).axes(leaf, names) if isinstance(leaf, QTensor) else names

        return jax.tree.map(fit, params, axes, is_leaf=lambda leaf: isinstance(leaf, QTensor))

    def init(self, key: jax.Array) -> Params:
        """Random parameters to train from: see `layers.param.param` for the distributions."""
        kinds = self._metadata("init")
        flat, tree = jax.tree.flatten(self.abstract_params())
        keys = jax.random.split(key, len(flat))
        start = [self._start(*each) for each in zip(keys, flat, jax.tree.leaves(kinds), strict=True)]
        return jax.tree.unflatten(tree, start)

    def _start(self, key: jax.Array, like: jax.ShapeDtypeStruct, kind: str) -> jax.Array:
        fan_in = like.shape[0] ** -0.5
        scale = {"matrix": fan_in, "residual": fan_in * (2 * self.config.layers) ** -0.5, "embedding": 0.02}
        if kind in scale:
            return (jax.random.normal(key, like.shape, jnp.float32) * scale[kind]).astype(like.dtype)
        if kind == "identity":
            return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)
        return jnp.full(like.shape, {"one": 1, "zero": 0}[kind], like.dtype)

    def _metadata(self, name: str) -> Params:
        state = _abstract(self.config, self.dtype)[1]
        return nnx.to_pure_dict(nnx.map_state(lambda _, p: getattr(p, name), state))
