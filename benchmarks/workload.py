"""The prompts of the benchmarks: real questions as token ids of 32 to 512 tokens. Knows no engine.

python benchmarks/workload.py batch OUT.jsonl [--max-tokens 64]      # the 1,000 questions as OpenAI batch lines
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

DATA = Path(__file__).parent / "data" / "prompts.jsonl.gz"


def questions() -> list[str]:
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def token_prompts(model: Path, count: int, low: int = 32, high: int = 512, seed: int = 0) -> list[list[int]]:
    """`count` prompts of `low` to `high` tokens, lengths spread evenly: questions in a drawn order, one after the other
    until a prompt's length is reached, the last one cut there."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    draw = random.Random(seed)
    texts = questions()
    draw.shuffle(texts)
    lengths = [low + (high - low) * i // max(count - 1, 1) for i in range(count)]
    draw.shuffle(lengths)
    source = iter(texts * (1 + count * high // len(texts)))
    prompts = []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(next(source) + "\n\n", add_special_tokens=False).ids
        prompts.append(ids[:length])
    return prompts


def write_batch(path: Path, max_tokens: int) -> None:
    """The questions as batch lines, chats and completions in turn."""
    with open(path, "w", encoding="utf-8") as file:
        for i, text in enumerate(questions()):
            if i % 2:
                url, body = "/v1/completions", {"prompt": text}
            else:
                url, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}
            line = {
                "custom_id": f"question-{i}",
                "method": "POST",
                "url": url,
                "body": {**body, "max_tokens": max_tokens},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["batch"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    write_batch(args.out, args.max_tokens)


if __name__ == "__main__":
    main()
