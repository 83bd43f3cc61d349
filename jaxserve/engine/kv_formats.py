"""Which KV format each layer has: from options, model and checkpoint to KV groups. Knows no pool and no program."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from jaxserve.checkpoint.kv_calibration import KVCalibration
from jaxserve.checkpoint.kv_scales import read_kv_scales
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.kv import KVFormat, SealedFormat, formats, split_groups
from jaxserve.kv.eight_bit import Fp8E4M3Format
from jaxserve.kv.zeroc import held_by
from jaxserve.models.model import Model
from jaxserve.types import KVGroup
from pallas_kernels.chunk_attention import missing

KV_OF_DTYPE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

ATTENTION_TYPES = ("full_attention", "sliding_window")

FLAG = "--kv-cache-dtype-layers"


def kv_groups(
    config: EngineConfig, model: Model, folder: Path, on_gpu: bool, calibration: KVCalibration | None = None
) -> tuple[tuple[KVGroup, ...], tuple[KVFormat, ...]]:
    """The KV groups of `model`, loaded from `folder`, and the format of each. `calibration`: in whose basis the model
    is, for ZeroC.

    Raises:
        ConfigError: a format that does not exist or cannot hold the KV of this model; layers that do not exist or get
            two formats; an option that no format in use has; ZeroC without a calibration, or the other way round.
    """
    whole = tuple(structs.replace(group, page_tokens=config.cache.block_size) for group in model.kv_groups())
    names = _names(config, whole)
    try:
        held = [held_by(name) for name in names]
        if any(held) and calibration is None:
            raise ValueError("--kv-cache-dtype zeroc needs --kv-calibration FILE; `jaxserve calibrate` makes it")
        if calibration is not None and not any(held):
            raise ValueError("--kv-calibration says what --kv-cache-dtype zeroc keeps; no layer has that format")
        named = [inner or _named(name, model, on_gpu) for inner, name in zip(held, names, strict=True)]
        made = _made(config, set(named), on_gpu)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    layer_formats = [made[name] for name in named]
    if calibration is not None:
        kept = zip(layer_formats, held, calibration.channels, strict=True)
        layer_formats = [
            replace(format, channels=channels) if inner and isinstance(format, SealedFormat) else format
            for format, inner, channels in kept
        ]
    if config.cache.kv_key_rotation == "auto":
        layer_formats = [
            replace(format, key_rotation=format.usual_rotation) if isinstance(format, SealedFormat) else format
            for format in layer_formats
        ]
    groups, group_formats = split_groups(whole, layer_formats)
    group_formats = _calibrated(groups, group_formats, folder, len(names))
    for group, format in zip(groups, group_formats, strict=True):
        try:
            format.kinds(group)
        except ValueError as error:
            hint = (
                ""
                if calibration is None
                else f" (`jaxserve calibrate --channels` says how many {calibration.name} may keep)"
            )
            text = f"{error}{hint}"
            raise ConfigError(f"{_layers_text(group.layers)}: {text}" if len(groups) > 1 else text) from None
    return groups, group_formats


def _names(config: EngineConfig, groups: Sequence[KVGroup]) -> list[str]:
    """By layer, the format's name in the options."""
    layers = sum(len(group.layers) for group in groups)
    named: dict[int, str] = {}
    for given in config.cache.kv_cache_dtype_layers:
        name, equals, which = given.partition("=")
        if not equals or not which:
            raise ConfigError(f"{FLAG} {given!r} is not FORMAT=LAYERS, such as bf16=0,1,-1")
        for layer in sorted({layer for part in which.split(",") for layer in _layers(part.strip(), groups, layers)}):
            if named.setdefault(layer, name) != name:
                raise ConfigError(f"{FLAG}: layer {layer} is to be {named[layer]} and {name}; leave it out of one")
    return [named.get(layer, config.cache.kv_cache_dtype) for layer in range(layers)]


