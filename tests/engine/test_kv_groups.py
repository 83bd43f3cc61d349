"""An engine whose layers differ in KV format: groups with pools of their own that advance together, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from jaxserve.checkpoint import read_config
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.kv_formats import kv_groups
from jaxserve.kv import KVFormat, SealedFormat, formats
from jaxserve.kv.eight_bit import EightBitFormat
from jaxserve.models.model import Model
from jaxserve.types import KVGroup, PageClass
from tests.engine import tiny
from tests.engine.driver import Answer, Driver, answers, prompts, same
from tests.engine.invariance import (
    a_program_keeps_two_pages,
    decoded_is_prefilled_is_crowded,
    preempted_is_undisturbed,
    speculated_is_plain,
)
from tests.engine.tiny import GEMMA, SIZES

SHAPE = tiny.SHAPE | {"kv_cache_dtype": "hack4"}
LAYERS = {"llama": {"f32": 0}, "gemma": {"int8": 0, "hack2": [2]}}
"""Per-layer formats. Gemma's layers 0 and 2 see 100 tokens: three formats in three groups, two of them windowed."""
DENSE_BYTES, OPEN_BYTES, SEALED_BYTES = 2 * 2 * 64 * 64 * 4, 2 * 2 * 64 * 64 * 2, 2 * 4864
"""Of a page of one layer: f32; hack4's 16-bit and sealed pages."""
CASES = [1, 64, 65, 200, 330]


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    gemma = Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 3, "layer_types": types})
    folder = tmp_path_factory.mktemp("gemma")
    Gemma3ForCausalLM(gemma).save_pretrained(folder)
    return tiny_models | {"gemma": folder}


@pytest.fixture(scope="module")
def make(models: dict[str, Path], executables: str):
    """Engines by model and options; each is made once."""
    made: dict[str, Driver] = {}

    def driver(model: str = "llama", **options: object) -> Driver:
        key = repr((model, sorted(options.items())))
        if key not in made:
            own = {"model": str(models[model]), "compile_cache": executables, "kv_cache_dtype_layers": LAYERS[model]}
            made[key] = Driver(**SHAPE | own | options)
        return made[key]

    return driver


def one(driver: Driver, prompt: list[int], **params: object) -> Answer:
    return answers(driver, [prompt], **params)[0]


def test_groups_have_formats_and_pages_of_their_own(make) -> None:
    full, mixed = make().core.ready.page_classes
    assert full.classes == (PageClass(name="f32", pages=full.classes[0].pages, bytes=DENSE_BYTES),)
    assert [(c.name, c.bytes) for c in mixed.classes] == [("bfloat16", OPEN_BYTES), ("hack4", SEALED_BYTES)]
    assert (full.sink_pages, mixed.sink_pages, mixed.residual_pages) == (0, 1, 1)
    groups = make("gemma").core.ready.page_classes
    assert [(g.window, g.classes[-1].name) for g in groups] == [(100, "int8"), (None, "hack4"), (100, "hack2")]


@pytest.mark.parametrize("model", LAYERS)
def test_decoded_is_prefilled_is_crowded(make, model: str) -> None:
    """Alone and in a crowd prompts are cut into chunks of one to four tiles, at other places."""
    decoded_is_prefilled_is_crowded(make(model), prompts(CASES, seed=1))


def test_the_layers_format_is_seen(make) -> None:
    """The tests above would pass if all layers had one format."""
    case = prompts([330], seed=2)[0]
    assert one(make(), case).logprobs != one(make(kv_cache_dtype_layers={"f32": 1}), case).logprobs


@pytest.mark.parametrize("model", LAYERS)
def test_prefix_hits_and_forks_change_no_bit(make, model: str) -> None:
    driver = make(model)
    case = prompts([300], seed=3)[0]
    first, again = one(driver, case, salt="hit"), one(driver, case, salt="hit")
    assert (first.cached_tokens, again.cached_tokens) == (0, 256)
    same([again], [first])
    turn = [*case, *first.tokens, 7, 8, 9]
    hit = one(driver, turn, salt="hit", max_tokens=20)
    assert hit.cached_tokens == 320
    same([hit], [one(driver, turn, salt="fresh", max_tokens=20)])
    params = {"n": 3, "temperature": 1.0, "seed": 3, "ignore_eos": True, "max_tokens": 70}
    choices = []
    for salt in ("a", "b"):
        driver.submit("n", case[:200], salt=salt, **params)
        got = driver.run()
        choices.append([got["n", i].tokens for i in range(3)])
    assert choices[0] == choices[1] and len({tuple(tokens) for tokens in choices[0]}) > 1


