"""Compiling for GPUs that are not attached, and reading facts from the result. Needs the extra `aot`, but no GPU."""

from jaxserve.aot.compile import Facts, compile_for
from jaxserve.aot.targets import AotUnavailableError, Target, targets

__all__ = ["AotUnavailableError", "Facts", "Target", "compile_for", "targets"]
