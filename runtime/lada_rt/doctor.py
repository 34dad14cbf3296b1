"""What this machine can run: backends, devices, versions, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import lada_rt
from lada_rt.cpus import cpu_count
from lada_rt.engines.onnxruntime import load_onnxruntime
from lada_rt.errors import EngineError, LadaError

__all__ = ["examine"]

#: distribution -> what to install when it is missing
OPTIONAL = {
    "torch": 'pip install "lada-rt[export]" to build bundles',
    "onnx": 'pip install "lada-rt[export]" to build bundles',
    "triton": 'pip install "lada-rt[gpu]" for the GPU kernels',
    "tensorrt": 'pip install "lada-rt[gpu]" for TensorRT engines',
}


def examine() -> dict[str, Any]:
    """Look around. Returns {"checks": [{"what", "found", "remedy"}], "ready": can the demo bundle be run?}."""
    checks = [
        _row("lada-rt", lada_rt.__version__),
        _row("Python", f"{platform.python_version()} on {platform.platform()}"),
        _row("CPUs", f"{cpu_count()} usable"),
    ]
    ready = True
    try:
        from lada_rt import _C  # noqa: F401  the import is the check

        checks.append(_row("C++ kernels", "loaded"))
    except ImportError as error:
        ready = False
        checks.append(_row("C++ kernels", f"missing ({error})", "reinstall lada-rt with a C++17 compiler at hand"))
    try:
        ort = load_onnxruntime()
        checks.append(_row("onnxruntime", f"{ort.__version__}: {', '.join(ort.get_available_providers())}"))
    except EngineError:
        ready = False
        checks.append(_row("onnxruntime", "missing", 'pip install "lada-rt[cpu]"'))
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        checks.append(
            _row(
                "onnxruntime twice",
                "onnxruntime and onnxruntime-gpu share a folder: which of them is there is chance",
                'pip uninstall onnxruntime onnxruntime-gpu, then pip install "lada-rt[gpu]"',
            )
        )
    for name, remedy in OPTIONAL.items():
        version = _version(name)
        checks.append(_row(name, version or "not installed (optional)", "" if version else remedy))
    checks.append(_gpu())
    checks.append(_demo_bundle())
    return {"checks": checks, "ready": ready and checks[-1]["remedy"] == ""}


def _row(what: str, found: str, remedy: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "remedy": remedy}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _row("NVIDIA GPU", "no driver found (optional)")
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return _row("NVIDIA GPU", "nvidia-smi failed", "check the NVIDIA driver")
    return _row("NVIDIA GPU", "; ".join(found.split("\n")).strip("; "))


def _demo_bundle() -> dict[str, str]:
    from lada_rt.bundle import Bundle, demo_bundle_path

    try:
        bundle = Bundle.open(demo_bundle_path())
        bundle.verify()
    except LadaError as error:
        return _row("demo bundle", f"unusable ({error})", "reinstall lada-rt")
    return _row("demo bundle", f"{bundle.name}{'' if bundle.trained else ', untrained'}, checksums verified")
