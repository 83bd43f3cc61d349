"""Sampling parameters, checked: every number and index that could reach a device, against the model's limits.

XLA clamps a bad index silently and NaN spreads, so nothing passes here that the device could misread. Knows no request,
no HTTP; errors are ParamError with the name that a client knows, the value and the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import msgspec

from jaxserve.text.stops import MAX_STOP_CHARS
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelLimits, ParamError, SamplingParams

MAX_TEMPERATURE = 100.0
"""Beyond this, logits are equal within rounding; float32 would overflow much later."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are 0, as in vLLM: dividing logits by them overflows."""
MAX_REPETITION = 100.0
SEED_BITS = 63


@dataclass(frozen=True)
class Resolved:
    """Parameters as an engine takes them: `max_tokens` and `seed` set, plain Python numbers, `banned` for bad_words."""

    params: SamplingParams
    banned: tuple[tuple[int, ...], ...]


def resolve(
    params: SamplingParams, limits: ModelLimits, prompt_len: int, tokenizer: Tokenizer, draw_seed: Callable[[], int]
) -> Resolved:
    """Checks `params` for a prompt of `prompt_len` tokens and settles what was left open.

    `draw_seed` gives a seed in [0, 2^63) to requests without one.

    `max_tokens` 0 generates nothing: for the log-probs of a prompt.

    Raises:
        ParamError: the first parameter that cannot be honoured.
    """
    room = limits.max_model_len - prompt_len
    max_tokens = room if params.max_tokens is None else _whole("max_tokens", params.max_tokens, 0, 2**63 - 1)
    if max_tokens > room:
        raise ParamError(
            "max_tokens",
            f"max_tokens {max_tokens} is too large: the model's context of "
            f"{limits.max_model_len} tokens leaves {room} after the prompt's {prompt_len}",
        )
    min_tokens = _whole("min_tokens", params.min_tokens, 0, 2**63 - 1)
    if min_tokens > max_tokens:
        raise ParamError("min_tokens", f"min_tokens {min_tokens} is more than max_tokens {max_tokens}")
    temperature = _number("temperature", params.temperature, 0, MAX_TEMPERATURE)
    top_k = _whole("top_k", params.top_k, 0, 2**63 - 1)
    allowed = None if params.allowed_token_ids is None else _ids("allowed_token_ids", params.allowed_token_ids, limits)
    banned_ids = _ids("banned_token_ids", params.banned_token_ids, limits)
    if allowed is not None and not set(allowed) - set(banned_ids):
        raise ParamError("allowed_token_ids", "allowed_token_ids leaves no token to generate")
    stop_ids = _ids("stop_token_ids", params.stop_token_ids, limits)
    if len(stop_ids) > limits.max_stop_token_ids:
        raise ParamError(
            "stop_token_ids", f"stop_token_ids holds {len(stop_ids)} ids; the most are {limits.max_stop_token_ids}"
        )
    _check_stops(params, limits)
    resolved = msgspec.structs.replace(
        params,
        n=_whole("n", params.n, 1, limits.max_choices),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_number("top_p", params.top_p, 0, 1, above=True),
        top_k=0 if top_k >= limits.vocab_size else top_k,
        min_p=_number("min_p", params.min_p, 0, 1),
        repetition_penalty=_number("repetition_penalty", params.repetition_penalty, 0, MAX_REPETITION, above=True),
        presence_penalty=_number("presence_penalty", params.presence_penalty, -2, 2),
        frequency_penalty=_number("frequency_penalty", params.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(params.logit_bias, limits),
        allowed_token_ids=allowed,
        banned_token_ids=banned_ids,
        seed=draw_seed() if params.seed is None else _whole("seed", params.seed, -(2**63), 2**63 - 1),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_ids,
        logprobs=_count("logprobs", params.logprobs, limits),
        prompt_logprobs=_count("prompt_logprobs", params.prompt_logprobs, limits),
        **{name: _flag(name, getattr(params, name)) for name in _FLAGS},
    )
    return Resolved(resolved, _banned_sequences(params.bad_words, limits, tokenizer))


def check_prompt(prompt: Sequence[int], limits: ModelLimits, answer: bool = True) -> list[int]:
    """The prompt's token ids as a list. `answer`: at least one token is to be generated after it.

    Raises:
        ParamError: no tokens, ids outside the model's, or more tokens than fit.
    """
    if not prompt:
        raise ParamError("prompt", "the prompt has no tokens")
    longest = limits.max_model_len - answer
    if len(prompt) > longest:
        raise ParamError(
            "prompt",
            f"the prompt has {len(prompt)} tokens; the model's context of "
            f"{limits.max_model_len} leaves room for at most {longest}",
        )
    return list(_ids("prompt", prompt, limits))


_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize")


def _check_stops(params: SamplingParams, limits: ModelLimits) -> None:
    if len(params.stop) > limits.max_stop_strings:
        raise ParamError("stop", f"stop holds {len(params.stop)} strings; the most are {limits.max_stop_strings}")
    for stop in params.stop:
        if not isinstance(stop, str) or not stop:
            raise ParamError("stop", "stop must hold strings that are not empty")
        if len(stop) > MAX_STOP_CHARS:
            raise ParamError("stop", f"a stop string has {len(stop)} characters; the most are {MAX_STOP_CHARS}")
    if params.stop and not params.detokenize:
        raise ParamError("stop", "stop needs detokenize: strings are found in the text")


def _banned_sequences(words: Sequence[str], limits: ModelLimits, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, as it begins a text and as it follows a space."""
    if len(words) > limits.max_banned_sequences:
        raise ParamError("bad_words", f"bad_words holds {len(words)} words; the most are {limits.max_banned_sequences}")
    found: dict[tuple[int, ...], str] = {}
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise ParamError("bad_words", "bad_words must hold words that are not empty")
        bare = word.lstrip()
        if len(bare) > MAX_STOP_CHARS:
            raise ParamError("bad_words", f"a bad word has {len(bare)} characters; the most are {MAX_STOP_CHARS}")
        for spelling in (bare, " " + bare):
            tokens = tuple(tokenizer.encode(spelling, add_special_tokens=False))
            if len(tokens) > limits.max_banned_length:
                raise ParamError(
                    "bad_words",
                    f"the bad word {word!r:.60} takes {len(tokens)} tokens; the most are {limits.max_banned_length}",
                )
            if tokens and max(tokens) < limits.vocab_size:
                found[tokens] = word
    if len(found) > limits.max_banned_sequences:
        raise ParamError(
            "bad_words",
            f"bad_words come to {len(found)} token sequences (with and without a space "
            f"before); the most are {limits.max_banned_sequences}",
        )
    return tuple(found)


def _logit_bias(bias: dict[Any, Any] | None, limits: ModelLimits) -> dict[int, float] | None:
    if not bias:
        return None
    if not isinstance(bias, dict):
        raise ParamError("logit_bias", "logit_bias must map token ids to numbers")
    if len(bias) > limits.max_logit_bias:
        raise ParamError("logit_bias", f"logit_bias names {len(bias)} tokens; the most are {limits.max_logit_bias}")
    found = {}
    for key, value in bias.items():
        # JSON's keys are text.
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19 else key
        _check_ids("logit_bias", (token,), limits)
        found[int(token)] = _number(f"logit_bias of token {token}", value, -100, 100, param="logit_bias")
    return found


def _ids(param: str, ids: Iterable[int], limits: ModelLimits) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ParamError(param, f"{param} must be a list of token ids, not {_show(ids)}")
    found = tuple(ids)
    if param == "allowed_token_ids" and not found:
        raise ParamError(param, "allowed_token_ids is empty, which leaves no token to generate")
    _check_ids(param, found, limits)
    return found if set(map(type, found)) <= {int} else tuple(map(int, found))


def _check_ids(param: str, ids: tuple[Any, ...], limits: ModelLimits) -> None:
    for kind in set(map(type, ids)):
        if kind is bool or not issubclass(kind, Integral):
            wrong = next(token for token in ids if type(token) is kind)
            raise ParamError(param, f"{param} holds {_show(wrong)}, which is not a token id")
    if ids and (min(ids) < 0 or max(ids) >= limits.vocab_size):
        wrong = next(token for token in ids if not 0 <= token < limits.vocab_size)
        raise ParamError(param, f"{param} names token {_show(wrong)}, but this model has {limits.vocab_size} tokens")


def _count(param: str, value: Any, limits: ModelLimits) -> int | None:
    return None if value is None else _whole(param, value, 0, limits.max_logprobs)


def _flag(param: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ParamError(param, f"{param} must be true or false, not {_show(value)}")
    return value


def _whole(param: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ParamError(param, f"{param} must be a whole number, not {_show(value)}")
    number = int(value)
    if not low <= number <= high:
        raise ParamError(param, f"{param} must be {_range(low, high)} (it is {_show(number)})")
    return number


def _number(name: str, value: Any, low: float, high: float, above: bool = False, param: str | None = None) -> float:
    """`above`: the lower bound itself is excluded."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ParamError(param or name, f"{name} must be a number, not {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high or (above and number == low):
        bounds = f"above {low:g} and at most {high:g}" if above else _range(low, high)
        raise ParamError(param or name, f"{name} must be {bounds} (it is {_show(value)})")
    return number


def _range(low: float, high: float) -> str:
    if high == 2**63 - 1:
        return f"at least {low}" if low >= 0 else "a signed 64-bit number"
    return f"between {low:g} and {high:g}"


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 2**64:
        return "a number beyond 64 bits"
    return f"{value!r:.60}" if isinstance(value, int | float | str | type(None)) else f"of type {type(value).__name__}"
