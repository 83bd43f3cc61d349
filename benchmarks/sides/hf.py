"""Hugging Face `generate` in float32. Arguments: MODEL BATCH THREADS. Batches are padded on the left."""

import sys

import torch
from loop import serve
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        outputs = []
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            width = max(map(len, group))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in group])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
            # Both limits at max_tokens: no end of sequence may shorten a run.
            new = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            outputs += new[:, width:].tolist()
        return outputs

    serve(generate)


if __name__ == "__main__":
    main()