def test_preemption_and_swap_change_no_bit(make) -> None:
    """Pools for a sequence of the maximum length and little more: four sequences take turns, by way of host memory."""
    memory = 14 * DENSE_BYTES + 7 * OPEN_BYTES + 9 * SEALED_BYTES
    tight = make(kv_cache_memory=memory, kv_expected_len=64, swap_space=64 * DENSE_BYTES)
    preempted_is_undisturbed(tight, make())
    assert tight.counter("swap_in_moves") > 0


def test_speculation_changes_no_token(make) -> None:
    speculated_is_plain(make(speculative_method="ngram", num_speculative_tokens=3), make())


def test_programs_keep_pages_of_every_group(make) -> None:
    a_program_keeps_two_pages(make(enable_prefix_caching=False))


def groups_and_formats(folder: Path, **options: object) -> tuple[tuple[KVGroup, ...], tuple[KVFormat, ...]]:
    model = Model.from_config(read_config(folder), "float32")
    return kv_groups(EngineConfig.of(**options), model, folder, on_gpu=False)


def groups_of(folder: Path, **options: object) -> list[tuple[tuple[int, ...], str]]:
    """Layers and format of each group."""
    groups = groups_and_formats(folder, **options)
    return [(group.layers, format.name) for group, format in zip(*groups, strict=True)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, [((0, 2), "f16"), ((1,), "f16")]),
        ({"f16": 0, "auto": -1}, [((0, 2), "f16"), ((1,), "f16")]),
        ({"int8": "1-2"}, [((0,), "f16"), ((1,), "int8"), ((2,), "int8")]),
        ({"int8": "sliding_window", "hack4": "full_attention"}, [((0, 2), "int8"), ((1,), "hack4")]),
        ({"int8": [0, "full_attention"], "fp8": -1}, [((0,), "int8"), ((1,), "int8"), ((2,), "fp8_e4m3")]),
    ],
)
def test_layers_of_one_window_and_one_format_share_a_group(
    models: dict[str, Path], layers: dict, expected: list
) -> None:
    assert groups_of(models["gemma"], kv_cache_dtype_layers=layers) == expected


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        *((name, "hadamard") for name in ("kivi4", "kivi2", "hack4", "hack2")),
        *((name, "none") for name in ("int8", "fp8_e4m3", "hack8", "hack4_p", "hack2_p", "hack8_p")),
    ],
)
def test_keys_of_few_bits_are_rotated_unless_somebody_says_otherwise(
    models: dict[str, Path], name: str, auto: str
) -> None:
    def rotations(**options: object) -> set[str]:
        _, formats = groups_and_formats(
            models["llama"], kv_cache_dtype=name, kv_cache_dtype_layers={"f32": 0}, **options
        )
        return {format.key_rotation for format in formats if isinstance(format, SealedFormat | EightBitFormat)}

    assert rotations() == rotations(kv_key_rotation="auto") == {auto}
    assert rotations(kv_key_rotation="none") == {"none"}
    assert rotations(kv_key_rotation="hadamard") == {"hadamard"}


@pytest.mark.parametrize(
    ("name", "default", "smaller"),
    [("kivi2", 40, 44), ("kivi4", 72, 76), ("hack2", 42, 47), ("hack4", 76, 82), ("hack4_p", 76, 82)],
)
def test_smaller_groups_of_channels_cost_a_scale_each(
    models: dict[str, Path], name: str, default: float, smaller: float
) -> None:
    """Bytes of a token in a sealed page of one layer and KV head."""

    def token_bytes(**options: object) -> float:
        (group,), (format,) = groups_and_formats(models["llama"], kv_cache_dtype=name, **options)
        return format.kinds(group)[1].bytes / (len(group.layers) * group.kv_heads * group.page_tokens)

    assert token_bytes() == token_bytes(kv_quant_group=64) == default
    assert token_bytes(kv_quant_group=32) == smaller


def test_leading_channels_are_in_a_basis_already() -> None:
    assert formats.get("hack4", channels=(64, 32)).usual_rotation == "none"


