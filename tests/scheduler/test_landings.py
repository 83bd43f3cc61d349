"""Pages from elsewhere: places in the prefix cache, found by who comes next, never at the cost of who runs."""

from __future__ import annotations

import pytest

from jaxserve.scheduler import Scheduler, make_policy
from jaxserve.types import Arrive, Landing, PageClasses, PagesCame, Tick
from tests.scheduler.driver import groups_of, limits_of, two_classes

NAMES = tuple(f"page {i}".encode() for i in range(6))


def scheduler_of(*groups: PageClasses) -> Scheduler:
    return Scheduler(make_policy("sarathi"), limits_of(), groups)


def land(scheduler: Scheduler, places: list[tuple[int, int, int]], names: tuple[bytes, ...] = NAMES) -> Landing:
    scheduler.on_event(PagesCame(now=0.0, id=7, hashes=names, pages=tuple(places)))
    (landing,) = scheduler.plan().landings
    scheduler.check_integrity()
    assert landing.id == 7
    return landing


def cached(scheduler: Scheduler, prompt: int, names: tuple[bytes, ...] = NAMES) -> int:
    """Tokens that a new sequence finds."""
    scheduler.on_event(Arrive(now=0.0, seq=1, prompt=prompt, max_new=1, hashes=names[: prompt // 64]))
    return scheduler.plan().admits[0].cached


def test_the_next_sequence_finds_what_landed() -> None:
    scheduler = scheduler_of(groups_of((20, None))[0], two_classes(20, 20))
    places = [(0, 0, i) for i in range(3)] + [(1, 0, 0), (1, 1, 1), (1, 1, 2)]
    landing = land(scheduler, places)
    assert landing.fits and sorted(item for item, *_ in landing.pages) == list(range(6))
    assert scheduler.cached(NAMES)[0] == 3
    assert {place[:3] for place in scheduler.cached(NAMES)[1]} == set(places)
    assert not scheduler.plan().landings
    assert cached(scheduler, 200) == 192


def test_a_sequence_needs_the_pages_of_every_group_and_class() -> None:
    scheduler = scheduler_of(groups_of((20, None))[0], two_classes(20, 20))
    land(scheduler, [(0, 0, i) for i in range(3)] + [(1, 0, 0), (1, 1, 2)])
    assert cached(scheduler, 200) == 64


def test_what_is_there_stays_where_it_is() -> None:
    scheduler = scheduler_of(*groups_of((4, None)))
    first = land(scheduler, [(0, 0, i) for i in range(3)])
    again = land(scheduler, [(0, 0, i) for i in range(4)])
    assert [item for item, *_ in again.pages] == [3]
    assert again.pages[0][3] not in {page for *_, page in first.pages}


def test_a_longer_prefix_evicts_others_but_not_its_own_beginning() -> None:
    scheduler = scheduler_of(*groups_of((4, None)))
    land(scheduler, [(0, 0, i) for i in range(2)])
    other = tuple(b"other" + name for name in NAMES)
    land(scheduler, [(0, 0, i) for i in range(2)], other)
    assert land(scheduler, [(0, 0, i) for i in range(4)]).fits
    assert scheduler.cached(NAMES)[0] == 4 and scheduler.cached(other)[0] == 0


def test_no_room_takes_nothing() -> None:
    scheduler = scheduler_of(*groups_of((4, None)))
    scheduler.on_event(Arrive(now=0.0, seq=1, prompt=120, max_new=9))
    assert scheduler.plan().admits
    for number, count in enumerate((3, 2)):
        places = tuple((0, 0, i) for i in range(count))
        scheduler.on_event(PagesCame(now=0.0, id=number, hashes=NAMES, pages=places))
    first, second = scheduler.plan().landings
    assert first == Landing(0, False)
    assert second.fits and len(second.pages) == 2
    scheduler.check_integrity()


@pytest.mark.parametrize("places", [[(1, 0, 0)], [(0, 1, 0)], [(0, 0, 6)], [(0, 0, -1)], [(0, 0, 0), (0, 0, 0)]])
def test_places_that_do_not_exist_are_refused(places: list[tuple[int, int, int]]) -> None:
    scheduler = scheduler_of(*groups_of((4, None)))
    with pytest.raises(ValueError, match="came"):
        scheduler.on_event(PagesCame(now=0.0, id=0, hashes=NAMES, pages=tuple(places)))
    scheduler.on_event(Tick(now=1.0))
    assert not scheduler.plan().landings
