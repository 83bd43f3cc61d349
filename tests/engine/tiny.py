"""Sizes of the random models that engines are tested with, and of the engines."""

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
SHAPE = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "decode_buckets": [8],
    "tile_buckets": [4],
    "wait_for_buckets": True,
    "batch_invariant": True,
}
"""Options of an engine with few programs."""
