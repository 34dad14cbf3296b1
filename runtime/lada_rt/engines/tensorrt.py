"""Engines on TensorRT 10.15 and later, and 11: a plan, its inputs and outputs by address, a context for each run.

TensorRT moves no data and allocates nothing here: tensors and working memory are torch's, so that all engines share one
allocator and a run can be captured in a CUDA graph. Written against the type stub in export/typings and tried with a
stand-in: it has not been run on TensorRT itself.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from lada_rt.errors import BundleError, EngineError

if TYPE_CHECKING:
    import tensorrt as trt
    import torch
    from torch import Tensor

__all__ = ["Device", "TensorRTEngine", "TorchDevice", "make_logger", "require_tensorrt"]

#: names of TensorRT's types -> torch's. Stages take and return these whatever their weights are.
_DTYPES: Final = {"FLOAT": "float32", "INT64": "int64", "INT32": "int32"}


def require_tensorrt() -> None:
    """Look for TensorRT; code that needs it imports it by name after this, so that mypy sees its types.

    Raises:
        EngineError: it is not installed.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise EngineError('backend tensorrt: the package is missing; install it with: pip install "lada-rt[gpu]"')


class Device(Protocol):
    """Where an engine's tensors live."""

    where: torch.device

    def stream(self) -> int:
        """Handle of the calling thread's current stream."""
        ...


class TorchDevice:
    """The current CUDA device.

    Raises:
        EngineError: torch or the device is missing.
    """

    def __init__(self) -> None:
        from lada_rt.engines.torch import device_key, import_torch, indexed

        device_key("cuda")
        self._torch = import_torch()
        self.where = indexed("cuda")

    def stream(self) -> int:
        return int(self._torch.cuda.current_stream(self.where).cuda_stream)


@dataclass(slots=True)
class _Context:
    """An execution context, and the shapes of its inputs. It serves one stream, where runs follow one another."""

    context: trt.IExecutionContext
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    workspace_bytes: int = 0


class TensorRTEngine:
    """One deserialised plan. Thread-safe: runs that may overlap have contexts of their own."""

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

        from lada_rt.engines.torch import import_torch

        self._torch = import_torch()
        self._device: Device = device or TorchDevice()
        self.device = self._device.where
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
        self._allocation = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._dtypes: dict[str, torch.dtype] = {
            name: getattr(self._torch, _DTYPES[engine.get_tensor_dtype(name).name]) for name in names
        }
        #: contexts by the stream they serve
        self._idle: dict[int, list[_Context]] = {}
        self._lock = threading.Lock()

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate the stage on arrays; waits for the result. See `Engine.run`.

        Raises:
            EngineError: an input is missing, unknown, of another type or outside the profile, or the run failed.
        """
        from lada_rt.torch_loop.device import engine_errors, on_device, to_device, to_host

        with engine_errors("backend tensorrt"), on_device("tensorrt", self.device):
            found = self.run_device(**{name: to_device(array, self.device) for name, array in inputs.items()})
            return {name: to_host(tensor) for name, tensor in found.items()}

    def run_device(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the stage on device tensors, in the current stream; nothing waits for it. Raises as `run`.

        The stream may be capturing once a run with the same shapes went before, which sets them.
        """
        from lada_rt.torch_loop.device import graph_being_captured

        if set(inputs) != set(self._inputs):
            raise EngineError(
                f"backend tensorrt: expected inputs {', '.join(self._inputs)}, got {', '.join(inputs)}; "
                "rebuild the engine"
            )
        for name, tensor in inputs.items():
            if tensor.dtype != self._dtypes[name]:
                wanted, got = (str(dtype).removeprefix("torch.") for dtype in (self._dtypes[name], tensor.dtype))
                raise EngineError(f"backend tensorrt: {name}: expected {wanted}, got {got}")
        stream = self._device.stream()
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        graph = graph_being_captured()
        held = self._take(stream, shapes, any_shapes=graph is None)
        if held.shapes != shapes:
            self._set_shapes(held, shapes)
        results = self._enqueue(held, stream, inputs)
        # A context whose run failed is dropped: nobody knows its state.
        if graph is not None:
            graph.append(held)  # the graph's alone from now on: its shapes must not change
            return results
        with self._lock:
            self._idle.setdefault(stream, []).append(held)
        return results

    def _take(self, stream: int, shapes: dict[str, tuple[int, ...]], *, any_shapes: bool) -> _Context:
        """A context that is idle or whose runs are in the same stream, before this one; best one with these shapes."""
        with self._lock:
            idle = self._idle.get(stream, [])
            best = next((held for held in idle if held.shapes == shapes), None)
            if best is None and idle and any_shapes:
                best = idle[0]
            if best is not None:
                idle.remove(best)
                return best
        context = self._engine.create_execution_context(self._allocation)
        if context is None:
            raise EngineError("backend tensorrt: no memory for another execution context; lower max_concurrent")
        return _Context(context)

    def _set_shapes(self, held: _Context, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not held.context.set_input_shape(name, shape):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise EngineError(
                    f"backend tensorrt: {name}: expected a shape from {list(low)} to {list(high)}, got "
                    f"{list(shape)}; rebuild the engine with a larger --max-seconds"
                )
        unknown = held.context.infer_shapes()
        if unknown:
            raise EngineError(f"backend tensorrt: no shapes for {', '.join(unknown)}; rebuild the engine")
        held.shapes = shapes
        held.workspace_bytes = held.context.update_device_memory_size_for_shapes()

    def _enqueue(self, held: _Context, stream: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        context, empty = held.context, self._torch.empty
        results = {
            name: empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name], device=self.device)
            for name in self._outputs
        }
        # Given back to torch at once: what it is lent for next comes later in this stream, or in this graph's memory.
        workspace = empty(held.workspace_bytes, dtype=self._torch.uint8, device=self.device)
        if held.workspace_bytes:
            context.set_device_memory(workspace.data_ptr(), held.workspace_bytes)
        tensors = {name: tensor.contiguous() for name, tensor in inputs.items()} | results
        # an empty tensor needs an address too
        nothing = empty(1, dtype=self._torch.int64, device=self.device)
        for name, tensor in tensors.items():
            if not context.set_tensor_address(name, (tensor if tensor.numel() else nothing).data_ptr()):
                raise EngineError(
                    f"backend tensorrt: {name}: its address was refused; report it with what lada-rt doctor says"
                )
        if not context.execute_async_v3(stream):
            raise EngineError("backend tensorrt: the run failed; see the log, and check the GPU with: lada-rt doctor")
        return results


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
