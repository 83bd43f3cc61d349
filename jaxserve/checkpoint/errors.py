"""What goes wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read. The message names the file, the tensor where there is one, and the fault."""
