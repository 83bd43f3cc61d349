"""A model without training whose recall is exactly 1 as long as its KV cache tells the truth. Knows the Qwen2 layout.

Two layers of one attention head find what followed a token the last time it occurred (an induction head), by
construction: see `write`. What a KV technique loses shows as lost recall within seconds, and nothing else is measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxserve.eval.tasks.document import Document, Page, Room, TooShort, Turn, spread

INDUCTION = "induction"
"""The task that this model is made for."""
TOKENS = 64
"""Size of the vocabulary and of a token's code."""
HEAD_DIM = 128
PAIRS = 20
ROPE_BASE = 1e10
FAST_PAIRS = 16
"""Rotary pairs 0..15 turn by 1 to 0.0046 radians a token: together they tell any two distances apart."""
SLOW_PAIRS = 32
"""Rotary pairs from 32 on turn by at most 1e-5 radians a token: content that is placed there has no position."""
POSITION_GAIN = 60.0
"""Of layer 0's keys: at 16 pairs, the token before gets 4.9 nats more than its neighbours, 85 more than noise."""
MATCH = 18.0
"""Score of layer 1 where the code matches; 0 elsewhere. exp(18) outweighs 1,000 other tokens 65,000 times."""
MAX_POSITION = 4096
_OWN, _BEFORE, _FOUND = (slice(i * TOKENS, (i + 1) * TOKENS) for i in range(3))
_HIDDEN = 3 * TOKENS


def write(folder: Path) -> Path:
    """Writes the checkpoint, in Hugging Face layout, and returns its folder.

    The residual stream has three parts of 64: the token's own code (a row of a Hadamard matrix), the code of the token
    before it (written by layer 0), and the code found (written by layer 1, read by the head).

    Layer 0: biases give every query the constant phase -theta and every key the phase 0, so after rotation the score
    depends on the distance alone and is highest at distance 1: the value, the own code, moves one token on.
    Layer 1: query = own code, key = code of the token before, in pairs too slow to turn; value = own code. A token
    finds the places right after its own earlier occurrences.

    RMSNorm divides by a root mean square that is the same for all tokens, since codes have one norm; weights undo it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = hadamard(TOKENS)
    tensors = {
        "model.embed_tokens.weight": _padded(codes, _OWN),
        "lm_head.weight": _padded(codes, _FOUND),
        "model.norm.weight": np.ones(_HIDDEN),
    }
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}": value for name, value in _layer(layer).items()}
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_TOKENIZER, indent=1))
    return folder


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix [size, size] of 1 and -1, whose rows are orthogonal. `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _padded(codes: np.ndarray, part: slice) -> np.ndarray:
    rows = np.zeros((len(codes), _HIDDEN))
    rows[:, part] = codes
    return rows


def _layer(layer: int) -> dict[str, np.ndarray]:
    pairs = HEAD_DIM // 2
    query, key, value = (np.zeros((HEAD_DIM, _HIDDEN)) for _ in range(3))
    query_bias, key_bias = np.zeros(HEAD_DIM), np.zeros(HEAD_DIM)
    out = np.zeros((_HIDDEN, HEAD_DIM))
    norm = math.sqrt(3 / (layer + 1))  # 1 / rms of a stream in which layer + 1 of the three parts are filled
    if layer == 0:
        turn = ROPE_BASE ** (-np.arange(FAST_PAIRS) / pairs)
        query_bias[:FAST_PAIRS], query_bias[pairs : pairs + FAST_PAIRS] = np.cos(-turn), np.sin(-turn)
        key_bias[:FAST_PAIRS] = POSITION_GAIN
    else:
        # Half-split layout: pair i is (i, i + 64), so the slow pairs are two runs of 32 dimensions.
        slow = [*range(SLOW_PAIRS, pairs), *range(pairs + SLOW_PAIRS, HEAD_DIM)]
        query[slow, _OWN] = np.eye(TOKENS) * MATCH * math.sqrt(HEAD_DIM) / (TOKENS * norm**2)
        key[slow, _BEFORE] = np.eye(TOKENS)
    value[:TOKENS, _OWN] = np.eye(TOKENS)
    out[_BEFORE if layer == 0 else _FOUND, :TOKENS] = np.eye(TOKENS) / norm
    ones, nothing = np.ones(_HIDDEN), np.zeros((TOKENS, _HIDDEN))
    return {
        "input_layernorm.weight": ones,
        "post_attention_layernorm.weight": ones,
        "self_attn.q_proj.weight": query,
        "self_attn.q_proj.bias": query_bias,
        "self_attn.k_proj.weight": key,
        "self_attn.k_proj.bias": key_bias,
        "self_attn.v_proj.weight": value,
        "self_attn.v_proj.bias": np.zeros(HEAD_DIM),
        "self_attn.o_proj.weight": out,
        "mlp.gate_proj.weight": nothing,
        "mlp.up_proj.weight": nothing,
        "mlp.down_proj.weight": nothing.T,
    }


_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "dtype": "float32",
    "vocab_size": TOKENS,
    "hidden_size": _HIDDEN,
    "intermediate_size": TOKENS,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-6,
    "rope_theta": ROPE_BASE,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_VOCABULARY = [f"t{number:02}" for number in range(TOKENS)]
_TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(_VOCABULARY)}, "unk_token": "t00"},
}


def induction(rng: Random, room: Room) -> Document:
    """20 key-value pairs in filler; a turn names a key. Each token has one role in a document: key, value or filler."""
    if room.tokens < 4 * PAIRS:
        raise TooShort(f"{PAIRS} pairs and their filler need {4 * PAIRS} tokens, not {room.tokens}")
    order = rng.sample(_VOCABULARY, TOKENS)
    keys, values, filler = order[:PAIRS], order[PAIRS : 2 * PAIRS], order[2 * PAIRS :]
    page = Page(room.count)
    # Filler first: position 0 has no token before it, and takes itself for that.
    kinds = [True] * PAIRS + [False] * (room.tokens - 2 * PAIRS - 1)
    rng.shuffle(kinds)
    starts, pairs = [], iter(zip(keys, values, strict=True))
    for is_pair in (False, *kinds):
        if is_pair:
            starts.append(page.tokens)
            for word in next(pairs):
                page.add(word)
        else:
            page.add(rng.choice(filler))
    turns = [Turn(keys[i], values[i], starts[i] / page.tokens) for i in spread(rng, PAIRS, room.turns)]
    return Document(page.text(), tuple(turns), cue="{}", extra_tokens=0)
