"""What stands for a weight of another format in a parameter tree. Knows nothing of how codes are made or multiplied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """A weight matrix [in, out] as codes and at most one metadata leaf, because dispatch time grows with the leaves.

    Attributes:
        codes: shape and packing as the format defines (int8: integers [in, out]).
        scale: float32 metadata, shape as the format defines (int8: [out]); None where it has none.
        format: name of the weight format that made it; static.
        columns: of the matrix, where the codes do not say; static.
    """

    codes: Any
    scale: Any
    format: str = field(metadata={"static": True})
    columns: int | None = field(default=None, metadata={"static": True})
