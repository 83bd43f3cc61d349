"""Results for people: tables on the terminal, JSON beside them. Pure but for the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.eval.perplexity import PERPLEXITY, perplexity
from jaxserve.eval.rows import Key, Row
from jaxserve.eval.run import Result
from jaxserve.eval.stats import Interval, mean_interval

DEPTHS = 5


def interval(rows: Sequence[Row]) -> Interval:
    return mean_interval([row.score for row in rows], [(row.task, row.length, row.document) for row in rows])


def tables(result: Result) -> str:
    """What `jaxserve eval` prints."""
    texts = {key: rows for key, rows in result.rows.items() if key[0] == PERPLEXITY}
    answers = {key: rows for key, rows in result.rows.items() if key not in texts}
    parts = []
    if answers:
        parts += [_accuracy(answers), _by("depth", answers, _depth), _by("turn", answers, lambda row: row.turn + 1)]
    if texts:
        parts.append(_perplexity(texts))
    return "\n\n".join([*filter(None, parts), _counts(result)]) + "\n"


def _perplexity(cells: dict[Key, list[Row]]) -> str:
    lines = [["perplexity", "window", "of a token", "of a byte", "bits per byte", "tokens", "bytes"]]
    for (task, length, _), rows in cells.items():
        found = perplexity(rows)
        figures = [f"{found.token:.4f}", f"{found.byte:.4f}", f"{found.bits_per_byte:.4f}"]
        lines.append([task, str(length), *figures, f"{found.tokens:,}", f"{found.bytes:,}"])
    return grid(lines)


def _accuracy(cells: dict[Key, list[Row]]) -> str:
    modes = list(dict.fromkeys(mode for _, _, mode in cells))
    lines = [["task", "tokens", *modes]]
    for task, length in dict.fromkeys((task, length) for task, length, _ in cells):
        found = [cells.get((task, length, mode)) for mode in modes]
        lines.append([task, str(length), *("" if rows is None else str(interval(rows)) for rows in found)])
    return "accuracy, with 95 % confidence intervals\n" + grid(lines)


def _by(name: str, cells: dict[Key, list[Row]], part: Callable[[Row], int | None]) -> str:
    """Accuracy of each task by `part` of its rows, all lengths and modes together."""
    found: dict[str, dict[int, list[float]]] = {}
    for rows in cells.values():
        for row in rows:
            if (key := part(row)) is not None:
                found.setdefault(row.task, {}).setdefault(key, []).append(row.score)
    columns = sorted({key for parts in found.values() for key in parts})
    if len(columns) < 2:
        return ""
    title = [f"{(c - 1) * 100 // DEPTHS}-{c * 100 // DEPTHS} %" if name == "depth" else str(c) for c in columns]
    lines = [[f"by {name}", *title]]
    for task, parts in found.items():
        lines.append([task, *(f"{sum(s) / len(s):.3f}" if (s := parts.get(c)) else "" for c in columns)])
    return grid(lines)


def _depth(row: Row) -> int | None:
    return None if row.depth is None else min(int(row.depth * DEPTHS), DEPTHS - 1) + 1


def _counts(result: Result) -> str:
    rows = [row for rows in result.rows.values() for row in rows]
    reused = sum(row.cached_tokens for row in rows)
    prefilled = sum(row.prompt_tokens for row in rows) - reused
    new = sum(len(row.token_ids) for row in rows)
    per_token = ", ".join(f"{value:,.0f} at {length}" for length, value in result.kv_bytes_per_token.items())
    return (
        f"{len(rows):,} items; {prefilled:,} tokens prefilled, {reused:,} reused, {new:,} generated; "
        f"{result.seconds:.0f} s\nKV bytes per token: {per_token}"
    )


def grid(lines: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first flush left."""
    rows = [list(line) for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def summary(result: Result) -> dict[str, Any]:
    """Everything in the tables, and counts, as plain data."""
    cells = []
    for (task, length, mode), rows in result.rows.items():
        found = interval(rows)
        reused = sum(row.cached_tokens for row in rows)
        more = asdict(perplexity(rows)) if task == PERPLEXITY else {}
        cells.append(
            {
                "task": task,
                "length": length,
                "mode": mode,
                "items": len(rows),
                "score": found.mean,
                "low": found.low,
                "high": found.high,
                "tokens_prefilled": sum(row.prompt_tokens for row in rows) - reused,
                "tokens_reused": reused,
                "kv_bytes_per_token": result.kv_bytes_per_token.get(length),
                **({"perplexity": more} if more else {}),
            }
        )
    return {"cells": cells, "seconds": round(result.seconds, 1)}


def write_json(path: Path, data: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(data)) + b"\n")
