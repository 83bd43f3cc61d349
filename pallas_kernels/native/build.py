"""Compiles a C file of this folder for this machine, once, and registers what is in it with XLA. Knows no kernel."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

_SOURCES = Path(__file__).parent
_COMPILERS = ("gcc", "cc", "clang")
_FLAGS = ("-std=gnu11", "-O3", "-Wall", "-shared", "-fPIC", "-mprefer-vector-width=512")
# Sums may be taken in the order that suits vectors. Not -ffast-math: a library linked with it makes the whole process
# flush denormals to zero.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_nobody_looks_up = threading.Condition()
_lookups = 0
_registered: dict[str, tuple[str, str, dict[str, Any]]] = {}
_failed: set[str] = set()


@functools.cache
def compiler() -> str | None:
    """Path of the C compiler: $CC, or the first of gcc, cc and clang; None where there is none.

    JAXSERVE_NATIVE=0 stands for none.
    """
    if os.environ.get("JAXSERVE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    return next(
        (path for name in (os.environ.get("CC") or "", *_COMPILERS) if name and (path := shutil.which(name))), None
    )


@functools.cache
def identity() -> str:
    """What the machine code depends on beyond the sources: part of the key of every program that calls it."""
    path = compiler()
    if path is None:
        return "no C compiler"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{path} {version.partition(chr(10))[0]}"


def target(symbol: str, source: str, defines: Mapping[str, Any]) -> str | None:
    """Name of the custom call that runs function `symbol` of `source` compiled with `defines`; None if it cannot be
    compiled here, which is logged once."""
    name = "_".join(["jaxserve", symbol, *(str(value).lower() for value in defines.values())])
    with _lock:
        if name in _registered:
            return name
        if name in _failed or compiler() is None:
            return None
        try:
            library = ctypes.CDLL(str(_compiled(name, source, [f"-D{key}={value}" for key, value in defines.items()])))
        except (OSError, subprocess.SubprocessError) as error:
            _failed.add(name)
            said = getattr(error, "stderr", None) or error
            _log.warning("%s could not be compiled for this CPU; XLA's own operations run instead: %s", name, said)
            return None
        with _nobody_looks_up:
            _nobody_looks_up.wait_for(lambda: _lookups == 0)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
        _registered[name] = symbol, source, dict(defines)
        return name


@contextmanager
def lookups() -> Iterator[None]:
    """Around the compiling or loading of programs that may have custom calls: meanwhile nothing is registered, because
    XLA does not promise that its registry may be written while others read it. Do not trace inside."""
    global _lookups
    with _nobody_looks_up:
        _lookups += 1
    try:
        yield
    finally:
        with _nobody_looks_up:
            _lookups -= 1
            _nobody_looks_up.notify_all()


def registered() -> list[tuple[str, str, dict[str, Any]]]:
    """The arguments of `target` for every custom call there is by now: a program from a cache needs those again that
    were there when it was compiled."""
    with _lock:
        return list(_registered.values())


def _compiled(name: str, source: str, defines: list[str]) -> Path:
    """The library, from the cache or made now."""
    path = compiler() or ""
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [path, *_FLAGS, *_MATH, native, *defines, "-I", jax.ffi.include_dir(), str(_SOURCES / source)]
    digest = hashlib.sha256("\n".join([*command, identity(), cpu(), jax.__version__]).encode())
    for file in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(file.read_bytes())
    library = _folder() / f"{name}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*command, "-o", str(partial), "-lm"], capture_output=True, text=True, check=True, timeout=300)
        partial.replace(library)
    return library


@functools.cache
def _folder() -> Path:
    """A folder for libraries that nobody else may write: loading one runs its code."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(f"{base}/jaxserve/native").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    own = Path(tempfile.mkdtemp(prefix="jaxserve-native-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def cpu() -> str:
    """The features of this machine's CPU, which compilers pick from."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
