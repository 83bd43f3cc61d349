"""Decoder-only language models: definitions, configuration, and the pure functions over their parameters."""

from jaxserve.models.config import AttentionSpec, DecoderConfig
from jaxserve.models.model import Model, Params, split
from jaxserve.models.registry import build, model_config_from_hf

__all__ = ["AttentionSpec", "DecoderConfig", "Model", "Params", "build", "model_config_from_hf", "split"]
