"""What the verbs share in reading a command line: one-line errors, hints for misspelt options, examples in --help."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from jaxserve.config import ConfigError, EngineConfig, add_arguments, fields_of, from_arguments


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ConfigErrors.

    `examples` go to the end of --help as they are.
    """

    def __init__(self, verb: str, description: str, examples: str, **more: Any):
        more.setdefault("prog", f"jaxserve {verb}")
        super().__init__(
            description=textwrap.dedent(description).strip(),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
            formatter_class=_Formatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse.

        Raises:
            ConfigError: for an unknown option, naming the nearest known one.
        """
        found, unknown = self.parse_known_args(None if args is None else list(args), namespace)
        if unknown:
            close = get_close_matches(unknown[0].split("=")[0], self._flags(), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"unknown argument {unknown[0]!r}{hint} (see {self.prog} --help)")
        return found

    def _flags(self) -> list[str]:
        flags = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for sub in action.choices.values() for flag in sub._flags()]
        return flags


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(110, _columns()))


def _columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100


def add_engine_options(parser: Parser) -> None:
    add_arguments(parser, EngineConfig)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine that `args` describe, with the platform chosen: call before anything imports jax."""
    config = from_arguments(EngineConfig, args)
    choose_platform(config)
    return config


def choose_platform(config: EngineConfig) -> None:
    from jaxserve.engine.platform import select_platform

    select_platform(config.runtime.device)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as flat keywords, for `LLM(**options)`."""
    config = engine_config(args)
    options: dict[str, Any] = {}
    for name, (path, _) in fields_of(EngineConfig).items():
        part: Any = config
        for step in path:
            part = getattr(part, step)
        options[name] = getattr(part, name)
    return options
