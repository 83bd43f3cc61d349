"""Kernels for CPUs, in C, called through XLA's foreign function interface.

XLA on a CPU copies each KV page out of the pool before it multiplies, and spends a microsecond on every small product;
these kernels read pages where they lie. They are compiled when first traced, by the C compiler of the machine, for this
machine and for the sizes of the model; where there is no compiler the ops run on their jnp reference.
"""
