"""A calibration from beginning to end: text, moments, basis, choice of channels."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from jaxserve.calibrate.choice import fewest, in_groups, path
from jaxserve.calibrate.loss import Loss, full, rise
from jaxserve.calibrate.moments import collect
from jaxserve.calibrate.options import CalibrateOptions
from jaxserve.calibrate.rotations import find_basis
from jaxserve.checkpoint.kv_calibration import Channels, KVCalibration, share
from jaxserve.checkpoint.load import load_model
from jaxserve.config import ConfigError
from jaxserve.models.basis import change_basis, fingerprint
from jaxserve.text.tokenizer import Tokenizer

QUICK = 4
"""The order in which channels go is found on this part of the held-out text; how far to go, on all of it."""


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and what its choice costs on the held-out text: perplexity before and after."""

    calibration: KVCalibration
    dense: float
    kept: float


def sample() -> str:
    """The text that comes with the package (data/README.md)."""
    return gzip.decompress((files("jaxserve.calibrate") / "data" / "sample.txt.gz").read_bytes()).decode()


def calibrate(
    folder: Path,
    name: str,
    text: str,
    options: CalibrateOptions,
    *,
    dtype: str = "float32",
    progress: bool = False,
) -> Calibrated:
    """Calibrates the model in `folder`, called `name`, on `text`. The same arguments give the same calibration.

    Raises:
        ConfigError: a text that is too short, numbers of channels that the model cannot keep.
        CheckpointError: a model that cannot be read.
    """
    model, params = load_model(folder, dtype)
    c = model.config
    sizes = options.sizes(c.head_dim)
    calibration, held_out = split(Tokenizer.from_folder(folder).encode(text), options, c.max_position)
    with _bar(len(calibration), "moments", "window", progress) as done:
        basis = find_basis(collect(model, params, calibration, done), model, params)
    turned = change_basis(model, params, basis)
    loss, quick = Loss(*turned, held_out), Loss(*turned, held_out[: max(1, len(held_out) // QUICK)])
    everything = full(c.layers, c.head_dim)
    with _bar(2 * c.layers * (len(sizes) - 1), "losses", "choice", progress) as done:
        choices = [in_groups(one, options.groups, c.head_dim) for one in path(c.layers, c.head_dim, sizes, quick, done)]

    def within_bound(choice: Channels) -> bool:
        return all(rise(measure(choice), measure(everything)) <= options.loss_bound for measure in (quick, loss))

    if options.keep is None:
        chosen = fewest(choices, within_bound, c.head_dim)
    else:
        chosen = next((choice for choice in choices if share(choice, c.head_dim) <= options.keep), choices[-1])
        if (least := share(chosen, c.head_dim)) > options.keep:
            raise ConfigError(f"--keep {options.keep}: the fewest of --channels {min(sizes)} leave {least:.2f}")
    dense, lost = loss(everything), loss(chosen)
    made = {
        "text": hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
        "tokens": calibration.size,
        "held_out": held_out.size,
        "perplexity": [round(math.exp(dense), 4), round(math.exp(lost), 4)],
    }
    found = KVCalibration(basis, chosen, fingerprint(model, params), name, made)
    return Calibrated(found, math.exp(dense), math.exp(lost))


def split(tokens: list[int], options: CalibrateOptions, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate with and to measure on, int32 [count, window] each: what is measured lies between, so that
    both are of all parts of the text."""
    size = min(options.window, longest)
    wanted, held = options.tokens // size, options.held_out // size
    there = len(tokens) // size
    if there < 2:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than two --window of {size}")
    windows = np.asarray(tokens[: there * size], np.int32).reshape(there, size)[: wanted + held]
    held = max(1, min(held, len(windows) // 4))
    at = (
        np.linspace(0, len(windows) - 1, held + 2).round().astype(int)[1:-1]
        if held + 2 <= len(windows)
        else np.array([1])
    )
    rest = np.delete(windows, at, axis=0)
    return rest, windows[at]


def table(found: Calibrated) -> str:
    """Channels by layer and what they cost, for people."""
    calibration = found.calibration
    head_dim = calibration.basis.keys.shape[-1]
    rows = [
        f"| {layer} | {k} | {v} | {(k + v) / (2 * head_dim):.0%} |" for layer, (k, v) in enumerate(calibration.channels)
    ]
    more = rise(math.log(found.kept), math.log(found.dense))
    return "\n".join(
        [
            "| layer | channels of keys | of values | kept |",
            "|---:|---:|---:|---:|",
            *rows,
            f"\n{calibration.kept:.1%} of the channels of sealed pages, in {len(set(calibration.channels))} KV groups; "
            f"perplexity of held-out text {found.dense:.3f} -> {found.kept:.3f} ({more:+.2f} %).\n",
        ]
    )


@contextmanager
def _bar(total: int, label: str, unit: str, progress: bool) -> Iterator[Callable[[], object]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True, disable=not progress) as bar:
        yield bar.update
