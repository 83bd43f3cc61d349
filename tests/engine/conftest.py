"""What tests of the engine share: small models; at the end of each file its engines are closed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.driver import close_all
from tests.engine.tiny import GEMMA, SIZES


@pytest.fixture(scope="module", autouse=True)
def _engines_end() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a Llama and a Gemma of tests.engine.tiny's sizes."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gemma": Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
    return folders
