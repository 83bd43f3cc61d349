"""Which layout of floats a backend reads best."""

from __future__ import annotations

from typing import Any

from pallas_kernels.backends import layout_for
from pallas_kernels.layouts.columns import Columns
from pallas_kernels.layouts.dense import Dense
from pallas_kernels.layouts.host_dense import HostDense
from pallas_kernels.layouts.layout import FloatLayout


def float_layout(dtype: Any, backend: str | None) -> FloatLayout:
    """Floats of `dtype` as `backend` wants them; None is the platform's. See `pallas_kernels.backends`."""
    kind: type[Any] = layout_for(backend, kernels=Dense, host=HostDense, reference=Columns)
    layout: FloatLayout = kind(dtype)
    return layout
