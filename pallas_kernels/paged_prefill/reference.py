"""Paged prefill attention in jnp: the definition, and the production path on CPUs."""

from __future__ import annotations

from pallas_kernels.walk import walk as paged_prefill

__all__ = ["paged_prefill"]
