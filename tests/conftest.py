"""What all tests share. jax must see the CPU, whatever GPU wheels are installed for compile-only targets."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import hypothesis
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # What a script starts in the background ignores Ctrl-C, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


MOST_MAPS = 20_000
"""Linux allows a process 65,530 memory maps, then it crashes. A compiled kernel takes three."""


LONGEST_FIRST = (
    "engine/test_page_classes.py",
    "kernels/test_packed_attention.py",
    "engine/test_page_sizes.py",
    "kernels/test_paged_attention.py",
    "engine/test_kv_groups.py",
    "kv/test_attention.py",
    "engine/test_zeroc.py",
    "kv/test_sealed.py",
    "engine/test_engine.py",
    "kernels/test_packed_pages.py",
    "aot/test_step_8b.py",
    "kv/test_packed_quality.py",
    "kernels/test_widths.py",
    "engine/test_policies.py",
    "kernels/test_native.py",
    "aot/test_packed_kernels.py",
    "scripts/test_gpu_day.py",
    "eval/test_recall_of_formats.py",
    "engine/test_transfer.py",
    "kernels/test_layouts.py",
    "engine/test_kv_formats.py",
    "kernels/test_chunk_attention.py",
    "aot/test_kernels.py",
)
"""Files that take half a minute and more, in the order in which they begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files go first, so that of two processes none works on alone at the end; engines and kernels by turns, so
    that no two compile the same programs at the same time."""
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """What jax compiled is forgotten after a file of tests, when there is much of it."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def executables(pytestconfig: pytest.Config) -> str:
    """One folder of compiled programs for the whole run, and for the next one."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("executables")
    folder.chmod(0o700)
    return str(folder)
