"""What each KV format costs in answers and in perplexity, against the dense cache, and whether that is within bounds.

    python benchmarks/kv_quality.py --out quality                        # all formats, 2,016 questions each; 20 minutes
    python benchmarks/kv_quality.py --out quality --formats hack4 int8     # a few; --out keeps what is done
    python benchmarks/kv_quality.py --items 64 --max-text-tokens 8k        # a quick look: the intervals are wide
    jaxserve calibrate -o lookup.kvcal && python benchmarks/kv_quality.py --formats zeroc  # the file that it names

Presets of 4 and 2 bits have keys as the papers do; those called rotated are what --kv-cache-dtype gives by default
(for fp8: an option).
The bundled model through the engine, float32, paired with the same questions on float32 KV: four retrieval tasks of
1,024 tokens, eight questions on each document, and perplexity of the book that comes with the harness in windows of
1,024. Intervals (95 %) are of a bootstrap over documents, and over windows of text. A bound holds when the whole
interval is within it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import build, human_int
from jaxserve.eval.compare import compare, read_contestants
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.perplexity import PERPLEXITY, perplexity
from jaxserve.eval.report import grid
from jaxserve.eval.rows import Row
from jaxserve.eval.run import Result
from jaxserve.eval.stats import Interval, paired_interval

TASKS = ("kv-recall", "multi-needle", "needle", "two-hop")
LENGTH, TURNS = 1024, 8
PRESETS = Path(__file__).resolve().parents[1] / "configs" / "eval"
BASE = "dense"
FORMATS = (
    *("int8", "fp8", "fp8-rotated", "hack8", "kivi4", "hack4", "kivi4-rotated", "hack4-rotated"),
    *("hack4-rotated-no-sinks", "hack4-p", "kivi2", "kivi2-paper", "hack2", "hack2-rotated"),
    *("hack2-rotated-groups-32", "hack2-p"),
)


@dataclass(frozen=True)
class Bound:
    """The most that may be lost: points of retrieval, None for any, and percent of perplexity."""

    points: float | None
    percent: float


BOUNDS = {8: Bound(0.5, 0.1), 4: Bound(1.0, 0.3), 2: Bound(None, 4.0)}
"""By bits. 8 bits are to be within noise of dense: bounds as narrow as 2,000 questions can tell."""


def bound_of(name: str) -> Bound | None:
    """None for a format whose loss is chosen when it is calibrated."""
    return next((bound for bits, bound in BOUNDS.items() if str(bits) in name.split("-")[0]), None)


def answers(result: Result) -> list[Row]:
    return [row for key, rows in result.rows.items() if key[0] != PERPLEXITY for row in rows]


def text(result: Result) -> list[Row]:
    return [row for key, rows in result.rows.items() if key[0] == PERPLEXITY for row in rows]


def points(mine: Sequence[Row], base: Sequence[Row]) -> Interval:
    """By how many of a hundred answers they differ."""
    theirs = {row.item: 100 * row.score for row in base}
    return paired_interval(
        [100 * row.score for row in mine],
        [theirs[row.item] for row in mine],
        [(row.task, row.document) for row in mine],
    )


def percent(mine: Sequence[Row], base: Sequence[Row]) -> Interval:
    """By how much perplexity differs. All windows weigh the same: all but two are scored on equally many tokens."""
    found = paired_interval([-row.score for row in mine], [-row.score for row in base], range(len(base)))
    return Interval(*(100 * math.expm1(x) for x in (found.mean, found.low, found.high)))


def cell(found: Interval, digits: int) -> str:
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def verdict(bound: Bound | None, lost: Interval, rise: Interval) -> str:
    """Whether all is within the bound, or what may lie beyond it."""
    if bound is None:
        return "none set"
    beyond = ["retrieval"] if bound.points is not None and lost.low < -bound.points else []
    beyond += ["perplexity"] if rise.high > bound.percent else []
    return f"no: {', '.join(beyond)}" if beyond else "yes"


def table(results: Mapping[str, Result]) -> str:
    base = results[BASE]
    lines = [["KV", *TASKS, "retrieval, points", "perplexity, %", "KV bytes a token", "within bounds"]]
    for name, result in results.items():
        if name == BASE:
            continue
        mine = answers(result)
        each = [points([row for row in mine if row.task == task], answers(base)).mean for task in TASKS]
        lost, rise = points(mine, answers(base)), percent(text(result), text(base))
        memory = f"{result.kv_bytes_per_token[LENGTH]:,.0f}"
        judged = verdict(bound_of(name), lost, rise)
        lines.append([name, *(f"{one:+.1f}" for one in each), cell(lost, 2), cell(rise, 3), memory, judged])
    right = 100 * sum(row.score for row in answers(base)) / len(answers(base))
    found = perplexity(text(base))
    return (
        f"{grid(lines)}\n{BASE}: {right:.1f} % of {len(answers(base)):,} answers right, "
        f"perplexity {found.token:.3f} over {found.tokens:,} tokens\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="Presets of configs/eval/.")
    parser.add_argument("--items", type=human_int, default=504, help="Questions of each task.")
    parser.add_argument("--max-text-tokens", type=human_int, help="Only this much of the text.")
    parser.add_argument("--seed", type=int, default=2026, help="Of the questions.")
    parser.add_argument("--out", type=Path, help="Folder for every answer; run again to go on.")
    args = parser.parse_args()
    options = {
        "task": [*TASKS, PERPLEXITY],
        "lengths": [LENGTH],
        "mode": ["multi-request"],
        "turns": TURNS,
        "window": LENGTH,
        "stride": LENGTH // 2,
        "items": args.items,
        "max_text_tokens": args.max_text_tokens,
        "task_seed": args.seed,
        "out": None if args.out is None else str(args.out),
        "wait_for_buckets": True,
    }
    config = build(EvalConfig, {name: value for name, value in options.items() if value is not None})
    results = compare(read_contestants(config, [PRESETS / f"{name}.yaml" for name in (BASE, *args.formats)]))
    print(table(results), end="")


if __name__ == "__main__":
    main()
