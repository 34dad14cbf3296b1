"""Stands in for TensorRT where there is none: the names that lada-rt uses, calls checked for order and arguments.

A plan names a copy of the graph it was "built" from; ONNX Runtime computes, on the memory that the addresses point to.
Calls are appended to the file of STANDIN_CALLS. STANDIN_MODE: "refuse" the graph, build "nothing", "crash", or compute
"wrong". As TensorRT with float32, it has no fused kernel for attention.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lada_rt.engines.tensorrt
import numpy as np
import onnx
import torch
from lada_rt.engines.onnxruntime import OnnxEngine

__version__ = "11.4.0.106"
MODE = os.environ.get("STANDIN_MODE", "")


def note(call: str, *arguments: Any) -> None:
    if path := os.environ.get("STANDIN_CALLS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([call, *map(str, arguments)]) + "\n")


class HostDevice:
    """Host memory in place of the GPU's."""

    where = torch.device("cpu")

    def stream(self) -> int:
        return 1234


lada_rt.engines.tensorrt.TorchDevice = HostDevice  # type: ignore[misc,assignment]  # there is no GPU to allocate on


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def __init__(self) -> None:
        self.made = True


class IProgressMonitor:
    def __init__(self) -> None:
        self.made = True


class BuilderFlag(enum.Enum):
    TF32, VERSION_COMPATIBLE = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class HardwareCompatibilityLevel(enum.Enum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class NetworkDefinitionCreationFlag(enum.Enum):
    STRONGLY_TYPED = 1


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.Enum):
    FLOAT, INT64 = range(2)


class Dims(tuple[int, ...]):
    pass


class Network:
    def __init__(self) -> None:
        self.model: onnx.ModelProto | None = None
        self.path = Path()
        self.inputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]


