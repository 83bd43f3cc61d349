"""From moments to the basis of each head: singular vectors, as in ZeroC. Pure linear algebra in float64."""

from __future__ import annotations

import numpy as np

from jaxserve.calibrate.moments import Moments
from jaxserve.models.basis import HeadBasis
from jaxserve.models.model import Model, Params


def find_basis(moments: Moments, model: Model, params: Params) -> HeadBasis:
    """The right singular vectors of [Q; K] and of [V; W_o^T] of each KV head, by falling singular value.

    Both halves of a stack count the same: each is divided by its norm, because a product q k stays what it is when q
    grows and k shrinks, and the paper's stack would then follow whichever is larger.
    """
    c = model.config
    keys = [[_vectors(q, k) for q, k in zip(*layer, strict=True)] for layer in zip(moments.queries, moments.keys)]  # noqa: B905
    values = []
    for layer in range(c.layers):
        output = np.asarray(params["layers"][layer]["attention"]["o"], np.float64)
        rows = output.reshape(c.kv_heads, c.group, c.head_dim, -1)
        weights = np.einsum("hgdn,hgen->hde", rows, rows)
        values.append([_vectors(v, w) for v, w in zip(moments.values[layer], weights, strict=True)])
    return HeadBasis(np.asarray(keys, np.float32), np.asarray(values, np.float32))


def _vectors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eigenvectors of two moments [head_dim, head_dim] together, as columns: the right singular vectors of the stack of
    what they are moments of. The largest entry of each is positive."""
    both = sum(moment / max(np.trace(moment), np.finfo(float).tiny) for moment in (a, b))
    vectors = np.linalg.eigh(both)[1][:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return vectors * np.where(largest < 0, -1.0, 1.0)
