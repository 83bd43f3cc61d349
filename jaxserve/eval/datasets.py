"""Question sets from files, with the scoring rules that their authors published. Knows no engine.

A set is JSON lines (or .gz). It becomes `Question`s, whose answer is generated and judged, or `Choice`s, whose options
are ranked by log-likelihood. Scores of a set are comparable with published ones only where the prompt is the same too:
plain prompts here are those of EleutherAI's lm-evaluation-harness, without examples before them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.config import ConfigError

Judge = Callable[[str], float]


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is generated. `judge(output)` gives its score, 0 to 1."""

    prompt: str
    golden: str
    judge: Judge
    max_tokens: int


@dataclass(frozen=True)
class Choice:
    """Continuations of `context`; `golden` is the index of the right one. One continuation alone counts as right when
    greedy decoding would write it."""

    context: str
    options: tuple[str, ...]
    golden: int


Item = Question | Choice


def read(name: str, path: Path) -> list[Item]:
    """
    Raises:
        ConfigError: an unknown set; a file that cannot be read; a line that is not one of this set, by its number.
    """
    if name not in READERS:
        raise ConfigError(f"--data {name}: the sets are {', '.join(READERS)}")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data {name}={path}: {getattr(error, 'strerror', None) or error}") from None
    items: list[Item] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                items.append(READERS[name](json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ConfigError(f"--data {name}={path}, line {number}: {type(error).__name__}: {error}") from None
    if not items:
        raise ConfigError(f"--data {name}={path} holds no questions")
    return items


_NUMBER = re.compile(r"-?\$?\d[\d,]*\.?\d*")


def last_number(text: str) -> str | None:
    """The number after `####` where there is one, otherwise the last; without separators, currency and a final dot."""
    marked = re.search(r"####\s*(" + _NUMBER.pattern + ")", text)
    found = [marked[1]] if marked else _NUMBER.findall(text)
    return found[-1].replace(",", "").replace("$", "").rstrip(".") if found else None


def gsm8k(row: Mapping[str, Any]) -> Item:
    """Grade-school mathematics (arXiv:2110.14168), flexible match: the last number of the answer is the golden one."""
    golden = last_number(row["answer"])
    if golden is None:
        raise ValueError("the answer has no number")

    def judge(output: str) -> float:
        # A model without a chat template goes on with a question of its own.
        found = last_number(output.split("\nQuestion:")[0])
        return float(found is not None and float(found) == float(golden))

    return Question(f"Question: {row['question']}\nAnswer:", golden, judge, 256)


def lambada(row: Mapping[str, Any]) -> Item:
    """The last word of a passage (arXiv:1606.06031): right when every token of it is the most probable one."""
    context, _, word = row["text"].rpartition(" ")
    if not context:
        raise ValueError("the text is a single word")
    return Choice(context, (" " + word,), 0)


def multiple_choice(row: Mapping[str, Any]) -> Item:
    """`question`, `choices` and `answer` (an index, or the choice): the most probable choice counts (lm-eval's acc)."""
    choices, answer = list(row["choices"]), row["answer"]
    golden = choices.index(answer) if isinstance(answer, str) else int(answer)
    if not 0 <= golden < len(choices) or len(choices) < 2:
        raise ValueError(f"answer {answer!r} is not one of {len(choices)} choices, of which there must be two")
    return Choice(f"Question: {row['question']}\nAnswer:", tuple(f" {choice}" for choice in choices), golden)


def json_schema(row: Mapping[str, Any]) -> Item:
    """`schema`, and perhaps `prompt`: right when the first JSON value of the answer is valid (JSONSchemaBench)."""
    try:
        import jsonschema
    except ImportError:
        raise ConfigError("--data json-schema needs the package jsonschema: pip install 'jaxserve[test]'") from None
    validator = jsonschema.validators.validator_for(row["schema"])(row["schema"])
    asked = row.get("prompt") or "Write a JSON value that is valid under this schema."
    prompt = f"{asked}\nSchema: {json.dumps(row['schema'])}\nJSON:"
    return Question(prompt, "", lambda output: float(_valid(validator, first_json(output))), 256)


def _valid(validator: Any, value: Any) -> bool:
    return value is not MISSING and validator.is_valid(value)


MISSING = object()


def first_json(text: str) -> Any:
    """The first JSON object or array in a text; MISSING without one."""
    for match in re.finditer(r"[{\[]", text):
        try:
            return json.JSONDecoder().raw_decode(text, match.start())[0]
        except ValueError:
            continue
    return MISSING


def function_call(row: Mapping[str, Any]) -> Item:
    """BFCL's rows with `ground_truth`: right when the calls have the names and, for every argument, one of the values
    listed; an argument may be missing where "" is listed. Calls are asked for and read as a JSON array of
    {"name", "arguments"} (the AST check of the Berkeley Function-Calling Leaderboard, on JSON)."""
    wanted = list(row["ground_truth"])
    asked = "\n".join(message["content"] for message in row["question"][0])
    prompt = (
        f"Functions: {json.dumps(row['function'])}\n"
        'Answer with a JSON array of calls, each {"name": ..., "arguments": {...}}.\n'
        f"Question: {asked}\nAnswer:"
    )
    return Question(prompt, json.dumps(wanted), lambda output: float(_calls_match(first_json(output), wanted)), 256)


def _calls_match(found: Any, wanted: list[Mapping[str, Any]]) -> bool:
    calls = [found] if isinstance(found, dict) else found
    if not isinstance(calls, list) or len(calls) != len(wanted):
        return False
    left = list(wanted)
    for call in calls:
        match = next((one for one in left if _call_matches(call, one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _call_matches(call: Any, wanted: Mapping[str, Any]) -> bool:
    [(name, arguments)] = wanted.items()
    if not isinstance(call, dict) or call.get("name") != name or not isinstance(call.get("arguments"), dict):
        return False
    given = call["arguments"]
    if set(given) - set(arguments):
        return False
    return all(
        _plain(given[key]) in map(_plain, allowed) if key in given else "" in allowed
        for key, allowed in arguments.items()
    )


def _plain(value: Any) -> Any:
    """Strings compare without case and punctuation, as in BFCL; 1 is not True."""
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^]", "", value).lower()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return (type(value) is bool, value)


READERS: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "gsm8k": gsm8k,
    "lambada": lambada,
    "multiple-choice": multiple_choice,
    "json-schema": json_schema,
    "function-call": function_call,
}
