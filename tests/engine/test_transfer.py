"""Export, import, decode: pages computed by one engine serve another bit for bit, and nothing else is taken."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from msgspec.structs import replace

from jaxserve.config import ConfigError
from jaxserve.engine.runner import Runner
from jaxserve.types import Control, ExportPrefix, ImportPrefix, Prefix, PrefixPage
from tests.engine import tiny
from tests.engine.driver import Driver, answers, prompts, same

SHAPE = tiny.SHAPE | {"kv_transfer": True}
FORMATS = {"f16": {}, "int8": {}, "hack4": {"kv_residual_pages": 2, "kv_cache_dtype_layers": {"bf16": 0}}}


@pytest.fixture(scope="module")
def folder(tiny_models: dict[str, Path]) -> Path:
    """A layer that sees 100 tokens, and one that sees all."""
    return tiny_models["gemma"]


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, folder: Path, executables: str) -> tuple[Driver, Driver]:
    """Two engines of one kind."""
    options = {"model": str(folder), "compile_cache": executables, "kv_cache_dtype": request.param}
    return tuple(Driver(**SHAPE | options | FORMATS[request.param]) for _ in range(2))


def export(driver: Driver, tokens: list[int], salt: str = "") -> Prefix:
    return driver.ask(ExportPrefix(token=1, tokens=tuple(tokens), salt=salt))


def bring(driver: Driver, tokens: list[int], pages: tuple[PrefixPage, ...], salt: str = "") -> Prefix:
    return driver.ask(ImportPrefix(token=2, tokens=tuple(tokens), pages=pages, salt=salt))


def test_export_import_decode(pair: tuple[Driver, Driver]) -> None:
    """The same tokens and log-probs, and the same bits in every page that decoding then fills."""
    one, other = pair
    prompt = prompts([300], seed=1)[0]
    (first,) = answers(one, [prompt], temperature=1.0, seed=4)
    prefix = export(one, prompt)
    assert (prefix.count, prefix.error) == (256, None)
    assert bring(other, prompt, prefix.pages) == Prefix(token=2, count=256)
    (second,) = answers(other, [prompt], temperature=1.0, seed=4)
    assert second.cached_tokens == 256
    same([second], [first])
    whole = [*prompt, *first.tokens]
    sent, received = export(one, whole), export(other, whole)
    assert sent.count == 320 and sent.pages == received.pages
    assert bring(other, whole, sent.pages).count == 320


class Held:
    """An array that nobody can read before `gate` opens."""

    def __init__(self, array: Any, gate: threading.Event):
        self._array, self._gate = array, gate

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._gate.wait()
        return np.asarray(self._array)


def test_steps_go_on_while_a_prefix_is_exported(pair: tuple[Driver, Driver], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are served while the pages are on their way, which hold what they held when they were asked for."""
    driver, gate = pair[0], threading.Event()
    first, second = prompts([200, 200], seed=4)
    answers(driver, [first], max_tokens=1)
    pages = export(driver, first).pages
    stage = Runner.stage_pages
    monkeypatch.setattr(
        Runner, "stage_pages", lambda *args: jax.tree.map(lambda array: Held(array, gate), stage(*args))
    )
    driver.prefix = None
    driver.inbox.put(ExportPrefix(token=1, tokens=tuple(first)))
    driver.inbox.put(Control(verb="reset_prefix_cache"))
    driver.submit("other", second, max_tokens=20, ignore_eos=True)
    for _ in range(40):
        driver.core.step()
    assert driver.answers["other", 0].finish is not None and driver.prefix is None
    gate.set()
    driver.run()
    assert driver.prefix == Prefix(token=1, count=192, pages=pages)


def test_what_is_not_cached_is_not_exported(pair: tuple[Driver, Driver]) -> None:
    prompt = prompts([200], seed=2)[0]
    answers(pair[0], [prompt], max_tokens=1, salt="theirs")
    assert export(pair[0], prompt) == Prefix(token=1)
    assert export(pair[0], prompt, "theirs").count == 192


def test_pages_of_others_are_refused(pair: tuple[Driver, Driver]) -> None:
    one, other = pair
    prompt = prompts([200], seed=3)[0]
    answers(one, [prompt], max_tokens=1)
    pages = export(one, prompt).pages
    damaged = replace(pages[0], record=pages[0].record[:-1] + bytes([pages[0].record[-1] ^ 1]))
    elsewhere = [replace(pages[0], index=99), replace(pages[0], group=9), replace(pages[0], group=1 - pages[0].group)]
    for tokens, salt, given, words in [
        (prompt[::-1], "", pages, "computed for other tokens"),
        (prompt, "mine", pages, "computed for other tokens, or by an engine with another"),
        (prompt, "", (damaged,), "damaged"),
        *((prompt, "", (page,), "") for page in elsewhere),
        (prompt, "", (pages[0], pages[0]), "twice"),
    ]:
        answer = bring(other, tokens, given, salt)
        assert answer.error is not None and words in answer.error and answer.count == 0
    assert answers(other, [prompt], max_tokens=1)[0].cached_tokens == 0
    assert other.counter("undeclared_compilations") == 0


def test_transfer_is_asked_for(folder: Path, executables: str) -> None:
    with pytest.raises(ConfigError, match="--kv-transfer needs prefix caching"):
        Driver(**SHAPE, model=str(folder), enable_prefix_caching=False)
