"""Chat messages, checked and reduced to what templates read: plain JSON with text as content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.types import ParamError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages`: `content` is a string (text parts joined by line ends), arguments of calls are objects.

    Raises:
        ParamError: `messages`, naming the first message that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ParamError("messages", "messages must be a list of at least one message")
    return [_plain(index, message) for index, message in enumerate(messages)]


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ParamError("messages", f"{where} must be an object with role and content, not {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ParamError("messages", f"{where}.role must be one of {', '.join(ROLES)}, not {_show(role)}")
    try:
        plain = json.loads(json.dumps(dict(message)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamError("messages", f"{where} must be plain JSON: {error}") from None
    plain["content"] = _text(where, plain.get("content"), optional=role == "assistant")
    if plain.get("tool_calls") is None:
        plain.pop("tool_calls", None)
    else:
        plain["tool_calls"] = _tool_calls(where, plain["tool_calls"])
    if role == "assistant" and message.get("content") is None and "tool_calls" not in plain:
        raise ParamError("messages", f"{where} needs content or tool_calls")
    return plain


def _text(where: str, content: Any, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise ParamError("messages", f"{where}.content must be a string or a list of text parts, not {_kind(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            raise ParamError(
                "messages", f"{where}.content[{index}] is {_show(kind)}; this model reads parts of type text only"
            )
        if not isinstance(part.get("text"), str):
            raise ParamError("messages", f"{where}.content[{index}].text must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Arguments travel as JSON text, but templates write them from objects."""
    if not isinstance(calls, list):
        raise ParamError("messages", f"{where}.tool_calls must be a list, not {_kind(calls)}")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ParamError("messages", f"{where}.tool_calls[{index}] must be an object with function.name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments) if arguments else {}
            except (ValueError, RecursionError):
                raise ParamError("messages", f"{where}.tool_calls[{index}].function.arguments is not JSON") from None
    return calls


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _show(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str) else _kind(value)
