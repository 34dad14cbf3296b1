"""Capturing graphs and taking turns on a GPU that fails, on a stand-in for torch.cuda that asserts as torch does."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lada_rt import EngineError
from lada_rt.engines.torch import TorchEngine, indexed
from lada_rt.torch_loop.device import GraphPool, Replay, Turn, on_device

CUDA = torch.device("cuda")


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of torch.cuda as captures use. `users` counts the graphs of each pool, as torch's allocators do."""
    state = SimpleNamespace(users=Counter(), recording=set(), log=[], end_fails=False, event_fails=False)
    handles = itertools.count(1)
    main = Stream(state.log, "main")

    class Graph:
        def capture_begin(self, pool: int, capture_error_mode: str) -> None:
            if (pool in state.users and state.users[pool] == 0) or pool in state.recording:
                raise RuntimeError("INTERNAL ASSERT FAILED: it->second->use_count > 0")
            self.pool = pool
            state.users[pool] += 1
            state.recording.add(pool)

        def capture_end(self) -> None:
            if state.end_fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            state.recording.discard(self.pool)

        def replay(self) -> None:
            state.log.append("replay")

        def __del__(self) -> None:
            if hasattr(self, "pool"):
                state.users[self.pool] -= 1

    class Event:
        def record(self, stream: Stream) -> None:
            if state.event_fails:
                raise RuntimeError("an illegal memory access was encountered")

    @contextlib.contextmanager
    def stream(given: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(state.log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return state


def fails_on(call: int, kind: type[BaseException] = torch.OutOfMemoryError) -> Any:
    """A function whose `call`-th call, from 1, fails; the first is the warm-up, the second is captured."""
    calls = itertools.count(1)

    def function() -> None:
        if next(calls) == call:
            raise kind("CUDA out of memory")

    return function


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("end_fails", [False, True])
@pytest.mark.parametrize("n_before", [0, 1])
def test_a_song_follows_a_capture_that_broke_off(
    cuda: SimpleNamespace, kind: type[BaseException], end_fails: bool, n_before: int
) -> None:
    pool = GraphPool(CUDA)
    before = [Replay(lambda: None, pool) for _ in range(n_before)]
    cuda.end_fails = end_fails
    with pytest.raises(kind):
        Replay(fails_on(2, kind), pool)
    cuda.end_fails = False
    after = [Replay(lambda: None, pool) for _ in range(2)]
    for replay in before + after:
        replay()
    assert cuda.log.count("replay") == n_before + 2
    assert max(cuda.users.values()) == 2  # graphs share memory
    for replay in before + after:
        replay.release()
    assert set(cuda.users.values()) == {0}


def test_memory_is_not_named_again_once_its_last_graph_is_gone(cuda: SimpleNamespace) -> None:
    pool = GraphPool(CUDA)
    for _ in range(3):
        first, second = Replay(lambda: None, pool), Replay(lambda: None, pool)
        assert max(cuda.users.values()) == 2
        first.release()
        third = Replay(lambda: None, pool)  # beside the second's
        assert max(cuda.users.values()) == 2
        second.release()
        third.release()
    assert len(cuda.users) == 3


def test_the_caller_waits_for_what_a_failed_warm_up_left(cuda: SimpleNamespace) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Replay(fails_on(1), GraphPool(CUDA))
    assert cuda.log[-1] == "main waits for side"


def test_what_owns_a_graph_is_freed_without_the_collector(cuda: SimpleNamespace) -> None:
    """Weights and graphs of a dropped pipeline make room for the next one."""

    class Owner:
        def __init__(self) -> None:
            self.replay = Replay(self.work, GraphPool(CUDA))

        def work(self) -> None:
            pass

    gc.disable()
    try:
        owner = Owner()
        owner.replay()
        found = weakref.ref(owner)
        del owner
        assert found() is None
    finally:
        gc.enable()


def test_a_device_that_failed_does_not_keep_the_turn(cuda: SimpleNamespace) -> None:
    """The next song is to learn of it, not to wait for ever."""
    turn = Turn(CUDA)
    cuda.event_fails = True

    def give_up() -> None:
        raise AssertionError("the turn is still taken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="illegal memory access"), turn.taken(give_up):
            pass
    with pytest.raises(RuntimeError, match="illegal memory access"), turn.taken(give_up):
        raise ZeroDivisionError
    cuda.event_fails = False
    with turn.taken(give_up):
        pass


# -- float32 means float32


def cudnn_flags() -> tuple[Any, ...]:
    flags: Any = torch.backends.cudnn
    try:
        older: Any = flags.allow_tf32
    except RuntimeError:
        older = "refused"
    return older, flags.conv.fp32_precision, flags.rnn.fp32_precision


def product_flags() -> tuple[Any, ...]:
    flags: Any = torch.backends.cuda.matmul
    try:
        older: Any = torch.get_float32_matmul_precision(), flags.allow_tf32
    except RuntimeError:
        older = "refused"
    return older, flags.fp32_precision


@pytest.mark.parametrize("setting", ["default", "high", "older allow_tf32", "newer tf32", "tf32 everywhere"])
def test_a_package_multiplies_in_float32_and_leaves_the_setting_as_it_was(setting: str) -> None:
    """Applications say "high" for their own networks; engines were proven without."""
    flags: Any = torch.backends
    seen: list[tuple[Any, ...]] = []

    def stage(x: torch.Tensor) -> torch.Tensor:
        seen.append(product_flags())
        return x

    engine = TorchEngine(stage, ["y"], torch.device("cpu"), exact=True)
    assert product_flags() == (("highest", False), "none")
    try:
        if setting == "high":
            torch.set_float32_matmul_precision("high")
        elif setting == "older allow_tf32":
            flags.cuda.matmul.allow_tf32 = True
        elif setting == "newer tf32":
            flags.cuda.matmul.fp32_precision = "tf32"
        elif setting == "tf32 everywhere":
            flags.fp32_precision = "tf32"
        before = product_flags()
        engine.run_device(x=torch.zeros(1))
        assert product_flags() == before
        ((older, newer),) = seen
        assert newer == "ieee"
        if before[0] != "refused":  # the two names agree, or torch refuses to compute
            assert older == ("highest", False)
    finally:
        flags.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        flags.cuda.matmul.fp32_precision = flags.mkldnn.matmul.fp32_precision = "none"
    assert product_flags() == (("highest", False), "none")


@pytest.mark.parametrize("setting", ["default", "older off", "newer tf32", "newer conv tf32", "newer conv ieee"])
def test_a_package_convolves_in_float32_and_leaves_the_setting_as_it_was(setting: str) -> None:
    flags: Any = torch.backends.cudnn
    seen: list[tuple[Any, ...]] = []

    def stage(x: torch.Tensor) -> torch.Tensor:
        seen.append(cudnn_flags())
        if len(seen) == 1:
            other.run_device(x=x)  # as from another thread
            seen.append(cudnn_flags())
        return x

    engine, other = (TorchEngine(stage, ["y"], torch.device("cpu"), exact=True) for _ in range(2))
    original = cudnn_flags()
    try:
        if setting == "older off":
            flags.allow_tf32 = False
        elif setting == "newer tf32":
            flags.fp32_precision = "tf32"
        elif setting != "default":
            flags.conv.fp32_precision = setting.rpartition(" ")[2]
            flags.rnn.fp32_precision = "none"
        before = cudnn_flags()
        engine.run_device(x=torch.zeros(1))
        assert cudnn_flags() == before
        assert [now[1] for now in seen] == ["ieee"] * 3
        if before[0] != "refused":  # what an application reads meanwhile
            assert [now[0] for now in seen] == [False] * 3
        with pytest.raises(EngineError):
            TorchEngine(fails_on(1, ValueError), ["y"], torch.device("cpu"), exact=True).run_device()
        assert cudnn_flags() == before
    finally:
        flags.fp32_precision = "none"
        flags.allow_tf32 = original[0]
        flags.conv.fp32_precision, flags.rnn.fp32_precision = original[1:]
    assert cudnn_flags() == original


# -- one GPU of several


def test_the_engines_gpu_is_the_current_one_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thread that chose none it is the first one, and packages and kernels launch there."""
    log: list[str] = []

    @contextlib.contextmanager
    def device(given: torch.device) -> Iterator[None]:
        log.append(f"to {given}")
        yield
        log.append(f"back from {given}")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    where = indexed("cuda")
    assert where == torch.device("cuda", 3)
    assert indexed("cpu") == torch.device("cpu")
    with pytest.raises(ZeroDivisionError), on_device("flow", where):
        raise ZeroDivisionError
    with on_device("flow", torch.device("cpu")):
        pass
    assert log == ["to cuda:3", "flow", "pop"]
    log.clear()
    with on_device("flow", where):
        pass
    assert log == ["to cuda:3", "flow", "pop", "back from cuda:3"]
