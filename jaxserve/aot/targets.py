"""GPUs to compile for: their descriptions, and compile-only devices made from them. Touches no driver.

The process that compiles must have set JAX_PLATFORMS=cpu and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before jax was imported:
importing this module must not change how the importing process runs, so it sets nothing itself.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
from jax.experimental import topologies

FOLDER = Path(__file__).parent / "targets"


class AotUnavailableError(RuntimeError):
    """This installation cannot compile for absent GPUs; the message says what to install or set."""


@dataclass(frozen=True)
class Target:
    """A GPU by its `GpuTargetConfigProto`, in text form, and the figures a roofline needs."""

    name: str
    text: str
    memory_bytes: int
    bytes_per_s: float
    arch: str
    """As ptxas names it."""
    capability: tuple[int, int]
    """CUDA's compute capability."""

    def devices(self, count: int = 1) -> list[jax.Device]:
        """`count` compile-only devices on one host.

        Raises:
            AotUnavailableError: the CUDA compiler plugin is not installed, or the process looks for real GPUs.
        """
        return _devices(self.name, self.text, count)


def targets() -> dict[str, Target]:
    """Every described GPU by name."""
    return {path.stem: _read(path) for path in sorted(FOLDER.glob("*.txtpb"))}


def _read(path: Path) -> Target:
    text = path.read_text()
    found = re.search(r"cuda_compute_capability\s*{([^}]*)}", text)
    if found is None:
        raise ValueError(f"the target description {path} lacks cuda_compute_capability")
    fields, capability = found[1], _capability(found[1])
    return Target(
        name=path.stem,
        text=text,
        memory_bytes=int(_number(text, "device_memory_size")),
        bytes_per_s=float(_number(text, "memory_bandwidth")),
        arch="sm_{}{}{}".format(*capability, "a" if "ACCELERATED_FEATURES" in fields else ""),
        capability=capability,
    )


def _capability(fields: str) -> tuple[int, int]:
    major, minor = (re.search(rf"{part}:\s*(\d+)", fields) for part in ("major", "minor"))
    return int(major[1]) if major else 0, int(minor[1]) if minor else 0


def _number(text: str, field: str) -> str:
    for line in text.splitlines():
        name, _, value = line.strip().partition(":")
        if name == field:
            return value.strip()
    raise ValueError(f"the target description lacks {field}")


@cache
def _devices(name: str, text: str, count: int) -> list[jax.Device]:
    if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1" and not any(d.platform == "gpu" for d in jax.devices()):
        raise AotUnavailableError("set JAX_PLATFORMS=cpu and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before jax is imported")
    try:
        import jax_plugins.xla_cuda12  # noqa: F401  makes the compiler known; needs no GPU and no driver
    except ImportError:
        try:
            import jax_plugins.xla_cuda13  # noqa: F401
        except ImportError:
            raise AotUnavailableError("the CUDA compiler plugin is missing: pip install 'jaxserve[aot]'") from None
    shape = f"1x1x{count}"
    return list(
        topologies.get_topology_desc(f"{name}:{shape}", platform="cuda", target_config=text, topology=shape).devices
    )
