"""From a model's files to what turns text into requests. Imports no jax and starts no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.config import EngineConfig
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.intake import Intake
from jaxserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.checkpoint.generation import GenerationDefaults

_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_intake(config: EngineConfig) -> Intake:
    """Tokenizer, chat template and recommended sampling of the model that `config` names; no weights.

    Raises CheckpointError or ConfigError for files that are missing or wrong.
    """
    # Imported late: a hub's client takes a while, and a folder needs none.
    from jaxserve.checkpoint.generation import read_generation_config
    from jaxserve.checkpoint.source import model_folder, resolve

    model = config.model
    folder = model_folder(model)
    tokenizer_folder = folder if model.tokenizer is None else resolve(model.tokenizer)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    template = ChatTemplate.from_folder(tokenizer_folder, tokenizer.special_tokens, model.chat_template)
    if not template:
        template = ChatTemplate.from_folder(folder, tokenizer.special_tokens)
    if model.generation_config == "none":
        return Intake(tokenizer, template, seed=model.seed)
    recommended = read_generation_config(folder)
    return Intake(
        tokenizer, template, _sampling_defaults(recommended), longest_answer=recommended.max_new_tokens, seed=model.seed
    )


def _sampling_defaults(recommended: GenerationDefaults) -> dict[str, Any]:
    if recommended.do_sample is False:
        return {"temperature": 0.0}
    values = {name: getattr(recommended, name) for name in _RECOMMENDED}
    return {name: value for name, value in values.items() if value is not None}
