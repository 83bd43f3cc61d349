"""An engine that serves with ZeroC: the same tokens however KV came about, exact where heads are kept whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.kv_calibration import KVCalibration, write_calibration
from jaxserve.checkpoint.load import load_model
from jaxserve.config import ConfigError
from jaxserve.models.basis import fingerprint
from tests.engine.driver import Driver, answers, prompts, same
from tests.engine.invariance import (
    decoded_is_prefilled_is_crowded,
    preempted_is_undisturbed,
    speculated_is_plain,
)
from tests.engine.tiny import SHAPE
from tests.models.test_basis import basis

CASES = [1, 64, 65, 200, 330]
CHANNELS = {"whole": ((64, 64), (64, 64)), "some": ((64, 32), (48, 32)), "packed": ((64, 32), (32, 64))}


@pytest.fixture(scope="module")
def folder(tiny_models: dict[str, Path]) -> Path:
    """A model, and calibrations of it beside it."""
    folder = tiny_models["llama"]
    model, params = load_model(folder, "float32")
    made = KVCalibration(basis(model), (), fingerprint(model, params), "the test's model")
    for name, channels in CHANNELS.items():
        write_calibration(folder / name, replace(made, channels=channels))
    write_calibration(folder / "other basis", replace(made, basis=basis(model, seed=5), channels=CHANNELS["some"]))
    write_calibration(folder / "other model", replace(made, model="0", channels=CHANNELS["some"]))
    return folder


@pytest.fixture(scope="module")
def make(folder: Path, executables: str):
    """Engines by calibration and options; each is made once."""
    made: dict[str, Driver] = {}

    def driver(calibration: str | None = "some", format: str = "zeroc", **options: object) -> Driver:
        key = repr((calibration, format, sorted(options.items())))
        if key not in made:
            own = {"model": str(folder), "compile_cache": executables, "kv_cache_dtype": format}
            if calibration is not None:
                own["kv_calibration"] = str(folder / calibration)
            made[key] = Driver(**SHAPE | own | options)
        return made[key]

    return driver


def test_each_layer_keeps_its_own_channels(make) -> None:
    first, second = make().core.ready.page_classes
    assert [c.bytes for c in first.classes] == [2 * 64 * 128 * 2, 2 * 64 * (64 + 32) * 2]
    assert [c.bytes for c in second.classes] == [2 * 64 * 128 * 2, 2 * 64 * (48 + 32) * 2]


@pytest.mark.parametrize(("calibration", "format"), [("some", "zeroc"), ("packed", "zeroc+hack4")])
def test_decoded_is_prefilled_is_crowded(make, calibration: str, format: str) -> None:
    decoded_is_prefilled_is_crowded(make(calibration, format), prompts(CASES, seed=1))


def test_prefix_hits_change_no_bit(make) -> None:
    (case,) = prompts([300], seed=3)
    first, again = (answers(make(), [case], salt="hit")[0] for _ in range(2))
    assert (first.cached_tokens, again.cached_tokens) == (0, 256)
    same([again], [first])


def test_preemption_and_swap_change_no_bit(make) -> None:
    open, sealed = 2 * 64 * 128 * 2, [2 * 64 * n * 2 for n in (96, 80)]
    tight = make(kv_cache_memory=14 * open + 9 * sum(sealed), kv_expected_len=64, swap_space=64 * open)
    preempted_is_undisturbed(tight, make())
    assert tight.counter("swap_in_moves") > 0


def test_speculation_changes_no_token(make) -> None:
    speculated_is_plain(make(speculative_method="ngram", num_speculative_tokens=3), make())


def test_whole_heads_are_dense_up_to_rounding(make) -> None:
    """Prompt log-probs against float32 KV: bfloat16 pages err in the basis as outside it; fewer channels err more."""
    cases = prompts([330], seed=8)

    def logprobs(driver: Driver) -> np.ndarray:
        (answer,) = answers(driver, cases, prompt_logprobs=0, max_tokens=1, salt="logprobs")
        assert answer.prompt_logprobs is not None
        return np.array([entry.logprobs[0] for entry in answer.prompt_logprobs if entry is not None])

    exact = logprobs(make(None, "f32"))
    plain, whole, some = (
        np.abs(logprobs(driver) - exact).mean() for driver in (make(None, "bf16"), make("whole"), make("some"))
    )
    assert whole < 2 * plain and some > 10 * plain


def test_cached_pages_belong_to_their_calibration(make) -> None:
    cases = prompts([200], seed=9)
    names = {make(name).core._identity for name in ("some", "whole", "other basis")}
    assert len(names) == 3
    assert answers(make(), cases)[0].logprobs != answers(make("other basis"), cases)[0].logprobs


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kv_calibration": None}, ConfigError, "needs --kv-calibration FILE; `jaxserve calibrate` makes it"),
        ({"kv_cache_dtype": "hack4"}, ConfigError, "--kv-calibration says what --kv-cache-dtype zeroc keeps"),
        ({"kv_calibration": "nowhere"}, CheckpointError, "nowhere cannot be read"),
        ({"kv_calibration": "other model"}, CheckpointError, "made for another model"),
        ({"kv_cache_dtype": "zeroc+hack2"}, ConfigError, r"layer 0: .*2 bits need a head_dim of 64 or 128, not 32"),
        ({"kv_cache_dtype": "zeroc+int8"}, ConfigError, "zeroc.int8. is not one of auto, bf16"),
        ({"kv_cache_dtype_layers": {"zeroc+int8": 0}}, ConfigError, "formats that seal full pages: zeroc, zeroc.hack2"),
    ],
)
def test_what_cannot_be_had_is_refused(folder: Path, options: dict, error: type, words: str) -> None:
    own = {"model": str(folder), "kv_cache_dtype": "zeroc", "kv_calibration": "some"} | options
    if own["kv_calibration"] is not None:
        own["kv_calibration"] = str(folder / str(own["kv_calibration"]))
    with pytest.raises(error, match=words):
        Driver(**SHAPE | own)


def test_quantized_weights_come_after_the_basis(make) -> None:
    answer = answers(make(quantization="int8"), prompts([100], seed=2), max_tokens=4)[0]
    assert answer.error is None and len(answer.tokens) == 4


def test_nothing_was_compiled_outside_the_declared_set(make) -> None:
    assert make().counter("undeclared_compilations") == 0
