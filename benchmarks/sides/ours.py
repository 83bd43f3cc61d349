"""jaxserve as a library: all prompts at once, at most CONCURRENCY running. Arguments: MODEL CONCURRENCY KV_BYTES."""

import sys

from loop import serve

from jaxserve.api import LLM
from jaxserve.types import SamplingParams


def main() -> None:
    model, concurrency, kv_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        model,
        max_num_seqs=concurrency,
        kv_cache_memory=kv_bytes,
        enable_prefix_caching=False,
        dtype="float32",
        wait_for_buckets=True,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    serve(generate)


if __name__ == "__main__":
    main()
