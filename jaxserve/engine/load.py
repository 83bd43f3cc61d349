"""Builds an engine core from a config: model, sizes, programs, scheduler. The only place that sees every room."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax

from jaxserve.checkpoint.generation import read_generation_config
from jaxserve.checkpoint.kv_calibration import KVCalibration, read_calibration
from jaxserve.checkpoint.load import load_model
from jaxserve.checkpoint.source import model_folder
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.executables import ExecutableCache
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.kv_formats import kv_groups
from jaxserve.engine.mover import Mover
from jaxserve.engine.programs import WORKERS, Program, ProgramSet
from jaxserve.engine.runner import Runner
from jaxserve.engine.shapes import EngineShape
from jaxserve.engine.step import STAGED, StepFunctions
from jaxserve.engine.transfer import Transfer
from jaxserve.kv import KVState, allocate, kv_shapes, size_pages
from jaxserve.models.basis import change_basis, quantize_params
from jaxserve.models.model import Model
from jaxserve.models.native import native_params
from jaxserve.quant.linear import LinearContext
from jaxserve.sampling import state as sampling_state
from jaxserve.sampling.state import SlotLayout, Slots
from jaxserve.scheduler import Limits, Recorder, Scheduler, make_policy
from jaxserve.speculative.ngram import NGram
from jaxserve.types import FromCore, ModelLimits, PageClasses, Ready

log = logging.getLogger(__name__)

INVARIANT_ROWS = 64
LINK_BYTES_S = 24e9
"""What a PCIe 4.0 link copies, of pages as large as ours."""
CPU_KV_BYTES = 256 << 20

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """A model in memory and what follows from it for an engine, before anything is compiled."""

    folder: Path
    model: Model
    params: Any
    on_gpu: bool
    max_len: int
    shape: EngineShape
    calibration: KVCalibration | None = None
    """In whose basis the model is, if in any but its own."""


def load_core(
    config: EngineConfig,
    inbox: Inbox,
    emit: Callable[[FromCore], None],
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> EngineCore:
    """An engine core that can serve: weights in memory, covering programs compiled. `clock` gives it the time (s).

    Raises:
        ConfigError, CheckpointError, DoesNotFitError: what cannot be honoured, and what to do.
    """
    if config.cache.kv_transfer and not config.cache.enable_prefix_caching:
        raise ConfigError("--kv-transfer needs prefix caching: leave out --no-enable-prefix-caching")
    started = time.perf_counter()
    loaded = _load(config)
    progress(_describe(loaded))
    functions, classes = _functions(config, loaded)
    record = _record(config)
    host_pages = _host_pages(config.cache.swap_space, classes)
    scheduler = _scheduler(config, loaded.shape, classes, host_pages, Recorder(record) if record else None)
    programs = ProgramSet(_cache(config))
    moves = functions.move_programs() if host_pages or config.cache.kv_transfer else []
    programs.declare([*functions.programs(), *moves])
    covering = [*functions.covering(), *(program.name for program in moves)]
    programs.compile_now(covering)
    kv, slots = allocate(functions.kv), sampling_state.allocate(functions.slot_layout)
    mover = None
    if host_pages:
        mover = Mover(functions.kv, host_pages, _link(config), STAGED, inbox.put)
    runner = Runner(functions, programs, loaded.params, kv, slots, mover)
    others = [name for name in programs.names if name not in covering]
    # One at a time beside requests: each takes a core, and up to 70 MiB.
    programs.compile_in_background(others, WORKERS if config.runtime.wait_for_buckets else 1)
    if config.runtime.wait_for_buckets:
        programs.wait()
    elapsed = time.perf_counter() - started
    progress(
        f"{programs.compiled} programs compiled, {programs.loaded} loaded, {programs.pending} more in the "
        f"background; KV cache for {_tokens(classes)} tokens; ready after {elapsed:.1f} s"
    )
    limits = ModelLimits(
        vocab_size=loaded.model.config.vocab_size, max_model_len=loaded.max_len, eos_token_ids=_eos(loaded)
    )
    ready = Ready(
        limits=limits,
        num_pages=tuple(_pages(group) for group in classes),
        page_tokens=loaded.shape.page_tokens,
        max_num_seqs=loaded.shape.slots,
        startup_s=elapsed,
        page_classes=classes,
    )
    identity = _identity(config, functions, loaded.calibration)
    transfer = None
    if config.cache.kv_transfer:
        transfer = Transfer(scheduler, runner, functions.groups, functions.kv.formats, identity, inbox.put)
    return EngineCore(
        scheduler,
        runner,
        programs,
        ready,
        identity,
        inbox,
        emit,
        config.cache.enable_prefix_caching,
        transfer,
        record,
        clock,
    )


def _load(config: EngineConfig) -> Loaded:
    folder = model_folder(config.model)
    device = _device(config)
    on_gpu = device.platform == "gpu"
    dtype = config.model.dtype
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    model, params, calibration = _load_model(config, folder, dtype)
    if not on_gpu:
        params = native_params(model, params)
    longest = model.config.max_position
    max_len = config.model.max_model_len or longest
    if max_len > longest:
        raise ConfigError(f"--max-model-len {max_len} is more than the {longest} positions of this model")
    return Loaded(folder, model, params, on_gpu, max_len, EngineShape.of(config, max_len, on_gpu), calibration)


def _load_model(config: EngineConfig, folder: Path, dtype: str) -> tuple[Model, Any, KVCalibration | None]:
    """The model and its parameters, in the basis of the calibration that the options name."""
    file, quantization = config.cache.kv_calibration, config.model.quantization
    if file is None:
        return *load_model(folder, dtype, quantization), None
    # A basis is folded into plain weights; quantizing comes after.
    model, params = load_model(folder, dtype)
    calibration = read_calibration(Path(file), model, params)
    try:
        model, params = change_basis(model, params, calibration.basis)
    except ValueError as error:
        raise ConfigError(f"--kv-calibration {file}: {error}") from None
    if quantization is not None:
        params = quantize_params(model, params, quantization)
    return model, params, calibration


def _device(config: EngineConfig) -> jax.Device:
    wanted = config.runtime.device
    device = jax.devices()[0]
    if wanted != "auto" and device.platform != {"cpu": "cpu", "cuda": "gpu"}[wanted]:
        raise ConfigError(
            f"--device {wanted}: jax runs on {device.platform} here; set JAX_PLATFORMS={wanted} before "
            f"jax starts, and install jaxserve[cuda] for GPUs"
        )
    if config.parallel.tensor_parallel_size != 1:
        raise ConfigError(
            f"--tensor-parallel-size {config.parallel.tensor_parallel_size}: this version serves on one device"
        )
    return device


def _functions(config: EngineConfig, loaded: Loaded) -> tuple[StepFunctions, tuple[PageClasses, ...]]:
    model, shape = loaded.model, loaded.shape
    expected = config.cache.kv_expected_len
    if expected is not None and expected > loaded.max_len:
        raise ConfigError(f"--kv-expected-len {expected} is more than the model length {loaded.max_len}")
    groups, group_formats = kv_groups(config, model, loaded.folder, loaded.on_gpu, loaded.calibration)
    layout = SlotLayout(
        slots=shape.slots,
        max_len=shape.max_len,
        vocab=model.config.vocab_size,
        hidden_rows=shape.hidden_rows,
        hidden_dim=model.config.hidden,
        q=shape.q,
        dtype=model.dtype.name,
    )
    ctx = LinearContext(invariant_rows=INVARIANT_ROWS if config.runtime.batch_invariant else None)
    speculative = config.speculative
    proposer = None
    if speculative.speculative_method == "ngram":
        proposer = NGram(max_n=speculative.prompt_lookup_max, min_n=speculative.prompt_lookup_min)

    def functions(classes: tuple[PageClasses, ...]) -> StepFunctions:
        pages = [tuple(c.pages for c in group.classes) for group in classes]
        kv: KVState = kv_shapes(groups, group_formats, pages, shape.slots, shape.max_len)
        slots: Slots = sampling_state.shapes(layout)
        return StepFunctions(model, shape, layout, ctx, proposer, _shapes(loaded.params), groups, kv, slots)

    def sized(memory: int) -> tuple[PageClasses, ...]:
        return size_pages(
            memory,
            groups,
            group_formats,
            max_model_len=shape.max_len,
            max_chunk=shape.budget,
            expected_len=expected,
            max_num_seqs=shape.slots,
        )

    memory = config.cache.kv_cache_memory
    if memory is None:
        memory = _free_memory(config, functions, sized) if loaded.on_gpu else CPU_KV_BYTES
    classes = sized(memory)
    return functions(classes), classes


def _free_memory(config: EngineConfig, functions: Callable, sized: Callable) -> int:
    """Bytes of the GPU that are left for KV once the temporaries of the largest step are known.

    Temporaries do not depend on the number of pages, so a program over the smallest pool tells them.
    """
    stats = jax.devices()[0].memory_stats()
    limit = int(stats["bytes_limit"] * config.cache.gpu_memory_utilization)
    free = limit - stats["bytes_in_use"]
    probe: StepFunctions = functions(sized(free // 16))
    largest = next(p for p in probe.programs() if p.name == probe.covering()[0])
    temporaries = _temporaries(largest)
    slots = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(probe.slots))
    return free - 2 * temporaries - slots


def _temporaries(program: Program) -> int:
    compiled = jax.jit(program.function, donate_argnums=program.donate).lower(*program.args).compile()
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)


def _tokens(classes: tuple[PageClasses, ...]) -> int:
    """What the cache holds of long sequences; windows hold more of them."""
    full = [c for c in classes if c.window is None] or classes
    return min(_pages(group) * group.page_tokens for group in full)


def _pages(group: PageClasses) -> int:
    return sum(c.pages for c in group.classes)


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)


def _host_pages(space: int, classes: tuple[PageClasses, ...]) -> tuple[int, ...]:
    """Pages of host memory for each pool, in proportion to the device's.

    Raises:
        ConfigError: not a page of each fits.
    """
    kinds = [kind for group in classes for kind in group.classes]
    share = space / sum(kind.pages * kind.bytes for kind in kinds)
    pages = tuple(int(kind.pages * share) for kind in kinds)
    if space and not min(pages):
        least = max(kind.bytes for kind in kinds)
        raise ConfigError(f"--swap-space {space} holds no page of each kind; a page takes up to {least} bytes")
    return pages if space else ()


def _link(config: EngineConfig) -> float | None:
    """Bytes a second of the host link, where the options say."""
    gbps = config.cache.host_link_gbps
    return None if gbps is None else gbps * 1e9 / 8


def _scheduler(
    config: EngineConfig,
    shape: EngineShape,
    classes: tuple[PageClasses, ...],
    host_pages: tuple[int, ...],
    recorder: Recorder | None,
) -> Scheduler:
    limits = Limits(
        **shape.bounds,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        pin_share=config.scheduler.program_share,
        pin_ttl_s=config.scheduler.program_ttl,
        host_pages=host_pages,
        host_link_bytes_s=_link(config) or LINK_BYTES_S,
    )
    try:
        policy = make_policy(config.scheduler.scheduling_policy, **_params(config.scheduler.scheduling_params))
    except ValueError as error:
        raise ConfigError(f"--scheduling-policy: {error}") from None
    return Scheduler(policy, limits, classes, recorder=recorder)


def _record(config: EngineConfig) -> BinaryIO | None:
    path = config.runtime.record
    if path is None:
        return None
    try:
        return open(path, "wb")
    except OSError as error:
        raise ConfigError(f"--record {path}: {error.strerror}") from None


def _params(given: tuple[str, ...]) -> dict[str, Any]:
    """Parameters of a policy from `key=value`; a value is JSON, or else text."""
    params: dict[str, Any] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise ConfigError(f"--scheduling-params {one!r} is not key=value")
        try:
            params[key] = json.loads(value)
        except ValueError:
            params[key] = value
    return params


def _cache(config: EngineConfig) -> ExecutableCache | None:
    where = config.runtime.compile_cache
    if where == "none":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return ExecutableCache(Path(where or f"{base}/jaxserve").expanduser() / "executables")


def _identity(config: EngineConfig, functions: StepFunctions, calibration: KVCalibration | None) -> str:
    """What cached KV depends on beside the tokens."""
    return repr(
        (
            str(config.model.model),
            config.model.revision,
            config.model.quantization,
            functions.model.dtype.name,
            functions.groups,
            functions.kv.formats,
            None if calibration is None else calibration.digest,
        )
    )


def _eos(loaded: Loaded) -> tuple[int, ...]:
    generation = read_generation_config(loaded.folder)
    ids = {*loaded.model.config.eos_token_ids, *generation.eos_token_ids}
    return tuple(sorted(i for i in ids if 0 <= i < loaded.model.config.vocab_size))


def _describe(loaded: Loaded) -> str:
    device = jax.devices()[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(loaded.params))
    return (
        f"{loaded.folder.name}: {loaded.model.config.architecture}, {count / 1e6:.1f} M parameters, "
        f"{loaded.model.dtype.name}, {size / 2**20:.0f} MiB on {device.device_kind}; {loaded.max_len} positions"
    )
