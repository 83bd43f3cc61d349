"""Model families by Hugging Face architecture name. A new one is a file with three functions, and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxserve.models import gemma3, llama
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.names import Leaf


@dataclass(frozen=True)
class Family:
    """What a family file provides.

    Attributes:
        config_from_hf: (architecture name, config.json) -> DecoderConfig; refuses what it cannot honour.
        build: (config, dtype) -> the module.
        leaves: config -> where each parameter lies in a Hugging Face checkpoint.
        skipped: prefixes of checkpoint tensors that belong to other modalities.
        renames: (prefix, replacement) for checkpoints that nest the language model; the first that fits is applied.
    """

    config_from_hf: Callable[[str, dict[str, Any]], DecoderConfig]
    build: Callable[[DecoderConfig, jnp.dtype], Decoder]
    leaves: Callable[[DecoderConfig], tuple[Leaf, ...]]
    skipped: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


_LLAMA = Family(llama.config_from_hf, llama.build, llama.leaves)
_GEMMA3 = Family(gemma3.config_from_hf, gemma3.build, gemma3.leaves, gemma3.SKIPPED, gemma3.RENAMES)

FAMILIES: dict[str, Family] = {
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
}


def family(architecture: str) -> Family:
    """The family of a Hugging Face architecture. ValueError that lists the known ones otherwise."""
    try:
        return FAMILIES[architecture]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown architecture {architecture!r}: jaxserve serves {known}") from None


def model_config_from_hf(config: dict[str, Any]) -> DecoderConfig:
    """DecoderConfig of a config.json. ValueError for an architecture, field or value that is not supported."""
    names = config.get("architectures") or []
    if len(names) != 1:
        raise ValueError(f"config.json: architectures must name one architecture, not {names!r}")
    return family(names[0]).config_from_hf(names[0], config)


def build(config: DecoderConfig, dtype: jnp.dtype) -> Decoder:
    """The module with abstract parameters: shapes and dtypes, no memory."""
    return family(config.architecture).build(config, jnp.dtype(dtype))
