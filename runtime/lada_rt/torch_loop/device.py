"""What the loops share: the engine interface on the device, captured functions, pacing, streams, range marks."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lada_rt.errors import EngineError
from lada_rt.stream import POLL_SECONDS

__all__ = [
    "DeviceEngine",
    "GraphPool",
    "Pace",
    "Replay",
    "Turn",
    "capture",
    "engine_errors",
    "exact_float32",
    "failure",
    "graph_being_captured",
    "on_device",
    "one_line",
    "to_device",
    "to_host",
]


class DeviceEngine(Protocol):
    """A stage that reads and writes device memory.

    Work goes to torch's current stream and nothing waits for it, so that a call can be captured in a CUDA graph:
    after the first call with inputs of some shapes, another with the same shapes allocates through torch alone.
    """

    #: where it computes
    device: torch.device

    def run_device(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the stage on contiguous device tensors of the manifest's dtypes."""
        ...


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def failure(what: str, error: Exception) -> EngineError | None:
    """What to say of a device that is out of memory or has failed; None of any other error.

    What runs inside a compiled package comes out of it as a plain RuntimeError: there the text is all that tells.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return EngineError(
            f"{what}: the device is out of memory ({one_line(error)}); close other programs on it, lower "
            "max_concurrent, or generate a shorter segment. See what a song needs with: lada-rt inspect --device cuda"
        )
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return EngineError(
            f"{what}: the device failed ({one_line(error)}); start the process anew, and check the driver with: "
            "lada-rt doctor"
        )
    return None


@contextlib.contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn a device that is out of memory, or has failed, into an `EngineError`. Errors of a callback pass through."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        told = failure(what, error)
        assert told is not None
        raise told from error


@contextlib.contextmanager
def on_device(name: str, device: torch.device) -> Iterator[None]:
    """The device is the current one for the body, under an NVTX range; nothing without CUDA.

    Each thread has a current device of its own, the first one unless it chose another: packages, Triton and TensorRT
    launch on that one, wherever their tensors are.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device. Through pinned memory, so that the host need not wait for it."""
    # A copy of its own on the host too: torch refuses read-only arrays, and the caller may reuse the memory.
    tensor = torch.from_numpy(np.array(array))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> np.ndarray:
    """A copy in host memory; waits for the current stream alone."""
    if tensor.device.type != "cuda":
        return tensor.numpy(force=True).copy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(tensor.device))
    event.synchronize()
    return pinned.numpy()


class _ExactFloat32:
    """While somebody is inside, a GPU computes float32 convolutions and products in float32.

    Torch lets it round the factors of convolutions to TF32 by default, those of products where the application says so
    ("high"). In the mel decoder's convolutions that moves the output by 2 % of its range: the engine would not be what
    was proven.

    The setting is the process's: the first in turns TF32 off, the last out puts back what was there. What others run
    meanwhile is as exact. Torch has an older and a newer name for each, and refuses to read, and at times to compute,
    where the two disagree.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._before: list[tuple[Callable[[Any], None], Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._before = [*self._convolutions(), *self._products()]
            self._n_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                for put_back, value in self._before:
                    put_back(value)

    @staticmethod
    def _convolutions() -> list[tuple[Callable[[Any], None], Any]]:
        """Turn TF32 off; what puts the setting back."""
        flags: Any = torch.backends.cudnn
        before: list[tuple[Callable[[Any], None], Any]] = [
            (partial(setattr, flags.conv, "fp32_precision"), flags.conv.fp32_precision),
            (partial(setattr, flags.rnn, "fp32_precision"), flags.rnn.fp32_precision),
        ]
        try:
            before.insert(0, (partial(setattr, flags, "allow_tf32"), bool(flags.allow_tf32)))
            flags.allow_tf32 = False
            flags.rnn.fp32_precision = "ieee"  # else the two names disagree
        except RuntimeError:  # only the newer name is in use
            pass
        flags.conv.fp32_precision = "ieee"
        return before

    @staticmethod
    def _products() -> list[tuple[Callable[[Any], None], Any]]:
        flags: Any = torch.backends.cuda.matmul
        before: list[tuple[Callable[[Any], None], Any]] = [
            (partial(setattr, flags, "fp32_precision"), flags.fp32_precision)
        ]
        try:
            older = torch.get_float32_matmul_precision()
            if older != "highest":
                torch.set_float32_matmul_precision("highest")
                before.insert(0, (torch.set_float32_matmul_precision, older))
        except RuntimeError:  # only the newer name is in use
            pass
        flags.fp32_precision = "ieee"
        return before


#: one for the process, as the setting is
exact_float32 = _ExactFloat32()


class Turn:
    """Lets the users of some fixed tensors in one after the other: threads by a lock, streams by an event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._done: Any = None

    @contextlib.contextmanager
    def taken(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the turn. `waiting` is called now and then until it comes, and may raise to give up."""
        while not self._lock.acquire(timeout=POLL_SECONDS):
            waiting()
        try:
            if self._done is not None:
                torch.cuda.current_stream(self._device).wait_event(self._done)
            yield
        finally:
            try:
                if self._device.type == "cuda":
                    self._done = torch.cuda.Event()
                    self._done.record(torch.cuda.current_stream(self._device))
            finally:  # on a device that has failed the event raises, and the next song must learn of it too
                self._lock.release()


class _Memory:
    """A pool of torch's allocator. Torch gives it up with its last graph, and asserts where it is used again."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.n_graphs = 0


class GraphPool:
    """Memory that several captured functions share, because no two of them run at once."""

    def __init__(self, device: torch.device, *, capture: bool = True) -> None:
        """Args: device: of the functions' tensors; capture: False calls every function anew, on CUDA too."""
        self.device = device
        self.captures = capture and device.type == "cuda"
        self._memory: _Memory | None = None
        if self.captures:
            self.stream = torch.cuda.Stream(device)

    def memory(self) -> _Memory:
        """What the next graph shares with those there are."""
        if self._memory is None or self._memory.n_graphs == 0:
            self._memory = _Memory()
        return self._memory

    def forget(self) -> None:
        """A capture broke off: its memory may count as being recorded for ever. Graphs to come share another."""
        self._memory = None


_of_thread = threading.local()
#: one capture at a time in a process: captures share torch's generator and parts of its allocator
_capturing = threading.Lock()


@contextlib.contextmanager
def capture(holds: list[object]) -> Iterator[None]:
    """What this thread launches meanwhile goes into a graph, which `holds` belongs to."""
    _of_thread.holds = holds
    try:
        yield
    finally:
        _of_thread.holds = None


def graph_being_captured() -> list[object] | None:
    """What the graph holds that this thread is capturing: an engine adds what its replays need. None: no capture."""
    return getattr(_of_thread, "holds", None)


class Replay:
    """A function of fixed tensors. On CUDA it is captured once and replayed; elsewhere it is called.

    The function must read its inputs from tensors that stay where they are, and may not wait for the device.
    """

    def __init__(self, function: Callable[[], Tensor | None], pool: GraphPool) -> None:
        """Capture `function`. It runs once before that, so what it changes must not matter yet."""
        self._function = function
        self._device = pool.device
        self._graph: Any = None
        self._memory: _Memory | None = None
        self._result: Tensor | None = None
        self._holds: list[object] = []
        if pool.captures:
            with _capturing:
                self._capture(pool)

    def _capture(self, pool: GraphPool) -> None:
        caller = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(pool.stream):
                self._function()  # libraries and kernels load here: they may not while a stream is captured
                pool.stream.synchronize()
                self._record(graph, pool)
        finally:  # what a call that failed has left in the stream still uses tensors whose memory is used anew
            caller.wait_stream(pool.stream)
        self._graph = graph
        # it refers to what owns this replay, and weights in such a cycle wait for the collector
        self._function = _released

    def _record(self, graph: Any, pool: GraphPool) -> None:
        memory = pool.memory()
        try:
            # The context manager torch.cuda.graph also collects garbage and stops the whole device, other songs too.
            # "thread_local": another thread may allocate for its own window meanwhile.
            graph.capture_begin(pool=memory.handle, capture_error_mode="thread_local")
            try:
                with capture(self._holds):
                    self._result = self._function()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is broken; what broke it is the news
                    graph.capture_end()
                raise
            graph.capture_end()
        except BaseException:
            pool.forget()
            raise
        memory.n_graphs += 1
        self._memory = memory

    def __call__(self) -> Tensor | None:
        """Run once; a captured function's result is the same tensor every time, overwritten by the next run."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def release(self) -> None:
        """Give the graph's memory back, now and not when Python finds time for it; not to be called again.

        The graph's last run must be in the current stream, or before an event that this stream waits for.
        """
        if self._graph is not None:
            torch.cuda.current_stream(self._device).synchronize()
        if self._memory is not None:
            self._memory.n_graphs -= 1
            self._memory = None
        self._graph = self._result = None
        self._function = _released
        self._holds.clear()


def _released() -> Tensor | None:
    raise AssertionError("a released function was called")


class Pace:
    """Lets the host run at most `depth` steps ahead of the device.

    The device's queue never runs dry, yet progress is true to within `depth` steps and a cancelled run leaves no more
    than that behind.
    """

    def __init__(self, device: torch.device, depth: int = 4) -> None:
        self._device = device
        self._depth = depth
        self._events: deque[Any] = deque()

    def tick(self) -> None:
        """Mark the end of a step; wait for the one `depth` steps before it."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)
        if len(self._events) > self._depth:
            self._events.popleft().synchronize()
