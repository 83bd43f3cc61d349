"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: pre-norm decoder layers. Their differences are in the config alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Fields, eos_ids, parse_rope, stored_dtype
from jaxserve.models.layers import native
from jaxserve.models.layers.attention import Attend, Attention
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rows import Rows
from jaxserve.models.names import Copy, Leaf, decoder_leaves, projection_leaves
from jaxserve.quant import LinearContext


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(config.hidden, config.rms_eps, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden, config.rms_eps, dtype)
        self.mlp = GatedMLP(config, dtype)

    def __call__(
        self, x: jax.Array, rows: Rows, layer: int, kv: Any, attend: Attend, ctx: LinearContext
    ) -> tuple[Any, jax.Array]:
        kv, heads = self.attention(x, self.attention_norm, rows, layer, kv, attend, ctx)
        y = native.feed_forward(x, heads, self.attention, self.mlp_norm, self.mlp, rows)
        if y is None:
            x = x + self.attention.output(heads, ctx)
            y = x + self.mlp(self.mlp_norm(x), ctx)
        return kv, y


def build(config: DecoderConfig, dtype: jnp.dtype) -> Decoder:
    return Decoder(config, dtype, LlamaLayer)


def leaves(config: DecoderConfig) -> tuple[Leaf, ...]:
    """Where each leaf lies in a Hugging Face checkpoint."""
    result = list(decoder_leaves(config, "model.", "lm_head.weight"))
    for i in range(config.layers):
        source, target = f"model.layers.{i}.", ("layers", i)
        result += projection_leaves(config, source, target)
        result += [
            Leaf((*target, "attention_norm", "weight"), (source + "input_layernorm.weight",), Copy()),
            Leaf((*target, "mlp_norm", "weight"), (source + "post_attention_layernorm.weight",), Copy()),
        ]
    return tuple(result)


def config_from_hf(architecture: str, hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json of one of the architectures of this file. ValueError for what it cannot honour."""
    f = Fields(architecture, hf)
    hidden, layers, heads = f.need("hidden_size"), f.need("num_hidden_layers"), f.need("num_attention_heads")
    head_dim = f.get("head_dim", None) or (128 if architecture == "Qwen3ForCausalLM" else hidden // heads)
    max_position = f.get("max_position_embeddings", 2048)
    qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = False if architecture == "MistralForCausalLM" or qwen2 else f.get("attention_bias", False)
    config = DecoderConfig(
        architecture=architecture,
        vocab_size=f.need("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=f.get("num_key_value_heads", None) or heads,
        head_dim=head_dim,
        intermediate=f.need("intermediate_size"),
        max_position=max_position,
        windows=_windows(architecture, f, layers),
        rope=parse_rope(f, max_position),
        rms_eps=f.get("rms_norm_eps", 1e-6),
        activation=f.activation("hidden_act", "silu"),
        tie_embeddings=f.get("tie_word_embeddings", False),
        qkv_bias=attention_bias or qwen2,
        o_bias=attention_bias,
        mlp_bias=f.get("mlp_bias", False) if architecture == "LlamaForCausalLM" else False,
        qk_norm=architecture == "Qwen3ForCausalLM",
        attention_scale=head_dim**-0.5,
        bos_token_id=f.get("bos_token_id", None),
        eos_token_ids=eos_ids(f.get("eos_token_id", None)),
        pad_token_id=f.get("pad_token_id", None),
        stored_dtype=stored_dtype(f),
        hf=f.json(),
    )
    f.finish()
    return config


def _windows(architecture: str, f: Fields, layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        return (None,) * layers
    window = f.get("sliding_window", None)
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    uses, first = f.get("use_sliding_window", False), f.get("max_window_layers", 28)
    kinds = f.layer_types(layers)
    if not uses or window is None:
        if kinds is not None and "sliding_attention" in kinds:
            raise ValueError(f"{architecture}: layer_types has sliding_attention, but use_sliding_window is not set")
        return (None,) * layers
    if kinds is None:
        kinds = tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
