"""Gemma 3, text: windowed and full layers with a RoPE base each, norms before and after attention and MLP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import Fields, eos_ids, rope_from, stored_dtype
from jaxserve.models.layers.attention import Attend, Attention
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rows import Rows
from jaxserve.models.names import Copy, Leaf, decoder_leaves, projection_leaves
from jaxserve.quant import LinearContext

SKIPPED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
RENAMES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


class Gemma3Layer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: DecoderConfig, dtype: jnp.dtype):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden, config.rms_eps, dtype, config.norm_offset)

        self.attention_norm, self.attention_out_norm = norm(), norm()
        self.mlp_norm, self.mlp_out_norm = norm(), norm()
        self.attention = Attention(config, dtype)
        self.mlp = GatedMLP(config, dtype)

    def __call__(
        self, x: jax.Array, rows: Rows, layer: int, kv: Any, attend: Attend, ctx: LinearContext
    ) -> tuple[Any, jax.Array]:
        kv, heads = self.attention(x, self.attention_norm, rows, layer, kv, attend, ctx)
        x = x + self.attention_out_norm(self.attention.output(heads, ctx))
        return kv, x + self.mlp_out_norm(self.mlp(self.mlp_norm(x), ctx))


def build(config: DecoderConfig, dtype: jnp.dtype) -> Decoder:
    return Decoder(config, dtype, Gemma3Layer)


def leaves(config: DecoderConfig) -> tuple[Leaf, ...]:
    """Where each leaf lies in a Hugging Face checkpoint."""
    names = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    result = list(decoder_leaves(config, "model.", "lm_head.weight"))
    for i in range(config.layers):
        source, target = f"model.layers.{i}.", ("layers", i)
        result += projection_leaves(config, source, target)
        result += [Leaf((*target, ours, "weight"), (f"{source}{hf}.weight",), Copy()) for ours, hf in names.items()]
    return tuple(result)


def config_from_hf(architecture: str, hf: dict[str, Any]) -> DecoderConfig:
    """Reads config.json of Gemma3ForCausalLM, or the text part of Gemma3ForConditionalGeneration.

    Fields that published configs leave out have transformers' defaults. ValueError for what it cannot honour.
    """
    if architecture == "Gemma3ForConditionalGeneration":
        hf = _text_part(hf)
    f = Fields("Gemma3ForCausalLM", hf)
    layers = f.get("num_hidden_layers", 26)
    max_position = f.get("max_position_embeddings", 131_072)
    if f.get("use_bidirectional_attention", False):
        raise ValueError("config.json: use_bidirectional_attention = true is not supported")
    window, pattern, kinds = f.get("sliding_window", 4096), f.get("sliding_window_pattern", None), f.layer_types(layers)
    pattern = pattern or f.get("_sliding_window_pattern", 6)
    if kinds is None:
        kinds = tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers))
    ropes = f.get("rope_parameters", None) or {}
    full = f.get("rope_scaling", None) or ropes.get("full_attention") or {}
    attention_bias = f.get("attention_bias", False)
    hidden = f.get("hidden_size", 2304)
    config = DecoderConfig(
        architecture="Gemma3ForCausalLM",
        vocab_size=f.get("vocab_size", 262_208),
        hidden=hidden,
        layers=layers,
        heads=f.get("num_attention_heads", 8),
        kv_heads=f.get("num_key_value_heads", 4),
        head_dim=f.get("head_dim", 256),
        intermediate=f.get("intermediate_size", 9216),
        max_position=max_position,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        rope=rope_from(full, f.get("rope_theta", 1_000_000.0), max_position),
        window_rope=rope_from(
            ropes.get("sliding_attention") or {}, f.get("rope_local_base_freq", 10_000.0), max_position
        ),
        rms_eps=f.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        activation=f.activation("hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=f.get("tie_word_embeddings", True),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
        attention_scale=f.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=f.get("attn_logit_softcapping", None),
        logit_softcap=f.get("final_logit_softcapping", None),
        embedding_scale=hidden**0.5,
        bos_token_id=f.get("bos_token_id", 2),
        eos_token_ids=eos_ids(f.get("eos_token_id", 1)),
        pad_token_id=f.get("pad_token_id", 0),
        stored_dtype=stored_dtype(f),
        hf=f.json(),
    )
    f.finish()
    return config


def _text_part(hf: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model alone, with what the outer config says about it."""
    text = dict(hf.get("text_config") or {})
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype"):
        if text.get(name) is None and hf.get(name) is not None:
            text[name] = hf[name]
    return text | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
