"""KV formats that slow tests run on: a few by default, others on request."""

from __future__ import annotations

import os

from jaxserve.kv import formats


def chosen(*default: str) -> list[str]:
    """`default`, or what the environment names: KV_FORMATS=all, KV_FORMATS=kivi4,hack8."""
    wanted = os.environ.get("KV_FORMATS", "")
    if wanted == "all":
        return [name for name in formats.names() if not name.startswith("test-")]
    return wanted.split(",") if wanted else list(default)
