"""generation_config.json."""

from __future__ import annotations

import pytest

from jaxserve.checkpoint import CheckpointError, GenerationDefaults, read_generation_config


def write(folder, text):
    (folder / "generation_config.json").write_text(text)


def test_absent(tmp_path):
    assert read_generation_config(tmp_path) == GenerationDefaults()


def test_fields(tmp_path):
    write(tmp_path, '{"eos_token_id": 5, "temperature": 0.6, "do_sample": true, "transformers_version": "5"}')
    expected = GenerationDefaults(eos_token_ids=(5,), temperature=0.6, do_sample=True)
    assert read_generation_config(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}', '{"top_p": "high"}'])
def test_damaged(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(CheckpointError, match="generation_config.json is damaged"):
        read_generation_config(tmp_path)
