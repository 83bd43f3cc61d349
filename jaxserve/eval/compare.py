"""Several engine configurations on the same items: differences with paired intervals, and accuracy against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxserve.config import ConfigError, EngineConfig, build, fields_of, read_yaml
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.perplexity import PERPLEXITY
from jaxserve.eval.report import grid, interval, summary
from jaxserve.eval.rows import Key, Row
from jaxserve.eval.run import Result, evaluate, flat_options
from jaxserve.eval.stats import paired_interval

OWN = ("reuse",)
"""Options of the harness that a configuration may set for itself: how KV is reused is a part of the technique."""


def read_contestants(config: EvalConfig, paths: Sequence[Path]) -> dict[str, EvalConfig]:
    """A configuration by name (the file's) for each YAML file: its options over those of `config`.

    Raises:
        ConfigError: a file that cannot be read, an option that is unknown or would change the items, two equal names.
    """
    found: dict[str, EvalConfig] = {}
    engine_options = fields_of(EngineConfig)
    for path in paths:
        options = read_yaml(path)
        for name in options:
            if name not in engine_options and name not in OWN:
                raise ConfigError(f"--compare {path}: {name} is not an engine option; it holds for all configurations")
        if path.stem in found:
            raise ConfigError(f"--compare: two files are called {path.stem}; results are kept by that name")
        own = {name: options.pop(name) for name in OWN if name in options}
        engine = build(EngineConfig, {**flat_options(config.engine), **options})
        shared = {field.name: getattr(config.eval, field.name) for field in fields(config.eval)}
        out = None if config.eval.out is None else str(Path(config.eval.out) / path.stem)
        checked = build(EvalConfig, {**shared, **own, "out": out})
        found[path.stem] = replace(checked, engine=engine)
    if len(found) < 2:
        raise ConfigError("--compare needs at least two files; the first is what the others are compared with")
    return found


def compare(contestants: Mapping[str, EvalConfig], progress: bool = True) -> dict[str, Result]:
    """Runs one configuration after the other, each on an engine of its own."""
    return {name: evaluate(config, progress, label=name) for name, config in contestants.items()}


@dataclass(frozen=True)
class Difference:
    """A configuration's score in a cell, and by how much it differs from the first's on the same items."""

    score: float
    delta: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """The interval excludes 0."""
        return self.low > 0 or self.high < 0


def differences(base: Mapping[Key, Sequence[Row]], other: Mapping[Key, Sequence[Row]]) -> dict[Key, Difference]:
    """By cell. Only what both have is compared."""
    found = {}
    for key in (key for key in base if key in other):
        mine = {row.item: row for row in other[key]}
        pairs = [(mine[row.item], row) for row in base[key] if row.item in mine]
        if not pairs:
            continue
        delta = paired_interval(
            [a.score for a, _ in pairs], [b.score for _, b in pairs], [b.document for _, b in pairs]
        )
        found[key] = Difference(interval([a for a, _ in pairs]).mean, delta.mean, delta.low, delta.high)
    return found


def comparison_table(results: Mapping[str, Result]) -> str:
    """Scores of the first configuration, differences of the others; `*` marks those whose interval excludes 0."""
    (first, base), *others = results.items()
    lines = [["task", "tokens", "mode", first, *(f"{name} - {first}" for name, _ in others)]]
    found = [differences(base.rows, other.rows) for _, other in others]
    for key, rows in base.rows.items():
        cells = [_cell(one.get(key)) for one in found]
        lines.append([key[0], str(key[1]), key[2], f"{interval(rows).mean:.3f}", *cells])
    notes = "differences with paired 95 % intervals; * excludes 0"
    if any(task == PERPLEXITY for task, _, _ in base.rows):
        notes += "; perplexity: mean log-prob of a token, in nats"
    memory = [["", *results]]
    for length in base.kv_bytes_per_token:
        values = [result.kv_bytes_per_token.get(length) for result in results.values()]
        memory.append([f"KV bytes per token at {length}", *("" if v is None else f"{v:,.0f}" for v in values)])
    return f"{grid(lines)}\n{notes}\n\n{grid(memory)}\n"


def _cell(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.delta:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{'*' if found.significant else ' '}"


def comparison(results: Mapping[str, Result]) -> dict[str, Any]:
    """The same as plain data."""
    (first, base), *others = results.items()
    return {
        "base": first,
        "results": {name: summary(result) for name, result in results.items()},
        "differences": {
            name: [
                {
                    "task": k[0],
                    "length": k[1],
                    "mode": k[2],
                    "score": d.score,
                    "delta": d.delta,
                    "low": d.low,
                    "high": d.high,
                }
                for k, d in differences(base.rows, other.rows).items()
            ]
            for name, other in others
        },
    }


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Mean accuracy of each mode against KV bytes per token, one point a configuration and length.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot of --compare needs matplotlib: pip install matplotlib") from None
    modes = list(dict.fromkeys(k[2] for r in results.values() for k in r.rows if k[0] != PERPLEXITY))
    if not modes:
        return
    figure = Figure(figsize=(4.2 * len(modes), 3.8), layout="constrained")
    axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axis, mode in zip(axes, modes, strict=True):
        for number, (name, result) in enumerate(results.items()):
            for mark, length in zip("os^vDP*X" * 8, result.kv_bytes_per_token, strict=False):
                rows = [r for k, found in result.rows.items() if k[1:] == (length, mode) for r in found]
                if rows:
                    clusters = interval(rows)
                    bars = [[clusters.mean - clusters.low], [clusters.high - clusters.mean]]
                    axis.errorbar(
                        result.kv_bytes_per_token[length],
                        clusters.mean,
                        yerr=bars,
                        fmt=mark,
                        color=f"C{number % 10}",
                        capsize=2,
                        label=f"{name}, {length} tokens",
                    )
        axis.set(title=mode, xlabel="KV bytes per token", ylim=(-0.03, 1.03), xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, mean of tasks")
    axes[-1].legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=150)
