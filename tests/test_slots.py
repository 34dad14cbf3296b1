"""Calls beyond `max_concurrent` are served in the order they came, and whoever gives up costs nobody a slot."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lada_rt import GenerationCancelled, GenerationParams, Progress
from lada_rt.progress import Reporter
from lada_rt.slots import Slots
from lada_rt.stream import Cancel
from stubs import stub_pipeline, sung

FAST = GenerationParams(steps=2, flow_steps=1)
VOCAL = (sung(4800), 48_000)
N_CALLERS = 24


class Waited(Exception):
    """Raised by a caller that gives up."""


def give_up() -> None:
    raise Waited


def count_free(slots: Slots) -> int:
    """Take all there are, and give them back."""
    taken = 0
    try:
        while True:
            slots.acquire(give_up)
            taken += 1
    except Waited:
        for _ in range(taken):
            slots.release()
        return taken


def test_callers_are_served_in_the_order_they_came(tmp_path: Path) -> None:
    pipe = stub_pipeline(tmp_path, max_concurrent=1)
    served: list[int] = []

    def caller(number: int, queued: threading.Event) -> None:
        def watch(progress: Progress) -> None:
            if progress.stage == "queue":
                queued.set()
            elif not served or served[-1] != number:
                served.append(number)

        pipe.generate(VOCAL, params=FAST, on_progress=watch)

    holder = pipe.stream(VOCAL, params=FAST)
    next(holder)
    with ThreadPoolExecutor(N_CALLERS) as pool:
        calls = []
        for number in range(N_CALLERS):
            queued = threading.Event()
            calls.append(pool.submit(caller, number, queued))
            assert queued.wait(20)
        holder.close()
        for call in calls:
            call.result(60)
    assert served == list(range(N_CALLERS))


def test_a_newcomer_does_not_overtake() -> None:
    """One caller takes a slot again as soon as it has given it back; another waits meanwhile."""
    slots = Slots(1)
    slots.acquire(give_up)
    waits, has_it, done = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        slots.acquire(waits.set)
        has_it.set()
        assert done.wait(20)
        slots.release()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(other)
        assert waits.wait(20)
        slots.release()
        with pytest.raises(Waited):  # it went to the other, whether or not that one has looked yet
            slots.acquire(give_up)
        assert has_it.wait(20)
        done.set()
        call.result(20)
    assert count_free(slots) == 1


def test_whoever_gives_up_leaves_the_queue() -> None:
    """The last of three waiting callers is served though the first two have gone."""
    slots = Slots(1)
    slots.acquire(give_up)
    cancels = [Cancel() for _ in range(3)]
    waiting = [threading.Event() for _ in range(3)]
    released: list[int] = []

    def caller(number: int) -> None:
        reporter = Reporter(lambda progress: waiting[number].set(), cancels[number])
        with reporter.holding(slots):
            released.append(number)

    with ThreadPoolExecutor(3) as pool:
        calls = []
        for number in range(3):
            calls.append(pool.submit(caller, number))
            assert waiting[number].wait(20)
        for number in range(2):
            cancels[number].cancel()
            with pytest.raises(GenerationCancelled):
                calls[number].result(20)
        assert not released
        slots.release()
        calls[2].result(20)
    assert released == [2]
    assert count_free(slots) == 1


def test_giving_up_in_the_moment_of_being_served_loses_no_slot() -> None:
    slots = Slots(1)
    slots.acquire(give_up)

    def served_and_gone() -> None:
        slots.release()  # the holder's, which hands the slot to this very caller
        raise Waited

    with pytest.raises(Waited):
        slots.acquire(served_and_gone)
    assert count_free(slots) == 1


def test_it_goes_to_the_next_who_waits() -> None:
    slots = Slots(1)
    slots.acquire(give_up)
    first_waits, next_waits = threading.Event(), threading.Event()

    def served_and_gone() -> None:
        first_waits.set()
        assert next_waits.wait(20)
        slots.release()
        raise Waited

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slots.acquire, served_and_gone)
        assert first_waits.wait(20)
        second = pool.submit(slots.acquire, next_waits.set)
        with pytest.raises(Waited):
            first.result(20)
        second.result(20)
    slots.release()
    assert count_free(slots) == 1


@pytest.mark.parametrize("n_slots", [1, 3])
def test_nothing_is_lost_or_gained_where_many_come_and_go(n_slots: int) -> None:
    """Some give up as soon as they wait, in races with those who release."""
    slots = Slots(n_slots)
    lock = threading.Lock()
    inside = peak = 0

    def patient() -> None:
        time.sleep(0)

    def caller(number: int) -> None:
        nonlocal inside, peak
        for turn in range(20):
            waiting: Callable[[], None] = give_up if (number + turn) % 3 == 0 else patient
            try:
                slots.acquire(waiting)
            except Waited:
                continue
            with lock:
                inside += 1
                peak = max(peak, inside)
            time.sleep(0.002)
            with lock:
                inside -= 1
            slots.release()

    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(caller, number) for number in range(8)]:
            call.result(60)
    assert 1 <= peak <= n_slots
    assert count_free(slots) == n_slots
