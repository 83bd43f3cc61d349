"""Scheduling policies by name. One file each; a policy from elsewhere registers itself the same way."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from jaxserve.scheduler.policy import Policy, Wrapper

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
    """A new policy. `outer+inner` is a wrapper over another policy; its parameter `inner` holds that one's parameters.

    Raises:
        ValueError: no policy has this name, or it does not take these parameters.
    """
    outer, _, inner = name.partition("+")
    kind = _registered.get(outer)
    if kind is None:
        raise ValueError(f"there is no scheduling policy {outer!r} (use {', '.join(names())})")
    try:
        if issubclass(kind, Wrapper):
            return kind(make(inner or kind.default_inner, **params.pop("inner", {})), **params)
        if inner:
            wrappers = ", ".join(other for other in names() if issubclass(_registered[other], Wrapper))
            raise ValueError(f"scheduling policy {outer!r} goes over no other ({wrappers} do)")
        return kind(**params)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in params.items())
        raise ValueError(f"scheduling policy {outer!r} with {given or 'no parameters'}: {error}") from None


for _module in (
    "auto",
    "batchllm",
    "continuum",
    "fairness",
    "fcfs",
    "mlfq",
    "prepacking",
    "priority",
    "sarathi",
    "slora",
    "srpt",
    "static",
    "urgency",
):
    import_module(f"{__name__}.{_module}")
