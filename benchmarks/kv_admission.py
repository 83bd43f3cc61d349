"""How many sequences a KV cache holds before one is preempted, 2-bit pages against bfloat16, by length.

    python benchmarks/kv_admission.py                        # the engine's sizing and scheduler, no device; a minute
    python benchmarks/kv_admission.py --engine --lengths 512 --memory 64MiB --max-model-len 512 --engine-seqs 32

Four layers of an 8B Llama's KV shapes: 8 heads of 128. More sequences of one length arrive at once than fit.
Counted is who is in the cache when the first is preempted or has come to its end. With `--engine` an engine with random
weights serves them and its record is counted; without, the same scheduler runs on the same page classes, and a step is
done as soon as it is planned.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from make_model import make

from jaxserve.config import EngineConfig, human_int
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.load import load_core
from jaxserve.kv import formats, size_pages
from jaxserve.scheduler import Limits, Scheduler, make_policy, replay
from jaxserve.types import (
    PAGE_TOKENS,
    Arrive,
    Deltas,
    KVGroup,
    PageClasses,
    Plan,
    Request,
    SamplingParams,
    SeqResult,
    StepDone,
    SubmitAll,
)

GROUP = KVGroup(layers=(0, 1, 2, 3), kv_heads=8, head_dim=128)
GENERATED = PAGE_TOKENS - 1
"""Tokens of an answer: a prompt that ends in the last page, so that nobody's table grows after the prefill."""
TILES = 32
"""Of a step of the engine."""


def classes_of(name: str, expected: int | None, args: argparse.Namespace) -> tuple[PageClasses, ...]:
    return size_pages(
        args.memory,
        (GROUP,),
        (formats.get(name),),
        max_model_len=args.max_model_len,
        max_chunk=TILES * PAGE_TOKENS,
        expected_len=expected,
    )


def scheduled(classes: tuple[PageClasses, ...], length: int, args: argparse.Namespace) -> Iterator[Plan]:
    """Plans of a scheduler whose steps are done at once; a step takes all prefill, so all are there before one ends."""
    count = max(kind.pages for kind in classes[0].classes)  # each holds a page of either class
    limits = Limits(
        max_num_seqs=count,
        max_num_batched_tokens=1 << 40,
        max_model_len=args.max_model_len,
        max_tiles=1 << 20,
        max_decode_rows=count,
        enable_prefix_caching=False,
    )
    scheduler = Scheduler(make_policy("sarathi"), limits, classes)
    for seq in range(count):
        scheduler.on_event(Arrive(now=0.0, seq=seq, prompt=length - GENERATED, max_new=GENERATED))
    left = dict.fromkeys(range(count), GENERATED)
    for _ in range(2 * GENERATED):
        plan = scheduler.plan()
        yield plan
        sampled = [work.seq for work in (*plan.decode, *plan.prefill) if work.samples]
        for seq in sampled:
            left[seq] -= 1
        results = tuple(SeqResult(seq=seq, tokens=1, finished=not left[seq]) for seq in sampled)
        scheduler.on_event(StepDone(now=float(plan.step), step=plan.step, duration=1.0, results=results))


def served(model: Path, name: str, length: int, expected: int | None, args: argparse.Namespace) -> Iterator[Plan]:
    """Plans of an engine that has computed them."""
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.of(
            model=str(model),
            kv_cache_dtype=name,
            kv_cache_memory=args.memory,
            kv_expected_len=expected,
            max_model_len=args.max_model_len,
            max_num_seqs=args.engine_seqs,
            max_num_batched_tokens=TILES * PAGE_TOKENS,
            decode_buckets=[args.engine_seqs],
            tile_buckets=[TILES],
            enable_prefix_caching=False,
            record=f"{folder}/record",
        )
        inbox, said = Inbox(), []
        core = load_core(config, inbox, said.append, lambda _: None)
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=GENERATED, ignore_eos=True)
        prompts = [[(7 * seq + i) % 500 for i in range(length - GENERATED)] for seq in range(args.engine_seqs)]
        requests = [Request(id=str(seq), prompt=prompt, params=params) for seq, prompt in enumerate(prompts)]
        inbox.put(SubmitAll(requests=tuple(requests)))
        ended = False
        while not ended and core.step():
            ended = any(delta.finish for message in said if isinstance(message, Deltas) for delta in message.deltas)
            said.clear()
        core.close()
        yield from list(replay(f"{folder}/record"))


def in_the_cache(plans: Iterable[Plan]) -> tuple[int, bool]:
    """Sequences admitted until one is preempted or has all its tokens, and whether one was preempted."""
    admitted, rows = 0, {}
    for plan in plans:
        if plan.preempted:
            return admitted, True
        admitted += len(plan.admits)
        for work in plan.decode:
            rows[work.seq] = rows.get(work.seq, 1) + 1
            if rows[work.seq] == GENERATED:
                return admitted, False
    raise RuntimeError("no sequence came to its end; give the steps more tiles or the answers more tokens")


def table(args: argparse.Namespace, model: Path | None) -> None:
    fixed = args.max_model_len // 4
    print(f"\n| tokens | `--kv-expected-len` | {' | '.join(f'{name}' for name in args.formats)} | times |")
    print(f"|---:|---:|{'---:|' * len(args.formats)}---:|")
    for length, expected in [*((n, n) for n in args.lengths), *((n, fixed) for n in args.lengths)]:
        counts = []
        for name in args.formats:
            if model is None:
                plans = scheduled(classes_of(name, expected, args), length, args)
            else:
                plans = served(model, name, length, expected, args)
            counts.append(in_the_cache(plans))
        base, last = counts[0][0], counts[-1][0]
        cells = " | ".join(f"{count:,}{' (preempted)' if preempted else ''}" for count, preempted in counts)
        print(f"| {length:,} | {expected:,} | {cells} | {last / base:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=human_int, default=[512, 1024, 4096, 16384], help="of sequences")
    parser.add_argument("--formats", nargs="+", default=["bf16", "hack2"], help="the first is what the last is held to")
    parser.add_argument("--memory", type=human_int, default=8 << 30, help="bytes of KV")
    parser.add_argument("--max-model-len", type=human_int, default=16384, help="a quarter of it is the fixed split")
    parser.add_argument("--engine", action="store_true", help="let an engine compute the sequences")
    parser.add_argument("--engine-seqs", type=int, default=128, help="sequences sent to it, and its slots")
    args = parser.parse_args()
    print(
        f"{args.memory / 2**20:,.0f} MiB of KV, 4 layers, 8 KV heads of 128, {'engine' if args.engine else 'scheduler'}"
    )
    if not args.engine:
        table(args, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
        small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64}
        make(Path(folder), **shape, **small, max_position_embeddings=args.max_model_len)
        table(args, Path(folder))


if __name__ == "__main__":
    main()
