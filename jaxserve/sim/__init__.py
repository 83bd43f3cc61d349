"""Scheduling in virtual time: traces, cost models, replicas that run the engine's scheduler, metrics. No jax."""
