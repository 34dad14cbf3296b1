"""Engines on TensorRT 10.15 and later, and 11: a plan, its inputs and outputs by address, a context for each run.

TensorRT moves no data and allocates nothing for its callers; torch does both here. Written against the type stub in
export/typings and tried with a stand-in: it has not been run on TensorRT itself.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lada_rt.errors import BundleError, EngineError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Device", "TensorRTEngine", "TorchDevice", "make_logger", "require_tensorrt"]

#: names of TensorRT's types -> numpy's. Stages take and return these whatever their weights are.
_DTYPES: Final[dict[str, type[np.generic]]] = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}


def require_tensorrt() -> None:
    """Look for TensorRT; code that needs it imports it by name after this, so that mypy sees its types.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise EngineError('backend tensorrt: the package is missing; install it with: pip install "lada-rt[gpu]"')


class Device(Protocol):
    """Memory and a stream of the GPU, as far as an engine needs them."""

    def upload(self, array: np.ndarray) -> Any:
        """A copy on the device."""
        ...

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Any:
        """Memory for a result."""
        ...

    def address(self, buffer: Any) -> int:
        """Where a buffer lies."""
        ...

    def download(self, buffer: Any) -> np.ndarray:
        """A copy on the host, once the stream has come to it."""
        ...

    def stream(self) -> int:
        """Handle of a stream of its own."""
        ...

    def ready(self) -> None:
        """Until uploads are done."""
        ...

    def wait(self, stream: int) -> None:
        """Until the stream has nothing left to do."""
        ...


class TorchDevice:
    """The current CUDA device through torch.

    Raises:
        EngineError: torch or the device is missing.
    """

    def __init__(self) -> None:
        from lada_rt.engines.torch import device_key, import_torch

        self._torch: Any = import_torch()
        device_key("cuda")
        self._streams: dict[int, Any] = {}

    def upload(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to("cuda")

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> Any:
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, np.dtype(dtype).name), device="cuda")

    def address(self, buffer: Any) -> int:
        return int(buffer.data_ptr())

    def download(self, buffer: Any) -> np.ndarray:
        array: np.ndarray = buffer.cpu().numpy()
        return array

    def stream(self) -> int:
        stream = self._torch.cuda.Stream()
        handle = int(stream.cuda_stream)
        self._streams[handle] = stream
        return handle

    def wait(self, stream: int) -> None:
        self._streams[stream].synchronize()

    def ready(self) -> None:
        # uploads run on torch's current stream; an engine's stream must not start before them
        self._torch.cuda.current_stream().synchronize()


class _Context:
    """An execution context and its stream; used by one run at a time."""

    def __init__(self, engine: trt.ICudaEngine, device: Device) -> None:
        context = engine.create_execution_context()
        if context is None:
            raise EngineError("backend tensorrt: no memory for another execution context; lower max_concurrent")
        self.context: trt.IExecutionContext = context
        self.stream = device.stream()


class TensorRTEngine:
    """One deserialised plan. Thread-safe: every concurrent run has a context of its own."""

    def __init__(
        self,
        plan: Path,
        *,
        any_later_version: bool = False,
        device: Device | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load a plan that was built for this TensorRT and this GPU (`cache.find_engine` makes sure of that).

        Args:
            plan: the file; its hash has been checked.
            any_later_version: the plan was built to run on later releases, so it brings a runtime of its own along.
            device: None is the current CUDA device.
            log: told TensorRT's warnings and errors.

        Raises:
            EngineError: TensorRT is missing or refuses the plan.
            BundleError: the file cannot be read.
        """
        require_tensorrt()
        import tensorrt as trt

        self._device: Device = device or TorchDevice()
        self._logger = make_logger(log)
        try:
            data = plan.read_bytes()
        except OSError as error:
            raise BundleError(f"{plan}: cannot be read ({error.strerror}); rebuild the engine") from error
        # the runtime has to outlive the engine
        self._runtime = trt.Runtime(self._logger)
        if any_later_version:
            self._runtime.engine_host_code_allowed = True
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(
                f"{plan}: TensorRT {trt.__version__} refuses this plan; rebuild it with: "
                "lada-rt build-engine --backend tensorrt"
            )
        self._engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._dtypes = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._idle: list[_Context] = []
        self._lock = threading.Lock()

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate the stage; see `Engine.run`.

        Raises:
            EngineError: an input is missing, unknown, of another type or outside the profile, or the run failed.
        """
        if set(inputs) != set(self._inputs):
            raise EngineError(
                f"backend tensorrt: expected inputs {', '.join(self._inputs)}, got {', '.join(inputs)}; "
                "rebuild the engine"
            )
        with self._lock:
            held = self._idle.pop() if self._idle else None
        held = held or _Context(self._engine, self._device)
        results = self._run(held, inputs)
        # a context whose run failed is dropped: nobody knows its state
        with self._lock:
            self._idle.append(held)
        return results

    def _run(self, held: _Context, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        device, context = self._device, held.context
        buffers: dict[str, Any] = {}
        for name, array in inputs.items():
            if array.dtype != self._dtypes[name]:
                raise EngineError(
                    f"backend tensorrt: {name}: expected {np.dtype(self._dtypes[name]).name}, got {array.dtype}"
                )
            if not context.set_input_shape(name, tuple(array.shape)):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise EngineError(
                    f"backend tensorrt: {name}: expected a shape from {list(low)} to {list(high)}, got "
                    f"{list(array.shape)}; rebuild the engine with a larger --max-seconds"
                )
            # an empty tensor needs an address too
            buffers[name] = device.upload(array if array.size else np.zeros(1, array.dtype))
        unknown = context.infer_shapes()
        if unknown:
            raise EngineError(f"backend tensorrt: no shapes for {', '.join(unknown)}; rebuild the engine")
        for name in self._outputs:
            buffers[name] = device.empty(tuple(context.get_tensor_shape(name)), self._dtypes[name])
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, device.address(buffer)):
                raise EngineError(f"backend tensorrt: {name}: its address was refused; report it with: lada-rt doctor")
        device.ready()
        if not context.execute_async_v3(held.stream):
            raise EngineError("backend tensorrt: the run failed; see the log, and check the GPU with: lada-rt doctor")
        device.wait(held.stream)
        return {name: device.download(buffers[name]) for name in self._outputs}


def make_logger(log: Callable[[str], None]) -> trt.ILogger:
    """A logger that hands TensorRT's warnings and errors to `log`."""
    import tensorrt as trt

    worth = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            # TensorRT refuses an object whose own part was not made
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in worth:
                log(" ".join(msg.split())[:500])

    return Logger()
