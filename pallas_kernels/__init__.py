"""Attention over paged KV, one folder per op: `api` checks and dispatches, `reference` is the definition in jnp and the
production path on CPUs, `triton` the Pallas kernel for GPUs. Knows nothing of models, requests or engines."""
