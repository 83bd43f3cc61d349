"""One pool: references, names, eviction order, and the check that finds what does not add up."""

import pytest

from jaxserve.scheduler import IntegrityError
from jaxserve.scheduler.pool import Pool
from jaxserve.types import PageClass


def pool(pages: int) -> Pool:
    return Pool(PageClass(name="kv", pages=pages, bytes=1))


def test_named_pages_stay_findable_until_they_are_evicted_in_order_of_last_use():
    p = pool(3)
    pages = [p.take() for _ in range(3)]
    for page, name in zip(pages, (b"a", b"b", b"c"), strict=True):
        p.publish(page, name)
    for page in pages:
        p.drop(page)
    assert p.available == 3
    p.hold(pages[0])  # used again: b is now the oldest
    p.drop(pages[0])
    assert p.take() == pages[1]
    assert p.find(b"b") is None
    assert p.find(b"a") == pages[0] and p.find(b"c") == pages[2]


def test_free_pages_are_taken_before_cached_ones():
    p = pool(2)
    named, plain = p.take(), p.take()
    p.publish(named, b"a")
    p.drop(named)
    p.drop(plain)
    assert p.take() == plain
    assert p.find(b"a") == named


def test_the_first_page_keeps_a_name():
    p = pool(2)
    first, second = p.take(), p.take()
    p.publish(first, b"a")
    p.publish(second, b"a")
    assert p.find(b"a") == first
    p.drop(second)
    p.check("pool", {first: 1})


def test_a_shared_page_is_freed_by_its_last_owner():
    p = pool(1)
    page = p.take()
    p.hold(page)
    p.drop(page)
    assert p.available == 0 and p.freed == 0
    p.drop(page)
    assert p.available == 1 and p.freed == 1


def test_reset_forgets_names_and_leaves_owners_alone():
    p = pool(2)
    held, cached = p.take(), p.take()
    p.publish(held, b"held")
    p.publish(cached, b"cached")
    p.drop(cached)
    p.reset()
    assert p.find(b"held") is None and p.find(b"cached") is None
    p.check("pool", {held: 1})
    p.drop(held)
    assert p.available == 2


def test_an_empty_pool_says_so():
    p = pool(1)
    p.take()
    with pytest.raises(IndexError):
        p.take()


def test_check_names_the_page_whose_references_are_wrong():
    p = pool(4)
    page = p.take()
    with pytest.raises(IntegrityError, match=rf"group 0.*{{{page}: \(1, 2\)}}"):
        p.check("group 0", {page: 2})
