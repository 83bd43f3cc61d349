"""Sizes of the random models that engines are tested with, and of the engines.

Compiled programs belong to sizes, not to weights: engines that differ in nothing but the KV format share all others."""

from __future__ import annotations

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 640,
    "initializer_range": 0.3,
}
"""Of a model, by Hugging Face's names."""
GEMMA = SIZES | {
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 64,
}
"""The same with a layer that sees 100 tokens and one that sees all."""
SHAPE = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "decode_buckets": [8],
    "tile_buckets": [4],
    "wait_for_buckets": True,
    "batch_invariant": True,
}
"""Options of an engine with few programs."""
