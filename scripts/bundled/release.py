"""Writes a trained model as a Hugging Face folder with its measurements, card and notices. Knows no training."""

import json
import shutil
from pathlib import Path
from string import Template
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint import export_hf
from jaxserve.models import Model, Params
from scripts.bundled.curriculum import Stage
from scripts.bundled.evaluate import CELLS, Cell, bits_per_byte, make_predict, markdown, table, verdicts
from scripts.bundled.prepare import Prepared
from scripts.bundled.tasks import IDENTITY
from scripts.bundled.tokenizer import END_OF_TEXT, IM_END, write_tokenizer

_CARD = Path(__file__).with_name("card.md")
LENGTHS = (512, 1024, 2048)
_TEST_WORDS = Stage("release", 2048, 1, {})


def rounded(params: Params) -> Params:
    """Parameters with the values that bf16 keeps, in float32: what is measured is what is shipped."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def measure(
    model: Model,
    params: Params,
    prepared: Prepared,
    documents: int,
    seed: str,
    lengths: tuple[int, ...] = LENGTHS,
    cells: tuple[Cell, ...] = CELLS,
) -> dict[str, Any]:
    """Recall by task, format and length; the release gates; bits per byte of held-out stories."""
    params = rounded(params)
    records = table(
        make_predict(model),
        params,
        prepared.tokenizer,
        prepared.test_world(_TEST_WORDS),
        prepared.words,
        lengths,
        documents,
        seed,
        cells,
    )
    return {
        "recall": records,
        "gates": verdicts(records),
        "documents_a_cell": documents,
        "seed": seed,
        "stories_bits_per_byte": round(
            bits_per_byte(model, params, prepared.tokenizer, prepared.held_out.documents["kids_stories"], 40), 3
        ),
    }


def reply(model: Model, params: Params, prepared: Prepared, messages: list[str], most: int = 40) -> str:
    """Greedy answer to alternating user and assistant messages, by full forward passes over a padded row: for samples,
    not for serving.
    """
    tokenizer, predict = prepared.tokenizer, make_predict(model)
    turns = "".join(f"<|im_start|>{('user', 'assistant')[i % 2]}\n{m}<|im_end|>\n" for i, m in enumerate(messages))
    ids = tokenizer.encode(f"{END_OF_TEXT}{turns}<|im_start|>assistant\n").ids
    start, end = len(ids), tokenizer.token_to_id(IM_END)
    row = np.zeros((1, 256), np.int32)
    while len(ids) < min(start + most, row.shape[1]):
        row[0, : len(ids)] = ids
        token = int(predict(params, jnp.asarray(row))[0, len(ids) - 1])
        if token == end:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


SAMPLES = (
    ["Hello!"],
    ["Who are you?"],
    ["The code of the blue box is 4821. The code of the red lamp is 7305. What is the code of the red lamp?"],
    ["Anna is in the kitchen. Paul is in the garden. The key is with Anna. The map is with Paul. Where is the map?"],
    ["The password of the tower is breeze. The password of the mill is gravel. What is the password of the mill?"],
    ["What do you like to eat?"],
    ["I want to see a movie tonight."],
)


def release(
    model: Model, params: Params, prepared: Prepared, corpus: Path, folder: Path, measured: dict[str, Any], lineage: str
) -> None:
    """The folder: config, weights in bf16, tokenizer, generation defaults, `recall.json`, card, notices and credits.

    `lineage` says in Markdown from what and how long the weights were trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    export_hf(model, params, folder, "bfloat16")
    write_tokenizer(prepared.tokenizer, folder, model.config.max_position)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 3, "do_sample": False}, indent=1) + "\n"
    )
    (folder / "recall.json").write_text(json.dumps(measured, indent=1) + "\n")
    samples = [(m[-1], reply(model, rounded(params), prepared, m)) for m in SAMPLES]
    (folder / "README.md").write_text(card(model, params, corpus, measured, lineage, samples))
    for name, target in (("NOTICES.txt", "NOTICES.txt"), ("kids_stories_credits.tsv", "kids_stories_credits.tsv")):
        if (corpus / name).is_file():
            shutil.copyfile(corpus / name, folder / target)


def _sources(corpus: Path) -> str:
    """The attribution table of the corpus, from its README."""
    readme = corpus / "README.md"
    if not readme.is_file():
        return "The corpus folder had no README.md: its sources are not known."
    return "\n".join(
        line for line in readme.read_text().splitlines() if line.startswith(("| file |", "|---", "| **`", "| `"))
    )


def card(
    model: Model, params: Params, corpus: Path, measured: dict[str, Any], lineage: str, samples: list[tuple[str, str]]
) -> str:
    """README.md of the folder, from the template beside this file."""
    c = model.config
    gates = [
        f"| {g['task']} | {g['tokens']} | {100 * g['wanted']:.0f} | {100 * g['reached']:.1f} | "
        f"{'yes' if g['passed'] else 'NO'} |"
        for g in measured["gates"]
    ]
    said = [f"| {asked} | {answer.strip() or '(nothing)'} |".replace("\n", " ") for asked, answer in samples]
    return Template(_CARD.read_text()).substitute(
        identity=IDENTITY.replace("I am", "This is"),
        size=f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.2f}",
        shape=f"hidden {c.hidden}, {c.layers} layers, {c.heads} query and {c.kv_heads} key-value heads of {c.head_dim}",
        vocabulary=c.vocab_size,
        positions=c.max_position,
        trained=max(LENGTHS),
        seed=measured["seed"],
        documents=measured["documents_a_cell"],
        most=measured["documents_a_cell"] * max(cell.times for cell in CELLS),
        recall=markdown(measured["recall"]),
        gates="\n".join(gates),
        bits=measured["stories_bits_per_byte"],
        samples="\n".join(said),
        lineage=lineage,
        sources=_sources(corpus),
    )