def _layers(part: str, groups: Sequence[KVGroup], layers: int) -> Sequence[int]:
    """The layers that `part` means: 3, -1 (the last), 4-7 or a type of attention."""
    if part in ATTENTION_TYPES:
        found = [layer for g in groups if (g.window is None) == (part == "full_attention") for layer in g.layers]
        if not found:
            raise ConfigError(f"{FLAG} {part}: no layer of this model has that type of attention")
        return found
    match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part)
    if match is None:
        raise ConfigError(
            f"{FLAG}: {part!r} names no layers; they are numbers (3; -1 is the last), ranges (4-7) "
            f"or {' or '.join(ATTENTION_TYPES)}"
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not (-layers <= first <= last < layers) or (first < 0 and match[2] is not None):
        raise ConfigError(f"{FLAG} {part}: this model has layers 0 to {layers - 1}; write ranges as FIRST-LAST")
    return range(first % layers, last % layers + 1)


def _named(name: str, model: Model, on_gpu: bool) -> str:
    if name == "auto":
        return KV_OF_DTYPE[model.dtype.name] if on_gpu else "f16"
    return name


def _made(config: EngineConfig, names: set[str], on_gpu: bool) -> dict[str, KVFormat]:
    """The formats in use by name, each with those options that it has."""
    cache = config.cache
    if cache.prefill_exact and config.runtime.batch_invariant:
        raise ValueError(
            "--prefill-exact makes results depend on where chunks begin, and so on what shares the batch, which "
            "--batch-invariant excludes; leave out one"
        )
    sealing = {
        "sink_pages": cache.kv_sink_pages,
        "residual_pages": cache.kv_residual_pages,
        "prefill_exact": cache.prefill_exact or None,
        "quant_group": cache.kv_quant_group,
        "key_rotation": None if cache.kv_key_rotation == "auto" else cache.kv_key_rotation,
    }
    options: dict[str, Any] = {"backend": attention_backend(config, on_gpu)}
    options |= {option: value for option, value in sealing.items() if value is not None}
    # An option that all formats lack goes to each of them and is refused there.
    nowhere = set(options) - {option for name in names for option in formats.options(name)}
    return {
        name: formats.get(name, **{o: v for o, v in options.items() if o in nowhere or o in formats.options(name)})
        for name in sorted(names)
    }


def _calibrated(
    groups: Sequence[KVGroup], group_formats: Sequence[KVFormat], folder: Path, layers: int
) -> tuple[KVFormat, ...]:
    """With the checkpoint's scales in fp8 formats.

    Raises:
        ConfigError: an option that such scales exclude.
    """
    if not any(isinstance(format, Fp8E4M3Format) for format in group_formats):
        return tuple(group_formats)
    scales = read_kv_scales(folder, layers)
    try:
        return tuple(
            replace(format, calibrated=tuple(scales[layer] for layer in group.layers))
            if scales and isinstance(format, Fp8E4M3Format)
            else format
            for group, format in zip(groups, group_formats, strict=True)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _layers_text(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def attention_backend(config: EngineConfig, on_gpu: bool) -> str | None:
    """Of the attention ops; None is the platform's own.

    Raises:
        ConfigError: a backend that does not run here or excludes another option.
    """
    backend = config.runtime.attention_backend
    if backend in ("triton", "mosaic", "cudnn") and not on_gpu:
        raise ConfigError(f"--attention-backend {backend} needs a GPU; this engine runs on a CPU")
    if backend == "cudnn" and (reason := missing()):
        raise ConfigError(f"--attention-backend cudnn: {reason}; leave it out")
    if backend == "native" and on_gpu:
        raise ConfigError("--attention-backend native is for CPUs; this engine runs on a GPU")
    if config.runtime.batch_invariant:
        if backend != "auto":
            raise ConfigError(f"--batch-invariant has attention of its own: leave out --attention-backend {backend}")
        # A row's bits must not depend on how its KV came about, either.
        return "invariant"
    return None if backend == "auto" else backend
