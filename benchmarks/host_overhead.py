"""What a step costs the host: scheduler, batch building and output handling, with a device that answers at once.

    python benchmarks/host_overhead.py --rows 256 --steps 300

Prints processor milliseconds a step of the engine's thread. Streaming requests, greedy, all rows decoding.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxserve import bundled
from jaxserve.checkpoint import read_config
from jaxserve.engine.core import EngineCore
from jaxserve.engine.inbox import Inbox
from jaxserve.engine.programs import Program, ProgramSet
from jaxserve.engine.runner import Runner
from jaxserve.engine.shapes import EngineShape
from jaxserve.engine.step import StepFunctions
from jaxserve.kv import formats, kv_shapes
from jaxserve.models.model import Model
from jaxserve.quant.linear import LinearContext
from jaxserve.sampling import state
from jaxserve.sampling.head import Out
from jaxserve.sampling.state import SlotLayout
from jaxserve.scheduler import Limits, Scheduler, make_policy
from jaxserve.types import ModelLimits, PageClass, PageClasses, Ready, Request, SamplingParams, Submit


class InstantDevice(ProgramSet):
    """Answers every program with arrays of the right shape that hold token 7."""

    def __init__(self, rows: int) -> None:
        super().__init__(None)
        self._out = np.tile(np.array([1, 0, 7], np.int32), (rows, 1))

    def ready(self, name: str) -> Any:
        program = self._declared[name]
        return lambda *args: self._answer(program, args)

    def _answer(self, program: Program, args: tuple) -> Any:
        if program.name.startswith("head"):
            return args[1], Out(self._out)  # type: ignore[arg-type]
        if program.name.startswith("decode"):
            return args[1], args[2], Out(self._out)  # type: ignore[arg-type]
        if program.name.startswith("forward"):
            return args[1], args[2], np.zeros(())
        return args[0]


def engine(rows: int, length: int) -> tuple[EngineCore, Inbox, list]:
    config = read_config(bundled.path())
    model = Model.from_config(config, "float32")
    shape = EngineShape(slots=rows, max_len=length, q=1, decode=(rows,), tiles=(32,))
    layout = SlotLayout(
        slots=rows, max_len=length, vocab=config.vocab_size, hidden_rows=shape.hidden_rows, hidden_dim=config.hidden
    )
    pages = rows * (length // 64)
    classes = (PageClasses(classes=(PageClass(name="dense", pages=pages, bytes=1),)),)
    groups, params = model.kv_groups(), model.abstract_params()
    kv = kv_shapes(groups, [formats.get("f32")], [(pages,)], rows, length)
    functions = StepFunctions(model, shape, layout, LinearContext(), None, params, groups, kv, state.shapes(layout))
    device = InstantDevice(shape.head_rows[-1])
    device.declare(functions.programs())
    limits = Limits(
        max_num_seqs=rows,
        max_num_batched_tokens=shape.budget + rows,
        max_model_len=length,
        max_tiles=32,
        max_decode_rows=rows,
    )
    ready = Ready(
        limits=ModelLimits(vocab_size=config.vocab_size, max_model_len=length),
        num_pages=(pages,),
        page_tokens=64,
        max_num_seqs=rows,
        startup_s=0.0,
    )
    inbox, said = Inbox(), []
    runner = Runner(functions, device, params, kv, state.shapes(layout))
    core = EngineCore(
        Scheduler(make_policy("sarathi"), limits, classes),
        runner,
        device,
        ready,
        "bench",
        inbox,
        said.append,
        prefix_caching=True,
    )
    return core, inbox, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="sequences decoding")
    parser.add_argument("--steps", type=int, default=300, help="steps measured")
    args = parser.parse_args()
    core, inbox, said = engine(args.rows, 2048)
    params = SamplingParams(temperature=0.0, max_tokens=args.steps + 200, seed=0, ignore_eos=True)
    for index in range(args.rows):
        inbox.put(Submit(request=Request(id=str(index), prompt=[5] * 32, params=params)))
    for _ in range(30):
        core.step()
    gc.collect()
    gc.freeze()
    samples = []
    for _ in range(args.steps):
        start = time.thread_time()
        core.step()
        samples.append((time.thread_time() - start) * 1e3)
    tokens = sum(len(delta.tokens) for message in said[-args.steps :] for delta in message.deltas)
    print(f"jax {jax.__version__}, {args.rows} sequences, {tokens / args.steps:.0f} tokens a step")
    ordered = sorted(samples)
    print(
        f"host ms a step: mean {statistics.mean(samples):.2f}, median {ordered[len(ordered) // 2]:.2f}, "
        f"p99 {ordered[int(len(ordered) * 0.99)]:.2f}"
    )


if __name__ == "__main__":
    main()
