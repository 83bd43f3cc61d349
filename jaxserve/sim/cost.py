"""How long a step takes: prices plans by the padded buckets that the runner would choose. Knows no clock and no device.

Three ways to know it: `Published` (a fit from the literature), `Fitted` (least squares on a profile of the real
engine, see profile.py), and whatever else offers `step_s`, such as a roofline of compiled programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import msgspec

from jaxserve.engine.shapes import EngineShape, fit
from jaxserve.types import PAGE_TOKENS, Plan

HALF_WARM = 3
"""Steps without tiles after which they take half as much longer as right after tiles (docs/simulator.md)."""
WARM = 8 * HALF_WARM
"""Steps after which that does not matter any more."""


class Features(NamedTuple):
    """What the duration of a step depends on."""

    bucket: tuple[int, int]
    """Decode rows and prefill tiles of the program that runs the step."""
    head: int
    """Rows of the head program; 0: nothing is sampled."""
    admits: int
    context: int
    """Tokens that decode rows attend to, together."""
    longest: int
    """The longest of these contexts."""
    tile_context: int
    """Tokens that tiles attend to, their own included, over all tiles that are not padding."""
    tile_longest: int
    """The most that one of them attends to."""
    tile_pairs: int
    """Query-key pairs of causal prefill attention: the sum over tiles of end^2 - start^2."""
    since_tiles: int = 0
    """How many steps ago the last one with tiles was: what a step reads is no longer in any cache then, and fast again
    a few steps later. 0: this one has tiles, or the last was longer ago than matters."""
    rows: int = 0
    tile_tokens: int = 0
    """Decode rows and tokens of tiles without padding."""
    alone: int = 0
    """1: no step was in flight when this one was launched, so nothing hid the time that the host took for it."""


def features(plan: Plan, shape: EngineShape, before: Features | None = None, alone: bool = False) -> Features:
    """The features of a plan with work; `before`: those of the last one that was launched; `alone`: it had ended."""
    rows, tiles = plan.decode, plan.prefill
    bucket = shape.holding(len(rows), len(tiles))[0]
    sampled = len(rows)
    context = longest = tile_context = tile_longest = pairs = tokens = 0
    if rows:
        starts = [work.start for work in rows]
        context, longest = sum(starts) + len(rows), max(starts) + 1
    for work in tiles:
        start, count = work.start, work.count
        sampled += work.samples
        tokens += count
        tile_context += start + count
        pairs += (2 * start + count) * count
        tile_longest = max(tile_longest, start + count)
    head = fit(shape.head_rows, sampled) if sampled else 0
    since = 0 if tiles or before is None else _steps_since_tiles(before)
    admits = len(plan.admits)
    attended = (context, longest, tile_context, tile_longest, pairs)
    return Features(bucket, head, admits, *attended, since, len(rows), tokens, int(alone))


def _steps_since_tiles(before: Features) -> int:
    """For the step without tiles that follows `before`."""
    if before.bucket[1]:
        return 1
    return before.since_tiles + 1 if 0 < before.since_tiles < WARM else 0


class CostModel(Protocol):
    def step_s(self, step: Features) -> float:
        """Seconds that a step takes on an otherwise idle device, padding included."""
        ...

    def parameters(self) -> dict[str, float]:
        """Rates that policies may want to know, as CostUpdate carries them: `step_s` (an empty step), `prefill_token_s`
        and `decode_row_s` (a token more in a step), `context_token_s` (a token more to attend to, for a row)."""
        ...


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a step, linear in its tokens: OPT-13B on one A100-80GB, as fitted by DistServe (OSDI 2024).

    A mixed step takes the longer of its two linear parts and both attention parts: its matrix products read the weights
    once. The fit holds for up to 95 decode rows.
    """

    name: str = "published"
    prefill_ms: float = 18.1
    prefill_token_ms: float = 0.102
    prefill_pair_ms: float = 7.1e-6
    decode_ms: float = 19.9
    decode_row_ms: float = 0.0385
    decode_context_ms: float = 6.3e-4

    def step_s(self, step: Features) -> float:
        rows, tiles = step.bucket
        linear = 0.0
        if tiles:
            linear = self.prefill_ms + self.prefill_token_ms * tiles * PAGE_TOKENS
        if step.context:
            linear = max(linear, self.decode_ms + self.decode_row_ms * rows)
        attention = self.prefill_pair_ms * step.tile_pairs + self.decode_context_ms * step.context
        return (linear + attention) / 1e3

    def parameters(self) -> dict[str, float]:
        return {
            "step_s": self.decode_ms / 1e3,
            "prefill_token_s": self.prefill_token_ms / 1e3,
            "decode_row_s": self.decode_row_ms / 1e3,
            "context_token_s": self.decode_context_ms / 1e3,
        }


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds as a sum of non-negative terms: one for the program of the bucket, one for its head, and what attention
    reads. `terms` are coefficients by the names that `terms_of` gives."""

    terms: Mapping[str, float]

    def step_s(self, step: Features) -> float:
        terms = self.terms
        try:
            return sum([terms[name] * value for name, value in terms_of(step)])
        except KeyError as error:
            raise ValueError(
                f"the profile says nothing about {error.args[0]}: profile the engine with the same "
                f"--max-num-seqs, --max-num-batched-tokens and buckets"
            ) from None

    def parameters(self) -> dict[str, float]:
        pure = {rows: cost for (rows, tiles), cost in self._forwards().items() if not tiles}
        tiled = {tiles: cost for (rows, tiles), cost in self._forwards().items() if tiles and rows == max(pure)}
        least, most = min(pure), max(pure)
        few, many = min(tiled), max(tiled)
        per_row = (pure[most] - pure[least]) / (most - least) if most > least else 0.0
        per_tile = (tiled[many] - tiled[few]) / (many - few) if many > few else tiled[many]
        # What a tile reads of itself: all of it, by half of its tokens.
        own = self.terms.get("tile context", 0.0) + self.terms.get("tile pairs", 0.0) / 2
        own += self.terms.get("tile tokens", 0.0)
        return {
            "step_s": pure[least],
            "prefill_token_s": per_tile / PAGE_TOKENS + own,
            "decode_row_s": per_row + self.terms.get("rows", 0.0),
            "context_token_s": self.terms["context"] + self.terms[f"walk[{most}]"] / most,
        }

    def _forwards(self) -> dict[tuple[int, int], float]:
        found = {}
        for name, cost in self.terms.items():
            if name.startswith("forward["):
                rows, tiles = name.removeprefix("forward[").rstrip("]").split(",")
                found[int(rows), int(tiles)] = cost
        return found


def terms_of(step: Features) -> list[tuple[str, float]]:
    """A step as (name, amount) of each term that it has.

    A program takes its time whatever it computes, and some more for each row and token that is not padding: nothing
    where padding is computed like everything else.

    Attention has two terms for rows and three for tiles, because kernels differ in what costs: the tokens really read,
    for every query of a tile or for those that are not padding (`tile pairs`, in tokens read by a full tile), or the
    longest walk, for which all others wait. How much a step of that walk costs is a property of the program's width:
    rows of the reference walk together, whether they still see something or not.
    """
    rows, tiles = step.bucket
    terms: list[tuple[str, float]] = [(f"forward[{rows},{tiles}]", 1.0)]
    if tiles and step.head:  # without tiles the forward's bucket says which head follows
        terms.append((f"head[{step.head}]", 1.0))
    if step.admits:
        terms.append(("admit", step.admits))
    if step.context:
        terms.append(("rows", step.rows))
        terms.append(("context", step.context))
        terms.append((f"walk[{rows}]", step.longest))
    if step.since_tiles:
        terms.append((f"after tiles[{rows}]", 2.0 ** (-(step.since_tiles - 1) / HALF_WARM)))
    if step.alone:
        terms.append(("alone", 1.0))
    if tiles:
        terms.append(("tile tokens", step.tile_tokens))
        terms.append(("tile context", step.tile_context))
        terms.append(("tile pairs", step.tile_pairs / (2 * PAGE_TOKENS)))
        terms.append(("tile walk", step.tile_longest))
    return terms
