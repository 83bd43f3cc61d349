"""Which implementation of an op runs. Knows the platforms, not the ops."""

from __future__ import annotations

import jax

BACKENDS = ("reference", "triton")


def resolve(backend: str | None) -> str:
    """`backend`, or the platform's default: triton on GPUs, reference elsewhere. ValueError for an unknown name."""
    if backend is None:
        return "triton" if jax.default_backend() in ("gpu", "cuda") else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}.")
    return backend
