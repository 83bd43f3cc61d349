"""vLLM as a library. Arguments: MODEL CONCURRENCY. Runs under vLLM's own Python; the environment says the rest."""

import sys

from loop import serve
from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=int(sys.argv[2]),
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    serve(generate)


if __name__ == "__main__":
    main()
