"""Calibrating a model: moments and bases against float64, the loss against the model's own, files from the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import bundled
from jaxserve.calibrate.loss import Loss, full
from jaxserve.calibrate.moments import Moments, collect
from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.calibrate.rotations import find_basis
from jaxserve.calibrate.run import calibrate, sample, table
from jaxserve.checkpoint.kv_calibration import read_calibration, write_calibration
from jaxserve.checkpoint.load import load_model
from jaxserve.cli import main
from jaxserve.config import ConfigError
from jaxserve.models.basis import change_basis
from jaxserve.models.dense_attention import dense_attend
from tests.models.test_basis import basis, made, seen

SMALL = CalibrateOptions(tokens=512, held_out=192, window=192, channels=(32,), loss_bound=2.0)


@pytest.fixture(scope="module")
def bundled_model() -> tuple[Any, Any]:
    return load_model(bundled.path(), "float32")


def test_moments() -> None:
    model, params = made("llama with biases")
    tokens = np.arange(40, dtype=np.int32)
    calls: list[int] = []
    found = collect(model, params, [tokens, tokens], lambda: calls.append(1))
    assert len(calls) == 2
    for layer, (q, k, v, _) in enumerate(seen(model, params)):
        for got, x in ((found.queries, q), (found.keys, k), (found.values, v)):
            x = x.reshape(len(x), model.config.kv_heads, -1, model.config.head_dim)
            exact = 2 * np.einsum("thgd,thge->hde", x, x)
            np.testing.assert_allclose(got[layer], exact, atol=1e-4 * np.abs(exact).max())


def test_a_subspace_is_found() -> None:
    """Keys and queries in 5 of 32 dimensions: 5 channels hold all of them, whatever the norms of the two."""
    model, params = made("qwen3")
    c, rng = model.config, np.random.default_rng(0)
    shape = (c.layers, c.kv_heads)
    subspace = rng.standard_normal((*shape, 5, c.head_dim))
    q, k = (scale * rng.standard_normal((*shape, 100, 5)) @ subspace for scale in (1.0, 300.0))
    v = rng.standard_normal((*shape, 100, c.head_dim))
    moments = Moments(*(x.swapaxes(-1, -2) @ x for x in (q, k, v)))
    found = find_basis(moments, model, params)
    cut = [(x @ found.keys)[..., :5] for x in (q, k)]
    exact = q @ k.swapaxes(-1, -2)
    np.testing.assert_allclose(cut[0] @ cut[1].swapaxes(-1, -2), exact, atol=1e-4 * np.abs(exact).max())
    assert np.allclose(find_basis(moments, model, params).values, found.values)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_loss(name: str) -> None:
    """All channels: that of the model. Fewer: a query reads its own page and the first whole."""
    model, params = made(name)
    turned = change_basis(model, params, basis(model))
    windows = np.random.default_rng(0).integers(0, 96, (2, 150)).astype(np.int32)
    loss = Loss(*turned, windows)
    c = model.config

    def plain(tokens: np.ndarray) -> float:
        hidden, _ = model.forward(params, tokens, jnp.arange(len(tokens)), None, dense_attend(model))
        logprobs = jax.nn.log_softmax(model.logits(params, hidden))
        return float(-np.mean([logprobs[i, tokens[i + 1]] for i in range(len(tokens) - 1)]))

    np.testing.assert_allclose(loss(full(c.layers, c.head_dim)), np.mean([plain(w) for w in windows]), rtol=1e-5)
    few = ((16, 16),) * c.layers
    assert abs(loss(few) - loss(full(c.layers, c.head_dim))) > 1e-4
    near = Loss(*turned, windows[:, :128])
    np.testing.assert_allclose(near(few), near(full(c.layers, c.head_dim)), rtol=1e-6)


def test_the_bundled_model_twice(tmp_path: Path, bundled_model: tuple[Any, Any]) -> None:
    """The same arguments give the same file, which serves the model it was made for."""
    model, params = bundled_model
    found = [calibrate(bundled.path(), "bundled", sample(), SMALL) for _ in range(2)]
    files = [tmp_path / "a.kvcal", tmp_path / "b.kvcal"]
    for file, one in zip(files, found, strict=True):
        write_calibration(file, one.calibration)
    assert files[0].read_bytes() == files[1].read_bytes()
    read = read_calibration(files[0], model, params)
    assert read.channels == found[0].calibration.channels and read.digest
    assert read.kept < 1 and found[0].kept <= found[0].dense * 1.02
    text = table(found[0])
    assert f"{read.kept:.1%} of the channels" in text and text.count("|") == 5 * (2 + model.config.layers)


def test_a_share_is_kept() -> None:
    options = CalibrateOptions(tokens=256, held_out=128, window=128, channels=(32,), keep=0.75, groups=2)
    channels = calibrate(bundled.path(), "bundled", sample(), options).calibration.channels
    assert sum(map(sum, channels)) <= 0.75 * 6 * 128 and len(set(channels)) <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["-o", "nowhere/file"], "there is no folder nowhere"),
        (["--channels", "40"], "--channels 40: a head of this model keeps"),
        (["--dtype", "float16"], "--dtype float16"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, words: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(ConfigError, match="fewer than two --window of 1024"):
        calibrate(bundled.path(), "bundled", "Once upon a time", CalibrateOptions())
