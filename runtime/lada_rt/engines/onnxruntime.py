"""Engines on ONNX Runtime (CPU, or CUDA where the GPU build is installed)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lada_rt.cpus import cpu_count
from lada_rt.errors import BundleError, EngineError

__all__ = ["OnnxEngine", "cuda_available", "load_onnxruntime"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INPUT_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
#: words of its errors where memory is missing; it has no type for them
NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation", "out of memory")
#: device -> what is out of memory then, and what helps
NO_MEMORY_REMEDY = {
    "cpu": "the machine is out of memory ({}); lower max_concurrent, generate a shorter segment, or give the process "
    "more memory",
    "cuda": "the device is out of memory ({}); close other programs on it, lower max_concurrent, or generate a shorter "
    "segment",
}
#: engines of this process, and of the one it was forked from
_alive: weakref.WeakSet[OnnxEngine] = weakref.WeakSet()


def load_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without letting it write its telemetry database under the user's home.

    Raises:
        EngineError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(
            'backend onnxruntime: the package is missing; install it with: pip install "lada-rt[cpu]"'
        ) from None
    return onnxruntime


def cuda_available() -> bool:
    """Whether this build of ONNX Runtime has the CUDA provider; whether a GPU is there shows when it is used."""
    return PROVIDERS["cuda"] in load_onnxruntime().get_available_providers()


@functools.cache
def _load_cuda_libraries() -> None:
    """Those that pip installed, which the provider does not find by itself."""
    ort = load_onnxruntime()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; the provider will tell
            ort.preload_dlls()


class OnnxEngine:
    """One ONNX graph in an ONNX Runtime session. Thread-safe: a session holds no state between runs."""

    def __init__(
        self, graph: Path, *, device: str = "cpu", n_threads: int | None = None, low_memory: bool = False
    ) -> None:
        """Load `graph` for `device` (`cpu` or `cuda`).

        Args:
            graph: the .onnx file; large weights lie beside it.
            device: where to run.
            n_threads: for one run; None is every CPU this process may use.
            low_memory: keep weights mapped instead of copying them into the order kernels like best, and give memory
                back after each run; slower.

        Raises:
            EngineError: ONNX Runtime or its provider for the device is missing, or memory.
            BundleError: the graph cannot be loaded.
        """
        ort = load_onnxruntime()
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"backend onnxruntime: no {provider} in this build of ONNX Runtime; "
                'use --device cpu, or install the GPU build with: pip install "lada-rt[gpu]"'
            )
        if device == "cuda":
            _load_cuda_libraries()
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads or cpu_count()
        options.inter_op_num_threads = 1
        # Several sessions live side by side; spinning threads of an idle one would take cores from the busy one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        #: whether runs leave memory behind that `release` can give back
        self._reserves = device == "cpu" and options.enable_cpu_mem_arena
        options.log_severity_level = 3
        # by default it rounds factors to TF32: float32 graphs would not be what was proven
        cuda = (provider, {"use_tf32": "0"})
        providers = [provider] if device == "cpu" else [cuda, PROVIDERS["cpu"]]
        try:
            self._session: Any = ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as error:
            if _out_of_memory(error):
                raise EngineError(
                    f"{graph}: no memory to load it ({_one_line(error)}); close other programs, or give the process "
                    "more memory"
                ) from None
            raise BundleError(
                f"{graph}: ONNX Runtime cannot load it ({_one_line(error)}); rebuild the bundle"
            ) from None
        if device != "cpu" and self._session.get_providers()[0] != provider:
            raise EngineError(
                f"backend onnxruntime: {provider} did not start on this machine; check the driver "
                "with: lada-rt doctor, or use --device cpu"
            )
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._no_memory = NO_MEMORY_REMEDY[device]
        _alive.add(self)

    @property
    def input_names(self) -> list[str]:
        return [i.name for i in self._session.get_inputs()]

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(inputs, None)

    def release(self) -> None:
        """Give back to the system what earlier runs made the session reserve; costs a run of the smallest size.

        The arena only grows: a song of six minutes leaves 1.5 GB in the denoiser's. It shrinks at the end of a run that
        asks for it, by what neither that run nor its results hold, so shrinking in the runs themselves frees less, and
        has the next one fault all pages in again.
        """
        if not self._reserves:
            return
        smallest = {
            i.name: np.zeros([n if isinstance(n, int) else 1 for n in i.shape], INPUT_DTYPES[i.type])
            for i in self._session.get_inputs()
        }
        options = load_onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._run(smallest, options)

    def _run(self, inputs: dict[str, np.ndarray], options: Any) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, inputs, options)
        except Exception as error:
            if _out_of_memory(error):
                raise EngineError("backend onnxruntime: " + self._no_memory.format(_one_line(error))) from error
            raise EngineError(
                f"backend onnxruntime: the run failed ({_one_line(error)}); report it with what lada-rt doctor says"
            ) from error
        return dict(zip(self._outputs, values, strict=True))


def _keep_sessions() -> None:
    """Keep the parent's sessions in a forked child for good. A session that is dropped waits for the threads of its
    pool, which stayed behind: for ever. A list of them would be cleared when the child ends."""
    for engine in list(_alive):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_sessions)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
