"""Programs on disk, and the count of compilations in the middle of steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ConfigError
from jaxserve.engine.executables import CompileCounter, ExecutableCache
from pallas_kernels.native.build import compiler


def compiled(scale: float):
    return jax.jit(lambda x: x * scale).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()


def test_only_compilations_within_a_step_are_counted() -> None:
    counter = CompileCounter()  # not the process's own: other tests hold engines to 0 there
    with counter.watching():
        compiled(2.0)
    assert counter.undeclared == 1
    compiled(3.0)
    assert counter.undeclared == 1


def test_an_executable_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    x = jnp.arange(4.0)
    cache = ExecutableCache(tmp_path / "cache")
    assert cache.load("double", (x,), 0) is None
    cache.store("double", compiled(2.0))
    loaded = cache.load("double", (x,), 0)
    assert loaded is not None and loaded(x).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert cache.load("double\nof something else", (x,), 0) is None


STORE = """
import jax, jax.numpy as jnp, sys
from pathlib import Path
from jaxserve.engine.executables import ExecutableCache
from jaxserve.quant import linear, quantize
x, w = jnp.ones((2, 8)), quantize("panels", jnp.ones((8, 32)))
program = jax.jit(linear).lower(x, w).compile()
ExecutableCache(Path(sys.argv[1])).store("linear", program)
"""


@pytest.mark.skipif(compiler() is None, reason="no C compiler on this machine")
def test_a_program_with_a_kernel_of_ours_loads_where_nothing_was_traced(tmp_path: Path) -> None:
    """In another process than the one that stored it, where XLA knows its custom call only if loading says so."""
    load = (
        STORE.rpartition("program =")[0]
        + """
loaded = ExecutableCache(Path(sys.argv[1])).load("linear", (x, w), 0)
assert loaded is not None and (loaded(x, w) == 8).all()
"""
    )
    for script in (STORE, load):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "cache")], check=True, timeout=120)


def test_a_damaged_file_counts_as_absent(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "cache")
    cache.store("double", compiled(2.0))
    [path] = cache.folder.glob("*.xla")
    path.write_bytes(path.read_bytes()[:100])
    assert cache.load("double", (jnp.arange(4.0),), 0) is None


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="--compile-cache"):
        ExecutableCache(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--compile-cache .*file/cache: Not a directory; name a folder"):
        ExecutableCache(tmp_path / "file" / "cache")


def test_what_cannot_be_kept_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ExecutableCache(tmp_path / "cache")
    cache.folder.rmdir()
    cache.store("double", compiled(2.0))
    assert "double is not kept for the next start" in caplog.text
    assert cache.load("double", (jnp.arange(4.0),), 0) is None
