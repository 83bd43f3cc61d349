"""Compiles a function for a target and says what came out. Runs nothing."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.sharding import SingleDeviceSharding

from jaxserve.aot import hlo
from jaxserve.aot.targets import Target

CUDNN = 91_000
"""The version that targets have: 9.10, by cuDNN's numbers."""


@dataclass(frozen=True)
class Facts:
    """What a compiled program needs and does, per device.

    `argument_bytes`, `output_bytes`, `temporary_bytes` and `aliased_bytes` are exact: the compiler's own assignment.
    `aliases` maps output index to parameter number for buffers updated in place.
    """

    text: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    compile_s: float

    def copies(self, at_least: int = 1 << 20) -> list[hlo.Copy]:
        return hlo.copies(self.text, at_least)

    @property
    def aliases(self) -> dict[str, int]:
        return hlo.aliases(self.text)

    @property
    def collectives(self) -> Counter[str]:
        return hlo.collectives(self.text)

    @property
    def dot_flops(self) -> int:
        return hlo.dot_flops(self.text)

    @property
    def custom_calls(self) -> Counter[str]:
        return hlo.custom_calls(self.text)


def compile_for(
    target: Target, function: Callable, args: Sequence[Any], donate: Sequence[int] = (), dump: Path | None = None
) -> Facts:
    """Compiles `function` for one GPU of `target`; `args` are pytrees of anything with shape and dtype.

    `dump`: an empty folder that takes the compiler's files, PTX among them (see ptx.kernels).

    Raises:
        AotUnavailableError: see targets.Target.devices.
    """
    place = SingleDeviceSharding(target.devices(1)[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tuple(args))
    start = time.perf_counter()
    jitted = jax.jit(function, donate_argnums=tuple(donate), out_shardings=place)
    with _mosaic_dumps_to(dump), _cudnn_of(target):
        compiled = jitted.lower(*shapes).compile(compiler_options={"xla_dump_to": str(dump)} if dump else None)
    memory: Any = compiled.memory_analysis()
    return Facts(
        text=compiled.as_text() or "",
        argument_bytes=int(memory.argument_size_in_bytes),
        output_bytes=int(memory.output_size_in_bytes),
        temporary_bytes=int(memory.temp_size_in_bytes),
        aliased_bytes=int(memory.alias_size_in_bytes),
        compile_s=time.perf_counter() - start,
    )


@contextmanager
def _cudnn_of(target: Target) -> Iterator[None]:
    """jax asks the machine that compiles whether cuDNN runs there; the target has one that does."""
    before = fused.check_cudnn_version, fused.check_compute_capability
    fused.check_cudnn_version = lambda: CUDNN
    fused.check_compute_capability = lambda least: target.capability >= tuple(map(int, least.split(".")))
    try:
        yield
    finally:
        fused.check_cudnn_version, fused.check_compute_capability = before


@contextmanager
def _mosaic_dumps_to(folder: Path | None) -> Iterator[None]:
    """Mosaic's compiler runs inside XLA's and listens to the environment alone."""
    if folder is None:
        yield
        return
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        else:
            os.environ["MOSAIC_GPU_DUMP_TO"] = before
