"""Places for as many calls as run at once, given out in the order they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from lada_rt.stream import POLL_SECONDS

__all__ = ["Slots"]


class Slots:
    """First come, first served. A semaphore is not, where waiting calls look up to be cancelled: each look takes them
    back to the end of its queue, and a newcomer takes what is free without a look at it."""

    def __init__(self, n_slots: int) -> None:
        # re-entrant: the collector may close a dropped stream, which releases its slot, while this thread is in here
        self._lock = threading.RLock()
        self._n_free = n_slots
        #: one locked gate for each waiting call, oldest first; opened when it has its slot
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, waiting: Callable[[], None]) -> None:
        """Take a slot, once all who asked before have theirs.

        Args:
            waiting: called now and then until it is there; may raise to give up.
        """
        gate = threading.Lock()
        gate.acquire()
        queued = False
        try:
            with self._lock:
                self._waiting.append(gate)
                queued = True
                self._serve()
            while not gate.acquire(timeout=POLL_SECONDS):
                waiting()
        except BaseException:
            with self._lock:
                if gate in self._waiting:
                    self._waiting.remove(gate)
                elif queued:  # served in the very moment of giving up
                    self.release()
            raise

    def release(self) -> None:
        """Give a slot back: to the oldest waiting call, if there is one."""
        with self._lock:
            self._n_free += 1
            self._serve()

    def _serve(self) -> None:
        while self._n_free and self._waiting:
            self._n_free -= 1
            self._waiting.popleft().release()
