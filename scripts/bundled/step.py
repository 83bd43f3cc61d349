"""The training step: weighted cross entropy through the project's own model, AdamW. Knows arrays, not tasks."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxserve.models import Model, Params
from scripts.bundled.attention import rows_attend

Batch = dict[str, jax.Array]  # tokens, weights, answers, each [rows, T]


class TrainState(NamedTuple):
    """Everything a step changes."""

    params: Params
    optimizer: Any


def _decays(params: Params) -> Params:
    """True for leaves with weight decay: all but norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which the stage gives each step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95), optax.add_decayed_weights(0.1, _decays)
    )


def initial_state(model: Model, seed: int, params: Params | None = None) -> TrainState:
    """A fresh optimizer over `params`, or over random ones."""
    params = model.init(jax.random.key(seed)) if params is None else params
    return TrainState(params, optimizer().init(params))


def next_token_logits(model: Model, params: Params, tokens: jax.Array) -> jax.Array:
    """tokens [rows, T] -> float32 logits [rows * T, vocabulary]. Rows are flat inside: fast on a CPU."""
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), rows)
    hidden, _ = model.forward(params, tokens.reshape(-1), positions, None, rows_attend(model, rows))
    return model.logits(params, hidden)


def _shifted(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Targets, their weights and whether they are answers, flat; the last position of a row has no target."""
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    weights = jnp.roll(batch["weights"], -1, axis=1).at[:, -1].set(0.0)
    answers = (jnp.roll(batch["answers"], -1, axis=1) > 0).at[:, -1].set(False)
    return targets.reshape(-1), weights.reshape(-1), answers.reshape(-1)


@cache
def make_step(model: Model) -> Callable[[TrainState, Batch, float], tuple[TrainState, jax.Array]]:
    """step(state, batch, learning rate) -> (state, [loss, right answer tokens, answer tokens]); one compile a row
    shape.
    """
    update = optimizer().update

    def loss_of(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        targets, weights, answers = _shifted(batch)
        logits = next_token_logits(model, params, batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] >= logits.max(-1)  # argmax is slow on CPU
        right = chosen & answers
        return (losses * weights).sum() / weights.sum(), jnp.stack([right.sum(), answers.sum()])

    @jax.jit
    def step(state: TrainState, batch: Batch, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        (loss, counts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        updates, inner = update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, inner), jnp.concatenate([loss[None], counts.astype(loss.dtype)])

    return step
