"""config.json: both spellings of rope, defaults, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.models import model_config_from_hf
from jaxserve.models.config import LinearRope, Llama3Rope, Rope, YarnRope
from jaxserve.models.hf_config import NEUTRAL

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def read(**fields):
    return model_config_from_hf(BASE | fields)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES = [
    ({"rope_type": "default"}, Rope(5e5)),
    ({"rope_type": "linear", "factor": 4.0}, LinearRope(5e5, 4.0)),
    ({"rope_type": "llama3", **LLAMA3}, Llama3Rope(5e5, 8.0, 1.0, 4.0, 64)),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.0},
        YarnRope(5e5, 4.0, original_max_position=128),
    ),
]


@pytest.mark.parametrize(("fields", "rope"), ROPES)
def test_rope_spellings_mean_the_same(fields, rope):
    old = {("type" if name == "rope_type" else name): value for name, value in fields.items()}
    assert read(rope_theta=5e5, rope_scaling=fields).rope == rope
    assert read(rope_theta=5e5, rope_scaling=old).rope == rope
    assert read(rope_parameters=fields | {"rope_theta": 5e5}).rope == rope


def test_yarn_factor_and_weight_follow_from_the_lengths():
    rope = read(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 128}).rope
    assert rope.factor == 4.0
    assert rope.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize("eos", [7, [7], [7, 8], None])
def test_eos_ids(eos):
    expected = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    assert read(eos_token_id=eos).eos_token_ids == expected


def test_gemma3_spellings_mean_the_same():
    gemma = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 4, "sliding_window": 16}
    local, full = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    old = {
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    new = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": local, "full_attention": full},
    }
    config = model_config_from_hf(gemma | old)
    assert config == model_config_from_hf(gemma | new)
    assert config.windows == (16, None, 16, None)
    assert [config.layer_rope(i) for i in (0, 1)] == [Rope(1e4), LinearRope(1e6, 8.0)]


def test_gemma3_text_part_of_a_multimodal_config():
    text = {"model_type": "gemma3_text", "hidden_size": 128, "num_hidden_layers": 6, "sliding_window": 32}
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": text,
        "vision_config": {"hidden_size": 7},
        "mm_tokens_per_image": 256,
    }
    config = model_config_from_hf(outer)
    assert config.architecture == "Gemma3ForCausalLM"
    assert (config.hidden, config.layers, config.eos_token_ids) == (128, 6, (1, 106))
    assert config == model_config_from_hf({"architectures": ["Gemma3ForCausalLM"], **text, "eos_token_id": [1, 106]})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM"]),
        ({"architectures": []}, ["architectures"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]}}, ["mrope_section"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"sliding_window": 64}, ["sliding_window", "64", "LlamaForCausalLM"]),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["linear_attention"] * 3}, ["linear_attention"]),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}, ["layer_types", "1", "3"]),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, ["use_bidirectional"]),
        ({"num_key_value_heads": 3}, ["4", "3"]),
    ],
)
def test_refusals_name_the_field(fields, words):
    with pytest.raises(ValueError) as error:
        read(**fields)
    for word in words:
        assert word in str(error.value)


@given(st.sampled_from(sorted(NEUTRAL)))
def test_every_neutral_value_is_accepted(name):
    for value in NEUTRAL[name]:
        read(**{name: value})


def test_unknown_fields_are_named_in_the_log(caplog):
    read(unheard_of=3)
    assert "unheard_of" in caplog.text
