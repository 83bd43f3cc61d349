"""EleutherAI's lm-evaluation-harness, unmodified, against the server. Needs its command in JAXSERVE_LM_EVAL (an
environment with `lm_eval[api]` and transformers)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from jaxserve import bundled
from tests.conformance.conftest import Server

COMMAND = os.environ.get("JAXSERVE_LM_EVAL")
TASKS = Path(__file__).parent / "lm_eval"
ROWS = [
    {
        "context": "The code of the red lamp is 7305. The code of the box is 4821. What is the code of the red lamp?",
        "choices": ["7305", "4821"],
        "answer": 0,
        "sentence": "The code of the red lamp is 7305.",
    },
    {
        "context": "Anna lives in Paris. Paul lives in Rome. Where does Paul live?",
        "choices": ["Paris", "Rome"],
        "answer": 1,
        "sentence": "Paul lives in Rome.",
    },
]

pytestmark = [pytest.mark.peer, pytest.mark.skipif(COMMAND is None, reason="JAXSERVE_LM_EVAL names no lm_eval command")]


def lm_eval(tmp_path: Path, tasks: list[str], *arguments: str) -> dict[str, dict[str, float]]:
    """Runs tasks over ROWS and returns their results by task."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({**row, "question": row["context"], "text": row["context"]}) + "\n" for row in ROWS)
    )
    for task in tasks:
        text = (TASKS / f"{task}.yaml").read_text()
        (tmp_path / f"{task}.yaml").write_text(f"{text}dataset_kwargs:\n  data_files:\n    test: {rows}\n")
    command = [str(COMMAND), *arguments, "--include_path", str(tmp_path), "--tasks", ",".join(tasks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results*.json")
    return json.loads(file.read_text())["results"]


def test_local_completions_with_echo_logprobs_and_batches_of_token_ids(server: Server, tmp_path: Path) -> None:
    where = f"base_url={server.url}/v1/completions,model=small,tokenizer={bundled.path()}"
    options = "tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=2,max_length=1024"
    found = lm_eval(
        tmp_path,
        ["small_choice", "small_rolling"],
        "--model",
        "local-completions",
        "--model_args",
        f"{where},{options}",
        "--batch_size",
        "4",
    )
    assert found["small_choice"]["acc,none"] == 1.0
    assert 0.5 < found["small_rolling"]["bits_per_byte,none"] < 8


def test_local_chat_completions(server: Server, tmp_path: Path) -> None:
    found = lm_eval(
        tmp_path,
        ["small_answer"],
        "--model",
        "local-chat-completions",
        "--apply_chat_template",
        "--model_args",
        f"base_url={server.url}/v1/chat/completions,model=small,num_concurrent=2",
    )
    assert found["small_answer"]["exact_match,none"] == 1.0
