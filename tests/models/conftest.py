"""Tiny random checkpoints made with transformers, and the logits that transformers computes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9, "sliding_window_pattern": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama_multi_head": ("Llama", {"num_key_value_heads": 4, "intermediate_size": 90}),
    "llama_llama3_rope": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama_linear_rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama_yarn_rope": ("Llama", {"rope_scaling": YARN, "rope_theta": 300.0}),
    "llama_yarn_weights": ("Llama", {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4, "beta_slow": 2}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3_softcap_rope": (
        "Gemma3",
        GEMMA | {"final_logit_softcapping": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder and what transformers computes from it in float32."""

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray


def make_checkpoint(case: str, folder: Path, length: int = 100) -> Reference:
    """Weights are drawn so that logits have a standard deviation above 1 and every parameter matters."""
    import torch
    import transformers

    kind, fields = CASES[case]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, kind + suffix)(**(SIZES | fields))
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(len(case))
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 2:
            value.copy_(noise * (2.0 if "embed" in name or "lm_head" in name else 1.0) * value.shape[1] ** -0.5)
        elif "norm" in name:
            value.add_(0.2 * noise)
        else:
            value.copy_(0.3 * noise)
    model.save_pretrained(folder)
    tokens = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
    assert logits.std() >= 1
    return Reference(folder, tokens[0].numpy().astype(np.int32), logits)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """reference(case): made once a session."""
    made: dict[str, Reference] = {}

    def get(case: str) -> Reference:
        if case not in made:
            made[case] = make_checkpoint(case, tmp_path_factory.mktemp(case))
        return made[case]

    return get
