"""What tests of the engine share: at the end of each file its engines are closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.driver import close_all


@pytest.fixture(scope="module", autouse=True)
def _engines_end() -> Iterator[None]:
    yield
    close_all()
