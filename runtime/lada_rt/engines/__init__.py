"""Execution backends behind one interface: which engines a bundle's stages get on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from lada_rt.bundle import Bundle
from lada_rt.engines.base import Engine
from lada_rt.engines.cache import (
    EngineEntry,
    Machine,
    find_engine,
    list_engines,
    misfit,
    rebuild_command,
    remedy,
    this_machine,
)
from lada_rt.errors import BundleError, EngineError, ParamError

__all__ = ["BACKENDS", "DEVICES", "Engine", "load_engines", "machine_for"]

BACKENDS: Final = ("onnxruntime", "tensorrt", "torch")
DEVICES: Final = ("cpu", "cuda")
#: fastest first: what `auto` looks for
_COMPILED: Final = ("tensorrt", "torch")

#: on the CPU the weights of larger bundles stay mapped files: the system can take their pages back
_MAPPED_BYTES: Final = 4 << 30

_LOG = logging.getLogger("lada_rt")


def load_engines(
    bundle: Bundle, *, backend: str = "auto", device: str = "auto", n_threads: int | None = None
) -> tuple[dict[str, Engine], str, str]:
    """Load an engine for every stage.

    A compiled backend takes the stages that the bundle has its engines for; the others run on ONNX Runtime, which is
    logged. `auto` takes a compiled backend whose engines fit, and logs why one that is there does not.

    Returns:
        (engine for each stage, backend used, device used). Stages of a compiled backend run their loops on the device
        (`base.loop_of`).

    Raises:
        ParamError: unknown backend or device.
        EngineError: the backend is missing, has no such device, or its engines do not fit this machine.
        BundleError: a graph cannot be loaded.
    """
    if backend not in ("auto", *BACKENDS):
        raise ParamError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if device not in ("auto", *DEVICES):
        raise ParamError(f"device: expected one of auto, {', '.join(DEVICES)}, got {device!r}")
    if backend == "auto":
        backend = _choose(bundle, device)
    if backend == "onnxruntime":
        engines, device = _onnx_engines(bundle, bundle.stages, device, n_threads)
        return engines, backend, device
    if device == "auto":
        device = "cuda" if this_machine(backend).arch.startswith("sm_") else "cpu"
    if backend == "tensorrt" and device != "cuda":
        raise EngineError("backend tensorrt: expected an NVIDIA GPU and --device cuda, got cpu; see: lada-rt doctor")
    engines = {}
    built = {entry.key.stage for entry in list_engines(bundle) if entry.key.backend == backend}
    if not built:
        raise EngineError(
            f"backend {backend}: {bundle.path} has no engine for it; build them with: "
            f"{rebuild_command(bundle.path, backend=backend, on_cpu=device == 'cpu')}"
        )
    machine = machine_for(backend, device)
    for name in bundle.stages:
        if name in built:
            engines |= LOADERS[backend](find_engine(bundle, name, backend, machine), device)
    others = [name for name in bundle.stages if name not in built]
    if others:
        _LOG.warning("no %s engine for %s: they run on onnxruntime", backend, ", ".join(others))
        engines |= _onnx_engines(bundle, others, "cpu" if device == "cpu" else "auto", n_threads)[0]
    return _with_loops(engines, bundle), backend, device


def machine_for(backend: str, device: str) -> Machine:
    """What this machine offers a compiled backend on a device. Of torch it is torch itself that tells: it heeds
    CUDA_VISIBLE_DEVICES and may count GPUs in another order than the driver's tool.

    Raises:
        EngineError: torch or its device is missing.
    """
    machine = this_machine(backend, device)
    if backend != "torch":
        return machine
    from lada_rt.engines.torch import device_key

    return replace(machine, arch=device_key(device))


def _choose(bundle: Bundle, device: str) -> str:
    """The fastest backend with GPU engines that fit; why others do not is logged. ONNX Runtime serves CPUs."""
    if device == "cpu":
        return "onnxruntime"
    entries = [entry for entry in list_engines(bundle) if entry.key.arch.startswith("sm_")]
    for backend in _COMPILED:
        own = [entry for entry in entries if entry.key.backend == backend]
        if not own:
            continue
        machine = this_machine(backend, device)
        if machine.backend_version is not None and machine.arch.startswith("sm_"):
            from lada_rt.engines.torch import device_key

            try:  # a GPU that the driver lists but torch, which both need, does not see is none
                machine = replace(machine, arch=device_key("cuda"))
            except EngineError as error:
                _LOG.warning("backend %s is not used: %s", backend, error)
                continue
        reasons = {entry.key.stage: misfit(entry, bundle, machine) for entry in own}
        # of several engines for one stage, one that fits is enough
        reasons |= {entry.key.stage: None for entry in own if misfit(entry, bundle, machine) is None}
        wrong = [(stage, reason) for stage, reason in reasons.items() if reason is not None]
        if not wrong:
            return backend
        _LOG.warning(
            "backend %s is not used: the engine of %s %s; %s",
            backend,
            *wrong[0],
            remedy(bundle.path, own[0].key, machine),
        )
    return "onnxruntime"


def _onnx_engines(
    bundle: Bundle, stages: Iterable[str], device: str, n_threads: int | None
) -> tuple[dict[str, Engine], str]:
    """Engines of ONNX Runtime, and their device. `auto` tries CUDA where this build has it: it has it on machines
    without a GPU too, and there, or where a library of CUDA is missing, it does not start."""
    from lada_rt.engines.onnxruntime import cuda_available

    if device == "auto" and cuda_available():
        try:
            return {name: _onnx_engine(bundle, name, "cuda", n_threads) for name in stages}, "cuda"
        except (EngineError, BundleError) as error:
            _LOG.warning("%s; the CPU is used", error)
    device = "cpu" if device == "auto" else device
    return {name: _onnx_engine(bundle, name, device, n_threads) for name in stages}, device


def _onnx_engine(bundle: Bundle, stage: str, device: str, n_threads: int | None) -> Engine:
    from lada_rt.engines.onnxruntime import OnnxEngine

    entry = bundle.stages[stage]
    if entry.precision == "bf16" and device == "cpu":
        raise EngineError(
            f"{stage}: its graph is bf16, which ONNX Runtime cannot run on the CPU; use --device cuda or --backend "
            "torch, or build the bundle with --precision fp32"
        )
    # seven sessions that each reorder their weights would hold a full-size bundle twice
    n_bytes = sum(stage.bytes for stage in bundle.stages.values())
    low_memory = device == "cpu" and n_bytes > _MAPPED_BYTES
    graph = entry.cpu_graph if entry.cpu_graph is not None and device == "cpu" else entry.graph
    return OnnxEngine(bundle.file_path(graph), device=device, n_threads=n_threads, low_memory=low_memory)


def _tensorrt_engines(entry: EngineEntry, device: str) -> dict[str, Engine]:
    from lada_rt.engines.tensorrt import TensorRTEngine

    plan = entry.folder / entry.files[0].path
    return {entry.key.stage: TensorRTEngine(plan, any_later_version=entry.key.any_later_version, log=_LOG.warning)}


def _torch_engines(entry: EngineEntry, device: str) -> dict[str, Engine]:
    from lada_rt.engines.torch import indexed, load_package

    where = indexed(device)
    try:
        parts = {part["name"]: part for part in entry.description["parts"]}
    except (KeyError, TypeError) as error:
        raise EngineError(
            f"{entry.folder}: engine.json does not describe its parts ({type(error).__name__}: {error}); "
            f"rebuild it with: {rebuild_command(entry.folder.parents[1], entry.key)}"
        ) from None
    return {name: load_package(entry.folder, part, where) for name, part in parts.items()}


def _with_loops(engines: dict[str, Engine], bundle: Bundle) -> dict[str, Engine]:
    """Give the stages that run on a device the loops around them."""
    from lada_rt.engines.torch import import_torch, missing

    import_torch()
    try:
        from lada_rt.torch_loop.path import engines_on_device
    except ModuleNotFoundError as error:
        raise missing(str(error.name)) from None
    return engines_on_device(engines, bundle.geometry)


#: backend -> loads one engine's files as engines by name
LOADERS: Final[dict[str, Callable[[EngineEntry, str], dict[str, Engine]]]] = {
    "tensorrt": _tensorrt_engines,
    "torch": _torch_engines,
}
