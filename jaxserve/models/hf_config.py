"""Reading a Hugging Face config.json: every field is used, known to be harmless, or refused by name."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from jaxserve.models.config import LinearRope, Llama3Rope, Rope, YarnRope
from jaxserve.models.layers.mlp import ACTIVATIONS

log = logging.getLogger(__name__)

HARMLESS = frozenset(
    """
    architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout is_llama_config
    pad_token_id bos_token_id eos_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    tokenizer_class auto_map task_specific_params id2label label2id problem_type finetuning_task prefix
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript
    is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    pruned_heads chunk_size_feed_forward tf_legacy_loss use_bfloat16 keys_to_ignore_at_inference
    max_window_layers
    max_length min_length do_sample temperature top_k top_p typical_p num_beams num_beam_groups repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    diversity_penalty early_stopping forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens cache_implementation
    """.split()
)
"""Fields that cannot change the logits, or whose effect is read elsewhere (generation_config.json)."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1, 1.0),
    "position_embedding_type": (None, "rope", "rotary"),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
} | dict.fromkeys(
    """
    quantization_config compression_config rope_interleaved use_mrope use_sliding_window sliding_window layer_types
    attention_multiplier attention_bias mlp_bias add_bias_linear use_bias qkv_bias attention_out_bias use_qk_norm
    qk_layernorm use_qkv_bias clip_qkv alibi use_alibi parallel_residual use_parallel_residual tie_word_embeddings
    query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping use_bidirectional_attention
    no_rope_layers no_rope_layer_interval attn_temperature_tuning attn_scale floor_scale use_attention_sinks
    num_kv_shared_layers q_lora_rank kv_lora_rank first_k_dense_replace num_nextn_predict_layers
    apply_residual_connection_post_layernorm residual_dropout layer_norm_epsilon norm_type rotary_pct rotary_dim
    attention_chunk_size scale_depth scale_emb dim_model_base final_logits_scaling conv_L_cache ssm_state_size
    """.split(),
    (None, False, {}, []),
)
"""Fields that change the computation somewhere, and the values at which they change nothing here. A family that
supports such a field reads it; any other value of one that was not read is refused."""


class Fields:
    """A config.json that remembers which of its fields were read."""

    def __init__(self, architecture: str, hf: dict[str, Any]):
        self.architecture = architecture
        self._hf = hf
        self._read: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._hf.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.get(name, None)
        if value is None:
            raise ValueError(f"config.json of this {self.architecture} has no {name!r}")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise ValueError(f"config.json: {name} {value!r} is not supported (use one of {', '.join(ACTIVATIONS)})")
        return value

    def layer_types(self, layers: int) -> tuple[str, ...] | None:
        """The attention kind of each layer, None where the config does not list them."""
        kinds = self.get("layer_types", None)
        if kinds is None:
            return None
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(f"config.json: layer_types has {unknown[0]!r}, which is not supported")
        if len(kinds) != layers:
            raise ValueError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
        return tuple(kinds)

    def json(self) -> str:
        return json.dumps(self._hf, indent=2, sort_keys=True)

    def finish(self) -> None:
        """Refuses every known field that changes the computation and was not read; names unknown ones in the log."""
        for name, value in self._hf.items():
            if name in self._read or name in HARMLESS:
                continue
            if name == "quantization_config" and _is_kv_cache_only(value):
                continue
            if name not in NEUTRAL:
                log.warning("config.json: field %s = %r is not known and has no effect", name, value)
            elif value not in NEUTRAL[name]:
                raise ValueError(f"config.json: {name} = {value!r} is not supported for {self.architecture}")


def _is_kv_cache_only(quantization: Any) -> bool:
    """Whether a `quantization_config` describes an 8-bit float KV cache and leaves the weights alone."""
    if not isinstance(quantization, dict) or quantization.get("config_groups"):
        return False
    scheme = quantization.get("kv_cache_scheme")
    return isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"


def eos_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids, however a config spells them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def stored_dtype(f: Fields) -> str:
    """Name of the dtype that the checkpoint's weights are in; transformers 5 calls the field dtype."""
    return str(f.get("dtype", None) or f.get("torch_dtype", "float32")).removeprefix("torch.")


def parse_rope(f: Fields, max_position: int) -> Rope:
    """Position embedding of a config with one for all layers, in the spelling before and after transformers 5."""
    theta = f.get("rope_theta", 10_000.0)
    scaling = f.get("rope_scaling", None) or f.get("rope_parameters", None) or {}
    original = f.get("original_max_position_embeddings", None)
    return rope_from(scaling, theta, max_position, original)


def rope_from(fields: dict[str, Any], theta: float, max_position: int, original: int | None = None) -> Rope:
    """Position embedding from a `rope_scaling` or `rope_parameters` object.

    `theta` is the base where the object has none, `original` overrides its original_max_position_embeddings.
    ValueError names a kind or a field that is not supported.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    theta = float(fields.pop("rope_theta", theta))
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor below 1 is not supported")
    stored_original = fields.pop("original_max_position_embeddings", None)
    original = original or stored_original or max_position

    def take(name: str, default: Any = None) -> Any:
        value = fields.pop(name, default)
        if value is None:
            raise ValueError(f"config.json: rope scaling of type {kind!r} has no {name!r}")
        return value

    rope: Rope
    match kind:
        case "default":
            rope = Rope(theta)
            fields.pop("factor", None)
        case "linear":
            rope = LinearRope(theta, float(take("factor")))
        case "llama3":
            factor, low, high = (float(take(name)) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            rope = Llama3Rope(theta, factor, low, high, original)
        case "yarn":
            factor = float(fields.pop("factor", max_position / original))
            rope = YarnRope(
                theta,
                factor,
                beta_fast=float(take("beta_fast", 32)),
                beta_slow=float(take("beta_slow", 1)),
                original_max_position=original,
                attention_factor=_yarn_attention_factor(fields, factor),
                truncate=bool(take("truncate", True)),
            )
        case _:
            raise ValueError(f"config.json: rope type {kind!r} is not supported (use default, linear, llama3 or yarn)")
    fields.pop("finetuned", None)
    if fields:
        name, value = next(iter(fields.items()))
        raise ValueError(f"config.json: {name} = {value!r} is not supported in rope scaling of type {kind!r}")
    return rope


def _yarn_attention_factor(fields: dict[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given, numerator, denominator = (fields.pop(n, None) for n in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1.0)
