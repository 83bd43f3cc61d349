"""Token embedding and the projection to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.layers.param import param
from jaxserve.quant import LinearContext, QTensor, linear, take


class Embedding(nnx.Module):
    """Leaves: table [vocab, hidden], and head [hidden, vocab] unless the model ties them."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        self.config = config
        self.table = param((config.vocab_size, config.hidden), ("vocab", "embed"), dtype, "embedding")
        if not config.tie_embeddings:
            self.head = param((config.hidden, config.vocab_size), ("embed", "vocab"), dtype, "matrix")

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens [T] int32 -> [T, hidden]. Ids outside the vocabulary are clipped: hosts check them before."""
        x = take(self.table.get_value(), tokens)
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def logits(self, hidden: jax.Array, ctx: LinearContext) -> jax.Array:
        """hidden [R, hidden] after the final norm -> [R, vocab] float32."""
        weight = self.table.get_value() if self.config.tie_embeddings else self.head.get_value()
        if self.config.tie_embeddings and not isinstance(weight, QTensor):
            weight = weight.T
        logits = linear(hidden, weight, ctx=ctx, out_dtype=jnp.float32)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
