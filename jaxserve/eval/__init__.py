"""The quality harness: what does a technique cost in answers?

It is a client of the engine like any other (`LLM`): the programs, KV cache and scheduler that serve are the ones
measured. Imports no jax.
"""
