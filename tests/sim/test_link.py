"""What swapping costs: copies of pages, and whether steps wait for them."""

from __future__ import annotations

import pytest

from jaxserve.sim.link import LINKS, Link
from jaxserve.sim.sweep import PolicySpec
from tests.sim.test_storms import played


def test_a_copy_carries_up_to_so_many_pages():
    link = Link(pages=16, overlaps=True, issue_s=0.5)
    assert [link.copies(pages) for pages in (1, 16, 17)] == [1, 1, 2]
    assert link.seconds(17, page_bytes=100, bytes_s=100.0) == 2 * 0.5 + 17


def test_synchronous_copies_hold_up_steps():
    options = "host_kv_tokens=32000:host_link_gbps=96.0:host_copies="
    each, gathered = played(f"mlfq:{options}per-page"), played(f"mlfq:{options}gathered")
    assert each["swap_copies"] > 2 * gathered["swap_copies"]
    assert each["seconds"] > gathered["seconds"]


def test_an_unknown_way_to_copy_is_refused():
    assert PolicySpec.parse("mlfq:host_copies=by-hand").options == {"host_copies": "by-hand"}
    with pytest.raises(ValueError, match=f"none of {', '.join(LINKS)}"):
        played("mlfq:host_copies=by-hand")
