"""What a step did: its results fetched, folded into sequences and told to scheduler and front end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.runner import Launched
from jaxserve.engine.sequence import Sequence
from jaxserve.sampling.logprobs import Logprobs
from jaxserve.types import Delta, SeqId, SeqResult, TokenLogprobs


@dataclass(frozen=True)
class Outcome:
    results: tuple[SeqResult, ...]
    deltas: list[Delta]
    finished: list[Sequence]


def finish_step(launched: Launched, sequences: Mapping[SeqId, Sequence], counters: dict[str, float]) -> Outcome:
    """Waits for the step's tokens and takes them in. Sequences that are gone by now are skipped."""
    for work, scores in launched.scores:
        sequence = sequences.get(work.seq)
        if sequence is not None:
            _take_prompt_logprobs(sequence, work.start, work.count, scores)
    if launched.out is None:
        # A step of prefill chunks only: waiting for it keeps the host from running ahead of later arrivals.
        np.asarray(launched.done)
        return Outcome((), [], [])
    packed = np.asarray(launched.out.packed)
    rows = packed[: len(launched.rows)].tolist()
    logprobs = launched.out.logprobs
    results: list[SeqResult] = []
    deltas: list[Delta] = []
    finished: list[Sequence] = []
    for index, (seq, (count, drafted, *tokens)) in enumerate(zip(launched.rows, rows, strict=True)):
        sequence = sequences.get(seq)
        if sequence is None or sequence.finish is not None:
            continue
        if count < 0:
            counters["corrupted_requests"] += 1
            sequence.fail("the model's logits were not finite, or every token was forbidden")
            results.append(SeqResult(seq=seq, tokens=0, finished=True))
        else:
            wanted = sequence.request.params.logprobs
            entries = _entries(logprobs, index, tokens[:count], wanted) if logprobs and wanted is not None else None
            result = sequence.append(tokens[:count], entries)
            results.append(result)
            counters["generation_tokens"] += result.tokens
            if drafted:
                counters["spec_decode_num_drafts"] += 1
                counters["spec_decode_num_draft_tokens"] += drafted
                counters["spec_decode_num_accepted_tokens"] += max(0, count - 1)
        if sequence.finish is not None:
            finished.append(sequence)
        if sequence.finish is not None or sequence.request.stream:
            delta = sequence.take_delta()
            if delta is not None:
                deltas.append(delta)
    return Outcome(tuple(results), deltas, finished)


def _entries(logprobs: Logprobs, row: int, tokens: list[int], alternatives: int) -> list[TokenLogprobs]:
    of_row = Logprobs(np.asarray(logprobs.packed)[row])  # type: ignore[arg-type]
    return [_entry(of_row, i, token, alternatives) for i, token in enumerate(tokens)]


def _entry(logprobs: Logprobs, index: int, token: int, alternatives: int) -> TokenLogprobs:
    return TokenLogprobs(
        ids=(token, *logprobs.top_ids[index, :alternatives].tolist()),
        logprobs=(float(logprobs.logprob[index]), *logprobs.top_logprobs[index, :alternatives].tolist()),
        rank=int(logprobs.rank[index]),
    )


def _take_prompt_logprobs(sequence: Sequence, start: int, count: int, scores: Logprobs) -> None:
    """Rows of a tile say what they thought of the token after them; the prompt's last token has none after it."""
    known = sequence.prompt_logprobs
    if known is None or start + 1 < len(known):
        return  # a preempted sequence computes its prompt a second time
    host = Logprobs(np.asarray(scores.packed))  # type: ignore[arg-type]
    alternatives = sequence.request.params.prompt_logprobs or 0
    for index in range(min(count, sequence.prompt - 1 - start)):
        known.append(_entry(host, index, sequence.tokens[start + index + 1], alternatives))
