"""Runs the curriculum: stages, gates, checkpoints that resume exactly, a progress line. Knows no export."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxserve.models import Model, Params
from scripts.bundled.curriculum import Gate, Stage
from scripts.bundled.data import batches
from scripts.bundled.evaluate import make_predict, recall, task_batches
from scripts.bundled.prepare import Prepared
from scripts.bundled.step import TrainState, initial_state, make_step

GATE_TOKENS = 4096  # of each gate, each time
WARM_UP = 100  # steps
LOG_EVERY = 10


@dataclass(frozen=True)
class Progress:
    """Where training stands. `step` counts inside the stage; the rest are totals."""

    stage: int = 0
    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def stepped(self, tokens: int, seconds: float) -> "Progress":
        return replace(
            self, step=self.step + 1, steps=self.steps + 1, tokens=self.tokens + tokens, seconds=self.seconds + seconds
        )


class Checkpoints:
    """Orbax checkpoints of (state, progress) in a folder, the newest three."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=3, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState, progress: Progress) -> None:
        if self._manager.latest_step() != progress.steps:
            self._manager.save(
                progress.steps,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(asdict(progress))
                ),
            )

    def latest(self, like: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint, or None. `like` gives structure, shapes and dtypes."""
        if (newest := self._manager.latest_step()) is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        )
        return TrainState(*found.state), Progress(**found.progress)

    def close(self) -> None:
        self._manager.close()


class Trainer:
    """Trains `model` on `prepared` through `stages`. The same seed gives the same parameters, interrupted or not.

    `start`: parameters to begin from; random ones otherwise.
    """

    def __init__(
        self,
        model: Model,
        prepared: Prepared,
        stages: Sequence[Stage],
        seed: int,
        folder: Path,
        start: Params | None = None,
        save_seconds: float = 100.0,
        gate_every: int = 50,
        say: Callable[[str], None] = print,
    ):
        self.model, self.prepared, self.stages, self.seed = model, prepared, stages, seed
        self.start, self.save_seconds, self.gate_every, self.say = start, save_seconds, gate_every, say
        self.step = make_step(model)
        self.predict = make_predict(model)
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.records = folder / "progress.jsonl"

    def run(self, stop_at: float = float("inf"), stop_after: int | None = None) -> TrainState:
        """Trains until the stages end, `time.time()` passes `stop_at`, or `stop_after` further steps; saves and returns
        the state.
        """
        state, progress = initial_state(self.model, self.seed, self.start), Progress()
        if (found := self.checkpoints.latest(state)) is not None:
            state, progress = found
            self.say(f"resumed at step {progress.steps}, step {progress.step} of stage {progress.stage}")
        left = stop_after if stop_after is not None else float("inf")
        while progress.stage < len(self.stages) and left > 0 and time.time() < stop_at:
            first = progress.steps
            state, progress = self._run_stage(state, progress, stop_at, left)
            left -= progress.steps - first
        self.checkpoints.save(state, progress)
        return state

    def _run_stage(
        self, state: TrainState, progress: Progress, stop_at: float, left: float
    ) -> tuple[TrainState, Progress]:
        stage, saved, logged = self.stages[progress.stage], time.time(), time.time()
        totals: list[np.ndarray] = []
        feed = batches(self.prepared.source(stage, str(self.seed)), stage.rows, progress.step)
        tokens = stage.rows * stage.length
        while progress.step < stage.most and left > 0 and time.time() < stop_at:
            started = time.time()
            batch = {name: jnp.asarray(array) for name, array in next(feed).items()}
            rate = stage.rate(progress.step) * min(1.0, (progress.steps + 1) / WARM_UP)
            state, numbers = self.step(state, batch, jnp.float32(rate))
            totals.append(np.asarray(numbers))
            progress, left = progress.stepped(tokens, time.time() - started), left - 1
            if progress.step % LOG_EVERY == 0:
                now = time.time()
                self._log(stage, progress, np.stack(totals), len(totals) * tokens / (now - logged))
                totals, logged = [], now
            if progress.step % self.gate_every == 0 and self._gates_open(stage, state, progress):
                break
            if time.time() - saved > self.save_seconds:
                self.checkpoints.save(state, progress)
                saved = time.time()
        else:
            if progress.step < stage.most:
                return state, progress
        progress = replace(progress, stage=progress.stage + 1, step=0)
        self.checkpoints.save(state, progress)
        return state, progress

    def _log(self, stage: Stage, progress: Progress, totals: np.ndarray, speed: float) -> None:
        loss, right, asked = float(totals[:, 0].mean()), totals[:, 1].sum(), max(totals[:, 2].sum(), 1)
        left = stage.most - progress.step + sum(s.most for s in self.stages[progress.stage + 1 :])
        minutes = int(left * stage.rows * stage.length / speed / 60)
        self.say(
            f"step {progress.steps} {stage.name} {progress.step}/{stage.most}  "
            f"loss {loss:.3f}  answers {right / asked:.3f}  {speed:,.0f} tokens/s  ETA at most {minutes} min"
        )
        with self.records.open("a") as file:
            file.write(
                json.dumps(
                    {**asdict(progress), "stage": stage.name, "loss": loss, "answer_tokens": float(right / asked)}
                )
                + "\n"
            )

    def _gates_open(self, stage: Stage, state: TrainState, progress: Progress) -> bool:
        if progress.step < stage.least:
            return False
        results = [(gate, self._measure(stage, gate, state, progress)) for gate in stage.gates]
        if results:
            self.say(
                "  gates: "
                + ", ".join(
                    f"{gate.task} {100 * share:.0f} % (wants {100 * gate.share:.0f})" for gate, share in results
                )
            )
        return bool(results) and all(share >= gate.share for gate, share in results)

    def _measure(self, stage: Stage, gate: Gate, state: TrainState, progress: Progress) -> float:
        rows = task_batches(
            self.prepared.tokenizer,
            self.prepared.test_world(stage),
            gate.task,
            stage.length,
            max(1, GATE_TOKENS // stage.length),
            f"gate/{self.seed}/{stage.name}/{progress.step}",
        )
        found = recall(self.predict, state.params, rows)
        return found.share if gate.whole else found.token_share
