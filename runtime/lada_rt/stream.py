"""Running a generator ahead in a thread, bounded, and stopping it for sure."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from lada_rt.errors import GenerationCancelled

__all__ = ["Cancel", "run_ahead"]

T = TypeVar("T")

#: how long anything waits before it looks again whether to stop
POLL_SECONDS = 0.1


class Cancel:
    """A flag that any thread may raise; work in progress checks it at every step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise `GenerationCancelled` once the flag is up."""
        if self._event.is_set():
            raise GenerationCancelled("generation cancelled")


def run_ahead(items: Iterator[T], cancel: Cancel, depth: int = 1) -> Generator[T, None, None]:
    """Iterate `items` in a thread: `depth` finished items wait for the consumer, and it works on one more.

    An exception in `items` is raised here. When the consumer stops early, for whatever reason, `cancel` is raised and
    the thread is joined before control returns: `items` must check the flag often. Only where `items` itself closes
    what reads it, in that very thread, it ends a moment later.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)

    def put(message: tuple[str, Any]) -> bool:
        while not cancel.cancelled:
            try:
                ready.put(message, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=produce, name="lada-rt-generate", daemon=True)
    _at_work[thread] = cancel
    thread.start()
    try:
        while True:
            try:
                kind, value = ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not thread.is_alive() and ready.empty():
                    cancel.check()
                    raise
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        cancel.cancel()
        if thread is not threading.current_thread():
            thread.join()


#: threads that work ahead, and what stops them
_at_work: weakref.WeakKeyDictionary[threading.Thread, Cancel] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    """End what is under way with the interpreter: a thread that it stops inside native code brings the process down."""
    running = list(_at_work.items())
    for _, cancel in running:
        cancel.cancel()
    for thread, _ in running:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()
