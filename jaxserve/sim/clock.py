"""The virtual clock: what happens next, and when. Knows nothing of what it is that happens."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Agenda:
    """Callbacks in order of time; at the same time, in the order in which they were entered. Times are seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[float], float | None]]] = []
        self._entered = count()

    def at(self, time: float, do: Callable[[float], float | None]) -> None:
        """Calls `do(time)` then. If it returns a time, it is called again at that time.

        Raises:
            ValueError: `time` has passed.
        """
        if time < self.now:
            raise ValueError(f"an event at {time} s was entered at {self.now} s")
        heappush(self._heap, (time, next(self._entered), do))

    def run(self) -> None:
        """Until nothing is left."""
        heap = self._heap
        while heap:
            time, _, do = heappop(heap)
            self.now = time
            again = do(time)
            # What comes back before anything else happens need not go through the heap.
            while again is not None and not (heap and heap[0][0] <= again):
                self.now = again
                again = do(again)
            if again is not None:
                self.at(again, do)
