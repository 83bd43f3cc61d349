"""Runs cells on an engine, keeps what is done, goes on where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from jaxserve import __version__
from jaxserve.api import LLM, read_intake
from jaxserve.checkpoint.source import model_folder
from jaxserve.config import ConfigError, EngineConfig, fields_of
from jaxserve.eval.cells import Cell
from jaxserve.eval.memory import kv_bytes
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.plan import plan, read_inputs
from jaxserve.eval.recall_fixture import INDUCTION, write
from jaxserve.eval.rows import Key, Row, RowFile

FOREVER_S = 1e9
_FREE = ("task", "lengths", "mode", "out")
"""Options that choose cells and do not change what a cell gives."""


@dataclass(frozen=True)
class Result:
    """Rows by cell, KV bytes a token by length, and the seconds that the cells of this run took."""

    rows: dict[Key, list[Row]]
    kv_bytes_per_token: dict[int, float]
    seconds: float


def evaluate(config: EvalConfig, progress: bool = True, label: str = "") -> Result:
    """Measures what `config` asks for; every row is on disk when `config.eval.out` is set. `label` stands before the
    progress bar.

    Raises:
        ConfigError, CheckpointError: what cannot be measured, before any work.
        EngineDead, RuntimeError: the engine failed.
    """
    config = replace(config, engine=_reusing(config.engine, config.eval.reuse))
    inputs = read_inputs(config.eval)
    folder = None if config.eval.out is None else _folder(Path(config.eval.out), config)
    with ExitStack() as stack:
        engine = config.engine
        if INDUCTION in config.eval.task and engine.model.model is None:
            made = write(Path(stack.enter_context(TemporaryDirectory())))
            engine = replace(engine, model=replace(engine.model, model=str(made)))
        cells = plan(config.eval, inputs, read_intake(engine), _max_model_len(engine))
        llm = stack.enter_context(LLM(**flat_options(engine)))
        rows, seconds = run_cells(cells, llm, folder, progress, label)
        lengths = sorted({cell.longest for cell in cells})
        per_token = {n: kv_bytes(llm.ready.page_classes, n) / n for n in lengths}
    return Result(rows, per_token, seconds)


def run_cells(
    cells: Sequence[Cell], llm: LLM, folder: Path | None, progress: bool = True, label: str = ""
) -> tuple[dict[Key, list[Row]], float]:
    """Rows by cell, and seconds. Cells that `folder` has whole are not run again.

    Each cell begins with an empty prefix cache, and its requests are queued before the first step: what it gives does
    not depend on the cells before it, but for the last bits (see docs/evaluation.md).
    """
    from tqdm.auto import tqdm

    file = None if folder is None else RowFile(folder / "results.jsonl")
    found = {} if file is None else file.whole_cells({cell.key: cell.items for cell in cells})
    start = time.monotonic()
    total = sum(cell.items for cell in cells)
    had = sum(cell.items for cell in cells if cell.key in found)
    with tqdm(
        total=total, initial=had, desc=label or None, unit="item", dynamic_ncols=True, disable=not progress
    ) as bar:
        for cell in cells:
            if cell.key in found:
                continue
            bar.set_postfix_str(" ".join(str(part) for part in cell.key if part))
            llm.reset_prefix_cache()
            found[cell.key] = cell.run(llm, bar.update)
            if file is not None:
                file.append(found[cell.key])
    return {cell.key: found[cell.key] for cell in cells}, time.monotonic() - start


def _max_model_len(engine: EngineConfig) -> int:
    # Imported late: the process that compares configurations has no jax, the engines' own have.
    from jaxserve.checkpoint import read_config

    return engine.model.max_model_len or read_config(model_folder(engine.model)).max_position


def _reusing(engine: EngineConfig, reuse: str) -> EngineConfig:
    """Program reuse alone: no prefix cache beside it, and no turn that comes too late."""
    if reuse == "prefix":
        return engine
    return replace(
        engine,
        cache=replace(engine.cache, enable_prefix_caching=False),
        scheduler=replace(engine.scheduler, program_ttl=FOREVER_S),
    )


def flat_options(config: EngineConfig) -> dict[str, Any]:
    """An engine config as keywords of LLM."""
    options = {}
    for name, (path, _) in fields_of(EngineConfig).items():
        part: Any = config
        for step in path:
            part = getattr(part, step)
        options[name] = getattr(part, name)
    return options


def _folder(path: Path, config: EvalConfig) -> Path:
    """`path`, made where it is missing; it remembers the configuration whose results it holds."""
    mine = {
        "jaxserve": __version__,
        "eval": {name: value for name, value in asdict(config.eval).items() if name not in _FREE},
        "engine": flat_options(config.engine),
    }
    mine = msgspec.json.decode(msgspec.json.encode(mine))
    stamp = path / "run.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if stamp.exists():
            _same(path, msgspec.json.decode(stamp.read_bytes()), mine)
        else:
            stamp.write_bytes(msgspec.json.format(msgspec.json.encode(mine)) + b"\n")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{stamp} is not what a run wrote: {error}") from None
    return path


def _same(path: Path, theirs: Any, mine: dict[str, Any]) -> None:
    for part, values in mine.items():
        other = theirs.get(part) if isinstance(theirs, dict) else None
        pairs = [(part, values, other)]
        if isinstance(values, dict) and isinstance(other, dict):
            pairs = [(name, values.get(name), other.get(name)) for name in sorted({*values, *other})]
        for name, here, there in pairs:
            if here != there:
                raise ConfigError(
                    f"--out {path} holds results of another configuration ({name} was {there!r}, and is {here!r} now): "
                    f"choose another folder"
                )
