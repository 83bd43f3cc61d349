"""Trains, measures and writes the bundled model; the parts are in scripts/bundled/. Knows nothing of serving."""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.checkpoint import load_model  # noqa: E402
from jaxserve.models import Model, model_config_from_hf  # noqa: E402
from scripts.bundled.curriculum import CURRICULA  # noqa: E402
from scripts.bundled.evaluate import markdown  # noqa: E402
from scripts.bundled.prepare import prepare  # noqa: E402
from scripts.bundled.release import measure, release  # noqa: E402
from scripts.bundled.trainer import Trainer  # noqa: E402

VOCABULARY = 2048
MAX_POSITIONS = 4096


def hf_config(
    vocabulary: int = VOCABULARY,
    hidden: int = 256,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    intermediate: int = 512,
) -> dict[str, object]:
    """config.json of the bundled model: Qwen3's layout."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        help="folder with kids_stories.txt.gz, dialogues.txt.gz, books.txt.gz, expository.txt.gz",
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of checkpoints, tokenizer and log; training resumes from it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop (and save) after so much time")
    parser.add_argument("--steps", type=int, default=None, help="stop (and save) after so many further steps")
    parser.add_argument(
        "--init",
        type=Path,
        help="begin from the weights and the tokenizer of this Hugging Face folder instead of from nothing",
    )
    parser.add_argument(
        "--export", type=Path, help="after that, measure the newest checkpoint and write it to this folder"
    )
    parser.add_argument(
        "--documents", type=int, default=8, help="documents of a cell of the measurement (some take more)"
    )
    parser.add_argument(
        "--lineage",
        default="Trained from nothing through the stages of the curriculum.",
        help="a sentence for the model card",
    )
    arguments = parser.parse_args()
    config, start, tokenizer_file = hf_config(), None, arguments.work / "tokenizer.json"
    if arguments.init is not None:
        config = json.loads((arguments.init / "config.json").read_text()) | {"max_position_embeddings": MAX_POSITIONS}
        start, tokenizer_file = load_model(arguments.init, "float32")[1], arguments.init / "tokenizer.json"
    prepared = prepare(arguments.corpus, tokenizer_file, VOCABULARY)
    model = Model.from_config(model_config_from_hf(config), "float32")

    def say(line: str) -> None:
        print(time.strftime("%H:%M:%S "), line, flush=True)

    stages = CURRICULA["from-nothing" if start is None else "continued"]
    trainer = Trainer(model, prepared, stages, arguments.seed, arguments.work, start, say=say)
    state = trainer.run(time.time() + 60 * arguments.minutes, arguments.steps)
    if arguments.export is not None:
        measured = measure(model, state.params, prepared, arguments.documents, f"release/{arguments.seed}")
        print(markdown(measured["recall"]), json.dumps(measured["gates"], indent=1), sep="\n\n")
        release(model, state.params, prepared, arguments.corpus, arguments.export, measured, arguments.lineage)


if __name__ == "__main__":
    main()