def test_heads_without_a_matrix_are_not_rotated(tmp_path: Path) -> None:
    LlamaConfig(**SIZES | {"head_dim": 48}, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="hadamard needs a power of two of channels in a key, not 48"):
        groups_and_formats(tmp_path, kv_cache_dtype="int8", kv_key_rotation="hadamard")


def test_scales_of_a_checkpoint_are_of_keys_as_they_are(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path, dirs_exist_ok=True)
    names = [f"model.layers.{layer}.self_attn.{half}_scale" for layer in range(2) for half in "kv"]
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | dict.fromkeys(names, np.ones(1, np.float32)), file)
    _, (format,) = groups_and_formats(tmp_path, kv_cache_dtype="fp8")
    assert isinstance(format, EightBitFormat) and format.calibrated and format.key_rotation == "none"
    with pytest.raises(ConfigError, match="--kv-key-rotation hadamard: this checkpoint brings scales"):
        groups_and_formats(tmp_path, kv_cache_dtype="fp8", kv_key_rotation="hadamard")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache_dtype_layers": ["f32"]}, "'f32' is not FORMAT=LAYERS"),
        ({"kv_cache_dtype_layers": ["f32="]}, "'f32=' is not FORMAT=LAYERS"),
        ({"kv_cache_dtype_layers": ["fp3=0"]}, "fp3 is not known; choose one of"),
        ({"kv_cache_dtype_layers": {"f32": 2}}, "2: this model has layers 0 to 1"),
        ({"kv_cache_dtype_layers": {"f32": -3}}, "-3: this model has layers 0 to 1"),
        ({"kv_cache_dtype_layers": {"f32": "1-0"}}, "1-0: .* write ranges as FIRST-LAST"),
        ({"kv_cache_dtype_layers": {"f32": "first"}}, "'first' names no layers; they are numbers"),
        ({"kv_cache_dtype_layers": {"f32": "sliding_window"}}, "sliding_window: no layer of this model"),
        ({"kv_cache_dtype_layers": {"f32": "0-1", "int8": [-1]}}, "layer 1 is to be f32 and int8; leave it out of one"),
        (
            {"kv_cache_dtype": "f16", "kv_cache_dtype_layers": {"f32": 0}, "kv_sink_pages": 2},
            "f16 has no --kv-sink-pages",
        ),
        ({"kv_cache_dtype": "int8", "kv_sink_pages": 2}, "int8 has no --kv-sink-pages; these have: hack2, .*zeroc"),
        ({"kv_cache_dtype": "int8", "kv_quant_group": 32}, "int8 has no --kv-quant-group; these have: hack2, "),
        ({"kv_cache_dtype": "kivi2", "kv_quant_group": 48}, "--kv-quant-group 48 is not one of 32, 64"),
        (
            {"kv_cache_dtype": "hack4", "prefill_exact": True, "batch_invariant": True},
            "--prefill-exact .* leave out one",
        ),
        (
            {"kv_cache_dtype": "bf16", "kv_key_rotation": "hadamard"},
            "bf16 has no --kv-key-rotation; these have: fp8_e4m3, hack2, ",
        ),
    ],
)
def test_layers_that_cannot_be_had_are_refused(models: dict[str, Path], options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        groups_of(models["llama"], **options)


def test_a_format_that_cannot_hold_a_layer_names_it(tmp_path: Path) -> None:
    LlamaConfig(**SIZES | {"head_dim": 32}, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"layer 1: .*head_dim"):
        groups_of(tmp_path, kv_cache_dtype="f32", kv_cache_dtype_layers={"hack4": 1})


def test_spellings() -> None:
    def layers(value: object) -> tuple[str, ...]:
        return EngineConfig.of(kv_cache_dtype_layers=value).cache.kv_cache_dtype_layers

    assert layers({"bf16": "0-1,-1", "int8": [2, 3], "f16": 4}) == layers(["bf16=0-1,-1", "int8=2,3", "f16=4"])
    with pytest.raises(ConfigError, match="--kv-cache-dtype takes no mapping"):
        EngineConfig.of(kv_cache_dtype={"bf16": 0})


def test_nothing_was_compiled_outside_the_declared_set(make) -> None:
    for model in LAYERS:
        assert make(model).counter("undeclared_compilations") == 0
