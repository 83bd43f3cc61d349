"""Plots of a sweep, as PNG files. The only module here that needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.sim.sweep import Cell


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Distribution of completion times, figures over load, and what a replica looked like over time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    return [_jct_cdf(cells, folder), _load_curve(cells, folder), _timeline(cells, folder)]


def _loads(cells: Sequence[Cell]) -> list[float]:
    return list(dict.fromkeys(cell.load for cell in cells))


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), squeeze=False, layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _jct_cdf(cells: Sequence[Cell], folder: Path) -> Path:
    loads = _loads(cells)
    figure, axes = _figure(1, len(loads))
    for axis, load in zip(axes[0], loads, strict=True):
        for cell in (cell for cell in cells if cell.load == load and cell.jct_curve):
            shares = [i / (len(cell.jct_curve) - 1) for i in range(len(cell.jct_curve))]
            axis.plot(cell.jct_curve, shares, label=cell.policy)
        axis.set(title=f"load {load:g}", xlabel="job completion time (s)", ylabel="share of jobs", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    return _save(figure, folder / "jct_cdf.png")


def _load_curve(cells: Sequence[Cell], folder: Path) -> Path:
    shown = (
        ("jct_mean_s", "mean JCT (s)"),
        ("jct_p99_s", "p99 JCT (s)"),
        ("ttft_p99_s", "p99 TTFT (s)"),
        ("slo_attainment", "SLO attainment"),
    )
    figure, axes = _figure(1, len(shown))
    for axis, (name, label) in zip(axes[0], shown, strict=True):
        for policy in dict.fromkeys(cell.policy for cell in cells):
            line = [cell for cell in cells if cell.policy == policy and name in cell.figures]
            loads, values = [cell.load for cell in line], [cell.figures[name] for cell in line]
            axis.plot(loads, [mean for mean, _, _ in values], marker="o", label=policy)
            axis.fill_between(loads, [low for _, low, _ in values], [high for _, _, high in values], alpha=0.2)
        axis.set(xlabel="load", ylabel=label, yscale="linear" if name == "slo_attainment" else "log")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    return _save(figure, folder / "load_curve.png")


def _timeline(cells: Sequence[Cell], folder: Path) -> Path:
    load = max(_loads(cells))
    shown = [cell for cell in cells if cell.load == load]
    figure, axes = _figure(3, 1)
    for cell in shown:
        times = [sample.now for sample in cell.timeline]
        axes[0][0].plot(times, [sample.running for sample in cell.timeline], label=cell.policy)
        axes[1][0].plot(times, [sample.waiting for sample in cell.timeline], label=cell.policy)
        axes[2][0].plot(times, [100 * sample.kv_usage for sample in cell.timeline], label=cell.policy)
    for axis, label in zip(axes[:, 0], ("running", "waiting", "KV in use (%)"), strict=True):
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[0][0].set(title=f"one replica at load {load:g}, first seed")
    axes[0][0].legend()
    axes[2][0].set(xlabel="time (s)")
    return _save(figure, folder / "timeline.png")
