"""Facts from the PTX of compiled kernels: registers, spills, shared memory, matrix instructions. Runs ptxas, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.[.\w]+")
_LAUNCH = re.compile(r"\] (\w+) grid: .*shared_memory: (\d+) bytes")
_ENTRY = re.compile(r"\.entry (\w+)\(")


class PtxasMissingError(RuntimeError):
    """There is no ptxas on this machine; the message says what to install."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, as ptxas reports it. `matrix` counts matrix instructions by kind, shape and operand types.
    `launch_shared_bytes`: what the compiler's dump says is allocated at launch beside `static_shared_bytes`; 0 where it
    does not say (Mosaic)."""

    name: str
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    launch_shared_bytes: int
    matrix: Counter[str]


def ptxas() -> str:
    """Path of ptxas: the one of the CUDA wheels, or the one on PATH. Raises PtxasMissingError."""
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder) / "bin" / "ptxas").exists():
                return str(path)
    if found := shutil.which("ptxas"):
        return found
    raise PtxasMissingError("ptxas is missing: pip install 'jaxserve[aot]'")


def kernels(folder: Path, arch: str) -> dict[str, Kernel]:
    """Every kernel of the PTX files in `folder`, by name, assembled for `arch` such as sm_90a."""
    found = {}
    launches = "".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    shared = {name: int(size) for name, size in _LAUNCH.findall(launches)}
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        if ".entry" not in text:  # the compiler also dumps modules without kernels, and empty ones
            continue
        own = path.with_suffix(".ptxas")
        report_text = own.read_text() if own.exists() else _assemble(path, arch)
        bodies = _bodies(text)
        for report in report_text.split("ptxas info    : Compiling entry function ")[1:]:
            name = report.split("'")[1]
            spills, used = _SPILLS.search(report), _USED.search(report)
            if spills is None or used is None:
                raise RuntimeError(f"ptxas reports nothing about {name}: {report.strip()}")
            found[name] = Kernel(
                name=name,
                registers=int(used[1]),
                spill_bytes=int(spills[2]) + int(spills[3]),
                static_shared_bytes=int(used[2] or 0),
                launch_shared_bytes=shared.get(name, 0),
                matrix=Counter(_MATRIX.findall(bodies.get(name, ""))),
            )
    return found


def _assemble(path: Path, arch: str) -> str:
    """What ptxas says about a PTX file. Mosaic's compiler needs none of this: it brings an assembler, perhaps a newer
    one than is here, and leaves its report beside the file."""
    command = [ptxas(), "-v", f"-arch={arch}", str(path), "-o", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas refuses {path.name}: {run.stderr.strip()}")
    return run.stderr


def _bodies(text: str) -> dict[str, str]:
    starts = [m.start() for m in _ENTRY.finditer(text)]
    return {
        _ENTRY.match(text, start)[1]: text[start:end]  # type: ignore[index]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=False)
    }
