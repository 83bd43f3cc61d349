"""Rows of KV formats in the recall fixture: what each keeps of a model whose recall is 1 by construction."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxserve.calibrate.moments import collect
from jaxserve.calibrate.rotations import find_basis
from jaxserve.checkpoint.kv_calibration import KVCalibration, write_calibration
from jaxserve.checkpoint.load import load_model
from jaxserve.eval.recall_fixture import PAIRS, induction, write
from jaxserve.eval.tasks import Room
from jaxserve.models.basis import fingerprint
from tests.eval.test_recall_fixture import score as recall_of


def test_codes_tell_the_truth_where_all_channels_weigh_the_same(engine_options: dict[str, Any]) -> None:
    """The fixture's codes have entries of one size: what is lost here was lost by a page, not by rounding."""
    options = {**engine_options, "max_model_len": 1088, "kv_cache_dtype": "hack2", "mode": ["single"]}
    assert recall_of(options) == {"single": 1.0}


@pytest.mark.parametrize(("kept", "recall"), [(64, 1.0), (16, 0.9)])
def test_channels_that_carry_nothing_can_go(
    kept: int, recall: float, engine_options: dict[str, Any], tmp_path: Path
) -> None:
    """The fixture's heads carry codes of 64 numbers, and phases of 32: half of their 128 channels hold all of it. An
    eighth holds too little, which shows that the file is read."""
    folder = write(tmp_path / "model")
    model, params = load_model(folder, "float32")
    document = induction(Random("calibration"), Room(1000, PAIRS, lambda text: 1))
    tokens = np.array([int(word[1:]) for word in document.context.split()], np.int32)
    found = find_basis(collect(model, params, [tokens]), model, params)
    calibration = KVCalibration(found, ((kept, kept),) * 2, fingerprint(model, params), "the fixture")
    write_calibration(tmp_path / "kvcal", calibration)
    zeroc = {"kv_cache_dtype": "zeroc", "kv_calibration": str(tmp_path / "kvcal"), "max_model_len": 1088}
    got = recall_of(engine_options, mode=["single"], **zeroc)["single"]
    assert got == recall if recall == 1.0 else got < recall
