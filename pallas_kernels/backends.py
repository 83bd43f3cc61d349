"""Which implementation of an op runs. Knows the platforms, not the ops."""

from __future__ import annotations

from typing import TypeVar

import jax

from pallas_kernels.native.build import compiler

Kind = TypeVar("Kind")
BACKENDS = ("reference", "tiled", "native", "invariant", "triton", "mosaic", "cudnn")
"""`reference`: jnp. `tiled`: jnp, every decode row computed as a prefill tile, so that a token's bits depend neither
on the rows beside it nor on whether it came by decode or by prefill. `native`: C on CPUs, with a kernel of its own
for prefill; sizes that it does not take run on `reference`. `invariant`: C, one kernel for both; other sizes run on
`tiled`, and so does everything where no C can run. `triton`: Pallas, Triton lowering. `mosaic`: Pallas, Mosaic GPU
lowering, for Hopper and dense 16-bit KV; anything else runs on `triton`. `cudnn`: what a chunk of a prefill reads of
itself in dense 16-bit KV runs on cuDNN (`chunk_attention`), everything else on `triton`."""


def resolve(backend: str | None) -> str:
    """`backend`, or the platform's default: triton on GPUs; on CPUs native where there is a C compiler, else reference.
    ValueError for an unknown name."""
    on_gpu = jax.default_backend() in ("gpu", "cuda")
    if backend is None:
        if on_gpu:
            return "triton"
        return "native" if compiler() else "reference"
    if backend == "invariant" and (on_gpu or not compiler()):
        return "tiled"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}.")
    return backend


def runs_kernels(backend: str | None) -> bool:
    """Whether the op runs as a Pallas kernel, which wants its pages in rows."""
    return resolve(backend) in ("triton", "mosaic", "cudnn")


def layout_for(backend: str | None, *, kernels: Kind, host: Kind, reference: Kind) -> Kind:
    """Of layouts that hold the same pages, the one that `backend` reads best: that of GPUs' kernels, of CPUs' or of the
    reference walk."""
    if runs_kernels(backend):
        return kernels
    return host if resolve(backend) in ("native", "invariant") else reference
