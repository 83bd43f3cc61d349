"""Chat templates: messages to the prompt a model was trained on, as transformers' `apply_chat_template` renders them.

Templates come with the model and run in jinja2's sandbox over plain JSON values; a request never brings its own. What
they render is tokenized as it stands, so text in a message that looks like a special token is one (as in vLLM).
Rendering has no time limit of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.config import ConfigError
from jaxserve.text.messages import plain_messages
from jaxserve.text.tokenizer import read_tokenizer_config
from jaxserve.types import ParamError

_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "conversation",
        "tokenize",
        "return_dict",
        "self",
        "loop",
        "caller",
        "varargs",
        "kwargs",
    }
)
# Stands where the last message's text ends, to find the place in the prompt. For private use: no text has it by chance.
_END_MARK = "\U000fc0de\U000fc0de"


class ChatTemplate:
    """One model's templates by name; `default` is the one for plain chats, `tool_use` (if any) the one with tools."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None):
        """`special_tokens`: names such as bos_token that templates may use.

        Raises:
            ConfigError: a template that jinja2 cannot parse.
        """
        self._environment = _environment()
        self._special_tokens = dict(special_tokens or {})
        self._sources = dict(templates)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = self._environment.from_string(source)
            except jinja2.TemplateError as error:
                raise ConfigError(f"the chat template {name!r} cannot be parsed: {error}") from None

    @classmethod
    def from_folder(
        cls, folder: str | Path, special_tokens: Mapping[str, str] | None = None, file: str | Path | None = None
    ) -> ChatTemplate:
        """The templates of a model's folder; `file` is used instead of them all.

        Raises:
            ConfigError: a file that cannot be read, or a template that cannot be parsed.
        """
        return cls(_sources(Path(folder), None if file is None else Path(file)), special_tokens)

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`. `options`: further variables of the template (`enable_thinking`, ...).

        `continue_final_message` leaves the last message open, so that the model goes on with it.

        Raises:
            ParamError: naming `messages`, `tools`, `chat_template_kwargs` or `continue_final_message`.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise ParamError(
                "messages",
                "this model has no chat template; send a plain prompt to /v1/completions, or "
                "start with --chat-template FILE",
            )
        self._check_options(options or {})
        chat = plain_messages(messages)
        if "developer" not in self._sources[name]:
            # The newer name of the same role; a template that does not know it would drop the message or fail.
            chat = [{**m, "role": "system"} if m["role"] == "developer" else m for m in chat]
        if continue_final_message:
            if add_generation_prompt:
                raise ParamError(
                    "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
                )
            chat = [*chat[:-1], _open_ended(chat[-1])]
        try:
            prompt = template.render(
                messages=chat,
                tools=_plain_tools(tools),
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **(options or {}),
            )
        except jinja2.TemplateError as error:
            raise ParamError("messages", f"the chat template refuses these messages: {error}") from None
        except Exception as error:  # a template is a program: any of its faults is an answer to these messages
            raise ParamError(
                "messages", f"the chat template fails on these messages: {type(error).__name__}: {error}"
            ) from None
        return _cut(prompt) if continue_final_message else prompt

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if not name.isidentifier() or name.startswith("_"):
                raise ParamError("chat_template_kwargs", f"chat_template_kwargs: {name!r:.60} is not a variable's name")
            if name in _RESERVED or name in self._environment.globals or name in self._special_tokens:
                raise ParamError("chat_template_kwargs", f"chat_template_kwargs must not set {name}")


def _plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if tools is None:
        return None
    try:
        return json.loads(json.dumps(list(tools)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamError("tools", f"tools must be JSON: {error}") from None


def _open_ended(message: dict[str, Any]) -> dict[str, Any]:
    if not message["content"]:
        raise ParamError("continue_final_message", "continue_final_message needs text in the last message")
    # The space shows whether the template strips messages; then the prompt must not end in spaces either.
    return {**message, "content": message["content"] + _END_MARK + " "}


def _cut(prompt: str) -> str:
    found = prompt.rfind(_END_MARK)
    if found < 0:
        raise ParamError(
            "continue_final_message",
            "the chat template does not render the last message as it is, so it cannot be continued",
        )
    keeps_spaces = prompt.startswith(" ", found + len(_END_MARK))
    return prompt[:found] if keeps_spaces else prompt[:found].rstrip()


def _sources(folder: Path, file: Path | None) -> dict[str, str]:
    if file is not None:
        return {"default": _read(file)}
    found: dict[str, str] = {}
    declared = read_tokenizer_config(folder).get("chat_template")
    if isinstance(declared, str):
        found["default"] = declared
    elif isinstance(declared, list):
        found.update((entry["name"], entry["template"]) for entry in declared)
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read(path)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, but without the names that lead to Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *others = args
        merged = dict(*others, **values)
        if any(str(name).startswith("_") for name in merged):
            raise jinja2.exceptions.SecurityError("names in a namespace must not begin with an underscore")
        jinja2.utils.Namespace.__init__(self, merged)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("names in a namespace must not begin with an underscore")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
