"""Readings for agreement.py: from an engine, and from Hugging Face transformers on the CPU in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxserve.api import LLM
from jaxserve.checkpoint.source import model_folder
from jaxserve.config import ConfigError, EngineConfig, build, read_yaml
from jaxserve.eval.agreement import Agreement, Reading, agreement
from jaxserve.eval.cells import finished
from jaxserve.eval.options import EvalConfig
from jaxserve.eval.plan import read_inputs
from jaxserve.eval.run import flat_options
from jaxserve.types import SamplingParams, TokenLogprobs

TRANSFORMERS = "transformers"
TOP = 10
"""Alternatives compared."""


def read_engine(llm: LLM, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = TOP) -> list[Reading]:
    """Greedy, beyond any end-of-sequence token."""
    params = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, logprobs=top, prompt_logprobs=top, ignore_eos=True, seed=0
    )
    readings = []
    for output in llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False):
        [choice] = finished(output).outputs
        entries = tuple(choice.logprobs or ())
        readings.append(Reading(tuple(output.prompt_logprobs or ()), tuple(choice.token_ids), entries))
    return readings


def read_transformers(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int, top: int = TOP) -> list[Reading]:
    """The same from transformers.

    Raises:
        ConfigError: transformers or torch is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"--agree-with transformers needs {error.name}: pip install 'jaxserve[test]'") from None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    readings = []
    with torch.inference_mode():
        for prompt in prompts:
            step = model(torch.tensor([list(prompt)]), use_cache=True)
            rows = step.logits[0].log_softmax(-1)
            entries = [None, *(_entry(rows[i], token, top) for i, token in enumerate(prompt[1:]))]
            tokens: list[int] = []
            logprobs = []
            row = rows[-1]
            for _ in range(new_tokens):
                tokens.append(int(row.argmax()))
                logprobs.append(_entry(row, tokens[-1], top))
                step = model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
                row = step.logits[0, -1].log_softmax(-1)
            readings.append(Reading(tuple(entries), tuple(tokens), tuple(logprobs)))
    return readings


def _entry(row, token: int, top: int) -> TokenLogprobs:
    """`row`: a torch tensor [vocabulary] of log-probs."""
    values, ids = row.topk(top)
    rank = int((row > row[token]).sum()) + 1
    return TokenLogprobs(ids=(token, *map(int, ids)), logprobs=(float(row[token]), *map(float, values)), rank=rank)


def agree(config: EvalConfig, reference: str) -> Agreement:
    """The engine of `config` against `reference` (`transformers`, or a YAML file of engine options) on pieces of the
    text, `config.eval.window` tokens each, `config.eval.items` of them, half a window of new tokens.

    Raises:
        ConfigError: as `evaluate`; a text with too few tokens.
    """
    options, inputs = config.eval, read_inputs(config.eval)
    against = None if reference == TRANSFORMERS else _engine_of(config.engine, Path(reference))
    with LLM(**flat_options(config.engine)) as llm:
        new_tokens = options.window // 2
        if options.window + new_tokens > llm.limits.max_model_len:
            raise ConfigError(
                f"--window {options.window} and {new_tokens} new tokens do not fit into this model's context of "
                f"{llm.limits.max_model_len}"
            )
        tokens = llm.get_tokenizer().encode(inputs.text)
        count = min(options.items, len(tokens) // options.window)
        if not count:
            raise ConfigError(f"the text has {len(tokens)} tokens, less than one --window of {options.window}")
        prompts = [tokens[i * options.window : (i + 1) * options.window] for i in range(count)]
        mine = read_engine(llm, prompts, new_tokens)
    if against is None:
        theirs = read_transformers(model_folder(config.engine.model), prompts, new_tokens)
    else:
        with LLM(**flat_options(against)) as llm:
            theirs = read_engine(llm, prompts, new_tokens)
    return agreement(theirs, mine, TOP)


def _engine_of(config: EngineConfig, path: Path) -> EngineConfig:
    return build(EngineConfig, {**flat_options(config), **read_yaml(path)})