class ParserError:
    def node_operator(self) -> str:
        return "Attention"

    def node_name(self) -> str:
        return "node_7"

    def desc(self) -> str:
        return "no such thing"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Network, logger: ILogger) -> None:
        assert logger.made
        self.network = network

    def get_error(self, index: int) -> ParserError:
        return ParserError()

    def parse(self, model: bytes, path: str | None = None) -> bool:
        assert path is not None, "large weights lie beside the graph"
        note("parse", Path(path).name)
        self.network.model, self.network.path = onnx.load_from_string(model), Path(path)
        self.network.inputs = list(self.network.model.graph.input)
        return MODE != "refuse"


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Dims, Dims, Dims]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        assert all(isinstance(d, Dims) for d in (min, opt, max))
        assert len(min) == len(opt) == len(max)
        assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)), (input, min, opt, max)
        self.shapes[input] = (min, opt, max)


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return b"timings of " + __version__.encode()


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.cache: TimingCache | None = None
        self.progress_monitor: Any = None
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def set_flag(self, flag: BuilderFlag) -> None:
        note("set_flag", flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        note("clear_flag", flag.name)

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        note("set_timing_cache", len(cache.data))
        if cache.data and not cache.data.endswith(__version__.encode()):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache is not None
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        assert logger.made

    def create_network(self, flags: int = 0) -> Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED.value
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert network.model is not None, "parse before building"
        (profile,) = config.profiles
        assert set(profile.shapes) == {v.name for v in network.inputs}
        assert config.progress_monitor.made
        note("build", config.hardware_compatibility_level.name)
        if MODE == "crash":
            os.abort()
        monitor = config.progress_monitor
        monitor.phase_start("Building", "", 2)
        monitor.phase_start("Tactics", "Building", 9)
        assert monitor.step_complete("Tactics", 0)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building")
        shapes = {name: [list(d) for d in three] for name, three in profile.shapes.items()}
        fused = [node for node in network.model.graph.node if node.op_type == "Attention" and not _decomposable(node)]
        if fused or MODE == "nothing":
            return None
        plan = {"graph": str(_kept(network.model, network.path)), "shapes": shapes}
        return json.dumps(plan).encode()


def _decomposable(node: onnx.NodeProto) -> bool:
    """Take the parser's own mark off a node: ONNX Runtime refuses it. Whether it was there and set."""
    marks = [a for a in node.attribute if a.name == "TRT_decomposable"]
    for mark in marks:
        node.attribute.remove(mark)
    return [mark.i for mark in marks] == [1]


def _kept(model: onnx.ModelProto, path: Path) -> Path:
    """A copy of a graph: a plan holds its weights, whatever becomes of the file it was built from."""
    folder = Path(tempfile.mkdtemp(prefix="plan-", dir=Path(os.environ["STANDIN_CALLS"]).parent))
    onnx.save(model, str(folder / path.name))
    data = path.with_suffix(".data")
    if data.is_file():
        shutil.copy(data, folder)
    return folder / path.name


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace: tuple[int, int] | None = None
        self.needs = 0
        self.busy = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        low, _, high = self.engine.profile[name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = shape
        self.needs = 0  # unknown until asked for
        note("set_input_shape", name)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.profile if name not in self.shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        self.needs = 256 + sum(math.prod(shape) for shape in self.shapes.values())
        return self.needs

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        self.workspace = (memory, size)

    def get_tensor_shape(self, name: str) -> Dims:
        assert not self.infer_shapes(), "shapes of results are known once all inputs have one"
        return Dims(self.engine.result_shape(name, self.shapes))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert isinstance(memory, int)
        assert memory
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 1234
        assert set(self.addresses) == {v.name for v in self.engine.values}
        assert not self.busy, "one context was run twice at once"
        assert self.needs, "ask for the working memory after a change of shapes"
        assert self.workspace is not None
        assert self.workspace[1] == self.needs
        ctypes.memset(self.workspace[0], 0xA5, self.needs)  # it is there, and nobody else's
        self.busy = True
        inputs = {name: view(self.addresses[name], s, self.engine.dtypes[name]) for name, s in self.shapes.items()}
        for name, result in self.engine.onnx.run(**{k: v.copy() for k, v in inputs.items()}).items():
            target = view(self.addresses[name], result.shape, result.dtype)
            target[...] = result + (np.abs(result).max() if MODE == "wrong" else 0)
        self.busy = False
        note("execute")
        return True


def view(address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype).reshape(shape)


class Engine:
    def __init__(self, plan: dict[str, Any]) -> None:
        graph = onnx.load(plan["graph"], load_external_data=False).graph
        self.profile = plan["shapes"]
        self.values = [*graph.input, *graph.output]
        self.n_inputs = len(graph.input)
        self.num_io_tensors = len(self.values)
        self.dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in self.values}
        self.onnx = OnnxEngine(Path(plan["graph"]), n_threads=1)

    def result_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for value in self.values[: self.n_inputs]:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                sizes[dim.dim_param] = size
        dims = next(v for v in self.values if v.name == name).type.tensor_type.shape.dim
        if any(d.dim_param and d.dim_param not in sizes for d in dims):  # computed from the inputs' sizes
            zeros = {n: np.zeros(shape, self.dtypes[n]) for n, shape in shapes.items()}
            return self.onnx.run(**zeros)[name].shape
        return tuple(sizes[d.dim_param] if d.dim_param else d.dim_value for d in dims)

    def get_tensor_name(self, index: int) -> str:
        return str(self.values[index].name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        index = next(i for i, v in enumerate(self.values) if v.name == name)
        return TensorIOMode.INPUT if index < self.n_inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT64 if self.dtypes[name] == np.int64 else DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert profile_index == 0
        return [Dims(d) for d in self.profile[name]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        note("create_execution_context")
        return Context(self)


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger.made
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        note("deserialize", self.engine_host_code_allowed)
        try:
            return Engine(json.loads(serialized_engine))
        except ValueError:
            return None
