"""What the loops share: the engine interface on the device, captured functions, pacing, streams, range marks."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["DeviceEngine", "GraphPool", "Pace", "Replay", "Turn", "marked", "to_device", "to_host"]


class DeviceEngine(Protocol):
    """A stage that reads and writes device memory.

    Work goes to torch's current stream and nothing waits for it, so that a call can be captured in a CUDA graph:
    after the first call with inputs of some shapes, another with the same shapes allocates through torch alone.
    """

    def run_device(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the stage on contiguous device tensors of the manifest's dtypes."""
        ...


@contextlib.contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """An NVTX range around the body; nothing without CUDA."""
    if device.type != "cuda":
        yield
        return
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
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record()
    event.synchronize()
    return pinned.numpy()


class Turn:
    """Lets the users of some fixed tensors in one after the other: threads by a lock, streams by an event."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._done: Any = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(self._device))
        self._lock.release()


class GraphPool:
    """Memory that several captured functions share, because no two of them run at once."""

    def __init__(self, device: torch.device, *, capture: bool = True) -> None:
        """Args: device: of the functions' tensors; capture: False calls every function anew, on CUDA too."""
        self.device = device
        self.captures = capture and device.type == "cuda"
        if self.captures:
            self.stream = torch.cuda.Stream(device)
            self.handle = torch.cuda.graph_pool_handle()


class Replay:
    """A function of fixed tensors. On CUDA it is captured once and replayed; elsewhere it is called.

    The function must read its inputs from tensors that stay where they are, and may not wait for the device.
    """

    def __init__(self, function: Callable[[], Tensor | None], pool: GraphPool) -> None:
        """Capture `function`. It runs once before that, so what it changes must not matter yet."""
        self._function = function
        self._graph: Any = None
        self._result: Tensor | None = None
        if pool.captures:
            self._capture(pool)

    def _capture(self, pool: GraphPool) -> None:
        caller = torch.cuda.current_stream(pool.device)
        pool.stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(pool.stream):
            self._function()  # libraries and kernels load here: they may not while a stream is captured
            pool.stream.synchronize()
            # The context manager torch.cuda.graph also collects garbage and stops the whole device, other songs too.
            # "thread_local": another thread may allocate for its own window meanwhile.
            graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
            try:
                self._result = self._function()
            finally:
                graph.capture_end()
        caller.wait_stream(pool.stream)
        self._graph = graph

    def __call__(self) -> Tensor | None:
        """Run once; a captured function's result is the same tensor every time, overwritten by the next run."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result


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
