"""Compiled programs on disk, and a count of compilations that nobody declared. Knows nothing of models or plans.

An executable is only as trustworthy as the folder it lies in (loading one runs code), so the folder must belong to the
user and be writable by nobody else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental import serialize_executable

import jaxserve
import pallas_kernels
from jaxserve.config import ConfigError
from pallas_kernels.native import build as native

log = logging.getLogger(__name__)

_loading = threading.Lock()
"""One program is loaded at a time, in some 40 ms. Two threads were in XLA's loader when a process crashed for want of
memory maps (see ProgramSet.close); whether it minds two otherwise is not known."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class ExecutableCache:
    """Executables under a key: what each depends on beyond the code, the jax version and this machine. The first line
    of a key is the program's name. A file that cannot be loaded counts as absent and is written anew."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._identity = "\n".join([_code_hash(), _platform_identity()])
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"--compile-cache {folder}: {error.strerror}; name a folder of your own, or `none` to keep nothing"
            ) from None
        state = folder.stat()
        if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
            raise PermissionError(
                f"--compile-cache {folder} is owned or writable by other users; loading programs "
                f"from it would run their code. Use a folder of your own (chmod 700)."
            )

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(f"{self._identity}\n{key}".encode()).hexdigest()[:40]
        return self.folder / f"{digest}.xla"

    def load(self, key: str, args: tuple, out: Any) -> Any | None:
        """The executable under `key` for arguments like `args` with results like `out` (pytrees), or None."""
        path = self._path(key)
        try:
            calls, _, payload = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        trees = jax.tree.structure((args, {})), jax.tree.structure(out)
        try:
            # XLA looks its custom calls up when it loads a program.
            for call in json.loads(calls):
                native.target(*call)
            with _loading, native.lookups():
                loaded = serialize_executable.deserialize_and_load(payload, *trees)
        except Exception:  # whatever a damaged or foreign file provokes inside XLA
            return None
        os.utime(path)
        return loaded

    def store(self, key: str, compiled: Any) -> None:
        """Keeps an executable, where it can be kept."""
        try:
            payload, _, _ = serialize_executable.serialize(compiled)
        except (ValueError, NotImplementedError):
            return
        path = self._path(key)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")
        try:
            partial.write_bytes(json.dumps(native.registered()).encode() + b"\n" + payload)
            partial.replace(path)
        except OSError as error:  # a full disk costs the next start time, not this one
            partial.unlink(missing_ok=True)
            name = key.partition("\n")[0]
            log.warning("--compile-cache: %s is not kept for the next start: %s", name, error)


def _code_hash() -> str:
    """Of every source file of the packages: a change anywhere may change a program."""
    digest = hashlib.sha256()
    for package in (jaxserve, pallas_kernels):
        root = Path(package.__file__ or "").parent
        for path in sorted(path for kind in ("*.py", "*.[ch]") for path in root.rglob(kind)):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _platform_identity() -> str:
    device = jax.devices()[0]
    features = native.cpu() + native.identity() if device.platform == "cpu" else ""
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        f"{jax.__version__} {device.device_kind} {device.client.platform_version} {os.cpu_count()} {features} {flags}"
    )


class CompileCounter:
    """Counts compilations in the middle of steps: each is a stall that requests waited for.

    Loading, the background compiler and whatever else the process compiles are not steps and do not count.
    """

    def __init__(self) -> None:
        self.undeclared = 0
        self._local = threading.local()
        self._listening = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a step, on the loop's thread."""
        if not self._listening:
            # Listeners of jax cannot be taken back one by one, so one counter serves the process.
            monitoring.register_event_duration_secs_listener(self._on_event)
            self._listening = True
        self._local.watching = True
        try:
            yield
        finally:
            self._local.watching = False

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and getattr(self._local, "watching", False):
            self.undeclared += 1


compile_counter = CompileCounter()
