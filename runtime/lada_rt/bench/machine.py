"""What a result has to say about where it came from: machine, versions, commit, load, and what the machine can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import lada_rt
from lada_rt.bench.roofline import Peaks
from lada_rt.cpus import cpu_count
from lada_rt.terminal import peak_rss_mb

__all__ = [
    "commit",
    "describe_machine",
    "load_average",
    "measure_peaks",
    "reset_peak_rss",
    "row_peak_rss_mb",
    "versions",
]

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "triton", "tensorrt", "numpy", "soxr", "soundfile", "mir_eval")
MATMUL_SIZE = 1536
COPY_BYTES = 128 << 20
PEAK_RUNS = 7


def describe_machine() -> dict[str, Any]:
    """Processor, memory, operating system and GPUs, as plain data."""
    return {
        "cpu": _cpu_name(),
        "cpus": cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": _gpus(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,memory.total", "--format=csv,noheader"]
    return _output(query).splitlines()


def versions() -> dict[str, str]:
    """lada-rt and the installed libraries that decide speed."""
    found = {"lada_rt": lada_rt.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this package runs from, with `+changes` where files differ; None when installed."""
    folder = Path(lada_rt.__file__).resolve().parent
    head = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]).strip()
    if not head:
        return None
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"]).strip()
    return f"{head}+changes" if changed else head


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def load_average() -> float | None:
    """Processes that wanted to run in the last minute: above the number of CPUs, times are too long."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def measure_peaks() -> Peaks:
    """What this machine's CPUs reach: float32 matrix products (numpy's BLAS) and copies in memory, best of several."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((MATMUL_SIZE, MATMUL_SIZE)).astype(np.float32)
    product = np.empty_like(a)
    source = np.ones(COPY_BYTES // 8)
    target = np.empty_like(source)

    def best(run: Any) -> float:
        times = []
        for _ in range(PEAK_RUNS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    matmul_s = best(lambda: np.matmul(a, a, out=product))
    # a copy of one thread is far from what many cores get out of memory
    targets, sources = (np.array_split(array, cpu_count()) for array in (target, source))
    with ThreadPoolExecutor(cpu_count()) as pool:
        copy_s = best(lambda: list(pool.map(np.copyto, targets, sources)))
    return Peaks(2.0 * MATMUL_SIZE**3 / matmul_s, 2.0 * COPY_BYTES / copy_s)


def reset_peak_rss() -> bool:
    """Start counting the peak of resident memory anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def row_peak_rss_mb() -> float:
    """Largest resident set since `reset_peak_rss`, in MB; since the start of the process where it cannot be reset."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6
    except (OSError, StopIteration, ValueError):
        return peak_rss_mb()
