"""Scheduling policies by name. One file each; a policy from elsewhere registers itself the same way."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from jaxserve.scheduler.policy import Policy

P = TypeVar("P", bound=type[Policy])

_registered: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: the policy can be chosen as `name`."""

    def add(policy: P) -> P:
        if name in _registered:
            raise ValueError(f"two policies are called {name!r}: {_registered[name]} and {policy}")
        policy.name = name
        _registered[name] = policy
        return policy

    return add


def names() -> tuple[str, ...]:
    return tuple(sorted(_registered))


def make(name: str, **params: Any) -> Policy:
    """A new policy.

    Raises:
        ValueError: no policy has this name, or it does not take these parameters.
    """
    if name not in _registered:
        raise ValueError(f"there is no scheduling policy {name!r} (use {', '.join(names())})")
    try:
        return _registered[name](**params)
    except TypeError as error:
        raise ValueError(f"scheduling policy {name!r}: {error}") from None


for _module in ("fcfs", "priority", "sarathi", "static"):
    import_module(f"{__name__}.{_module}")
