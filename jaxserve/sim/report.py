"""Tables and JSON of a sweep. Writes text only; plots are in plots.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.sim.sweep import Cell

COLUMNS = {
    "jct_mean_s": "JCT mean",
    "jct_p99_s": "JCT p99",
    "ttft_p50_s": "TTFT p50",
    "ttft_p99_s": "TTFT p99",
    "tpot_mean_s": "TPOT mean",
    "tbt_p99_s": "TBT p99",
    "norm_mean_s_per_token": "s/token",
    "slo_attainment": "SLO met",
    "goodput_per_s": "goodput/s",
    "preemptions": "preempted",
    "swap_out_bytes": "swapped B",
    "prefix_hit_share": "prefix hits",
}
SHARES = ("slo_attainment", "prefix_hit_share")


def number(value: float) -> str:
    """Three significant digits, or all of a larger whole number."""
    if math.isnan(value):
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def estimate(name: str, value: tuple[float, float, float]) -> str:
    """A mean and half of its confidence interval."""
    mean, low, high = value
    if name in SHARES:
        mean, low, high = 100 * mean, 100 * low, 100 * high
        unit = "%"
    else:
        unit = ""
    text = number(mean)
    half = (high - low) / 2
    if mean and half > abs(mean) / 1000:
        digits = len(text.partition(".")[2])
        text += f" ±{half:.{digits}f}"
    return text + unit


def table(cells: Sequence[Cell], columns: Mapping[str, str] = COLUMNS) -> str:
    """One block a load, one line a policy; times in seconds, with half the 95 % confidence interval over seeds."""
    shown_ever = {name for cell in cells for name, value in cell.figures.items() if value[0]}
    columns = {name: title for name, title in columns.items() if name in shown_ever}
    blocks = []
    for load in dict.fromkeys(cell.load for cell in cells):
        rows = [["policy", *columns.values()]]
        of_load = [cell for cell in cells if cell.load == load]
        for cell in of_load:
            shown = [estimate(name, cell.figures[name]) if name in cell.figures else "-" for name in columns]
            rows.append([cell.policy, *shown])
        blocks.append(f"load {load:g} ({number(of_load[0].rate)} jobs/s)\n{aligned(rows)}")
    return "\n\n".join(blocks)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  "
        + row[0].ljust(widths[0])
        + "".join("  " + text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def as_json(cells: Sequence[Cell], about: Mapping[str, Any]) -> dict[str, Any]:
    """`about` and every figure of every cell: mean with confidence interval, and each seed's own."""
    return {
        **about,
        "cells": [
            {
                "policy": cell.policy,
                "load": cell.load,
                "rate": cell.rate,
                "figures": {
                    name: {
                        "mean": mean,
                        "low": None if math.isnan(low) else low,
                        "high": None if math.isnan(high) else high,
                    }
                    for name, (mean, low, high) in cell.figures.items()
                },
                "runs": [dict(run) for run in cell.runs],
            }
            for cell in cells
        ],
    }
