"""Pages in host memory, by name; the least recently used is evicted. Knows no devices and no sequences."""

from __future__ import annotations

from collections import OrderedDict

from jaxserve.scheduler.pool import IntegrityError


class HostPool:
    """`size` page places of one device pool's page size, from 0. A place is free, or has a name.

    A named place is busy while a move writes or reads it; then it is not evicted.
    """

    __slots__ = ("_busy", "_free", "_places", "_unwanted", "_whole", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._places: OrderedDict[bytes, int] = OrderedDict()
        """By last use."""
        self._whole: set[bytes] = set()
        """Names whose content has arrived."""
        self._busy: dict[bytes, int] = {}
        self._unwanted: set[bytes] = set()
        """Names that were forgotten while a move was under way."""

    @property
    def used(self) -> int:
        return self.size - len(self._free)

    def find(self, name: bytes) -> int | None:
        """The place of a page that is whole."""
        return self._places[name] if name in self._whole and name not in self._unwanted else None

    def knows(self, name: bytes) -> bool:
        """Whether it is there or on its way."""
        return name in self._places

    def reserve(self, name: bytes) -> int | None:
        """A place for a page that is about to come, at the cost of the least recently used; None if all are busy."""
        if not self._free:
            idle = next((other for other in self._places if other not in self._busy), None)
            if idle is None:
                return None
            self.forget(idle)
        self._places[name] = place = self._free.pop()
        self._busy[name] = 1
        return place

    def arrived(self, name: bytes) -> None:
        self._whole.add(name)
        self.let_go(name)

    def hold(self, name: bytes) -> None:
        """A move reads it."""
        self._busy[name] = self._busy.get(name, 0) + 1
        self._places.move_to_end(name)

    def let_go(self, name: bytes) -> None:
        self._busy[name] -= 1
        if not self._busy[name]:
            del self._busy[name]
            if name in self._unwanted:
                self._unwanted.remove(name)
                self.forget(name)

    def forget(self, name: bytes) -> None:
        """Its content is of no use to anybody any more; a move under way takes its place with it to its end."""
        if name in self._busy:
            self._unwanted.add(name)
        elif (place := self._places.pop(name, None)) is not None:
            self._whole.discard(name)
            self._free.append(place)

    def reset(self) -> None:
        for name in list(self._places):
            self.forget(name)

    def check(self, where: str) -> None:
        """
        Raises:
            IntegrityError: places that are lost or used twice.
        """
        if sorted([*self._free, *self._places.values()]) != list(range(self.size)):
            raise IntegrityError(f"{where}: free and named host pages do not partition the pool")
        if not self._whole | self._busy.keys() | self._unwanted <= self._places.keys():
            raise IntegrityError(f"{where}: host pages are whole or busy that have no place")
