"""generation_config.json: what a model's authors recommend for sampling and where generation ends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class GenerationDefaults:
    """Values of generation_config.json; None where it says nothing.

    `do_sample` False means greedy decoding whatever the other fields say.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_config(folder: Path) -> GenerationDefaults:
    """The folder's generation_config.json; all defaults where it has none. CheckpointError for a damaged one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        eos = raw.get("eos_token_id")
        ids = () if eos is None else tuple(map(int, eos)) if isinstance(eos, list) else (int(eos),)
        names = GenerationDefaults.__dataclass_fields__.keys() & raw.keys()
        for name in names:
            if not isinstance(raw[name], int | float | None):
                raise TypeError(f"{name} is {raw[name]!r}")
        return GenerationDefaults(eos_token_ids=ids, **{name: raw[name] for name in names})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
