"""The file of a KV calibration: what was written is read, and what is not for this model is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.kv_calibration import KVCalibration, read_calibration, write_calibration
from jaxserve.models.basis import fingerprint
from tests.models.test_basis import basis, made


@pytest.fixture(scope="module")
def calibration() -> KVCalibration:
    model, params = made("qwen3")
    return KVCalibration(basis(model), ((32, 16), (16, 16)), fingerprint(model, params), "a model", {"tokens": 3})


def test_there_and_back(calibration: KVCalibration, tmp_path: Path) -> None:
    write_calibration(tmp_path / "c", calibration)
    found = read_calibration(tmp_path / "c", *made("qwen3"))
    np.testing.assert_array_equal(found.basis.keys, calibration.basis.keys)
    np.testing.assert_array_equal(found.basis.values, calibration.basis.values)
    assert dataclasses.replace(found, basis=calibration.basis, digest="") == calibration
    assert found.kept == 80 / 128
    write_calibration(tmp_path / "d", dataclasses.replace(calibration, channels=((32, 32), (16, 16))))
    assert read_calibration(tmp_path / "d", *made("qwen3")).digest != found.digest


def test_another_model_is_refused(calibration: KVCalibration, tmp_path: Path) -> None:
    write_calibration(tmp_path / "c", calibration)
    with pytest.raises(CheckpointError, match=r"made for another model \(a model\)"):
        read_calibration(tmp_path / "c", *made("llama with biases"))


def test_what_is_no_calibration_is_refused(calibration: KVCalibration, tmp_path: Path) -> None:
    model, params = made("qwen3")
    keys = calibration.basis.keys
    about = {"kind": "jaxserve-kv-calibration-1", "model": calibration.model, "name": "x", "made": {}}

    def write(tensors, metadata) -> None:
        save_file(tensors, tmp_path / "c", {"jaxserve": json.dumps(metadata)})

    cases = [
        (lambda: None, "cannot be read"),
        (lambda: (tmp_path / "c").write_bytes(b"nothing of the kind"), "damaged"),
        (lambda: write({"x": keys}, {}), "no KV calibration of this version"),
        (lambda: write({"keys": keys}, about), "damaged"),
        (lambda: write({"keys": keys * 2, "values": keys}, about), "damaged.*orthogonal"),
        (lambda: write({"keys": keys, "values": keys}, about | {"channels": [[16, 16]]}), "keeps"),
        (lambda: write({"keys": keys, "values": keys}, about | {"channels": [[16, 48]] * 2}), "keeps"),
    ]
    for prepare, words in cases:
        prepare()
        with pytest.raises(CheckpointError, match=words):
            read_calibration(tmp_path / "c", model, params)
