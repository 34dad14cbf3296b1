"""Execution backends behind one interface: which engines a bundle's stages get on this machine."""

from __future__ import annotations

from lada_rt.bundle import Bundle
from lada_rt.engines.base import Engine
from lada_rt.errors import ParamError

__all__ = ["BACKENDS", "DEVICES", "Engine", "load_engines"]

BACKENDS = ("onnxruntime", "tensorrt", "torch")
DEVICES = ("cpu", "cuda")


def load_engines(
    bundle: Bundle, *, backend: str = "auto", device: str = "auto", n_threads: int | None = None
) -> tuple[dict[str, Engine], str, str]:
    """Load an engine for every stage.

    Returns:
        (engine for each stage, backend used, device used).

    Raises:
        ParamError: unknown backend or device.
        EngineError: the backend is missing or has no such device.
        BundleError: a graph cannot be loaded.
    """
    if backend not in ("auto", *BACKENDS):
        raise ParamError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if device not in ("auto", *DEVICES):
        raise ParamError(f"device: expected one of auto, {', '.join(DEVICES)}, got {device!r}")
    from lada_rt.engines.onnxruntime import PROVIDERS, OnnxEngine, load_onnxruntime

    if device == "auto":
        has_cuda = PROVIDERS["cuda"] in load_onnxruntime().get_available_providers()
        device = "cuda" if has_cuda else "cpu"
    engines: dict[str, Engine] = {
        name: OnnxEngine(bundle.file_path(stage.graph), device=device, n_threads=n_threads)
        for name, stage in bundle.stages.items()
    }
    return engines, "onnxruntime", device
