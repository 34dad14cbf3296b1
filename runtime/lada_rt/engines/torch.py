"""Engines on PyTorch: AOTInductor packages, as lada_rt_export.to_aoti wrote them. torch is imported on first use.

`engines.load_engines` gives them their loops (torch_loop/path.py), so that between the vocal's codes and the waveform
only the codes of the song cross to the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from lada_rt.errors import BundleError, EngineError, LadaError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TorchEngine", "device_key", "import_torch", "indexed", "load_package"]


def import_torch() -> ModuleType:
    """Import torch.

    Raises:
        EngineError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise missing("torch") from None
    return torch


def missing(package: str) -> EngineError:
    """What to say where a package of the GPU path is not installed."""
    return EngineError(f'backend torch: the package {package} is missing; install it with: pip install "lada-rt[gpu]"')


def device_key(device: str) -> str:
    """What compiled code depends on: `sm_90` for a GPU of that architecture, `cpu-x86_64-avx512` for a processor with
    those instructions.

    Raises:
        EngineError: torch or the device is missing.
    """
    torch = import_torch()
    if torch.device(device).type != "cuda":
        # packages are compiled for what torch's own kernels use, and ATEN_CPU_CAPABILITY holds for both
        instructions = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "_")
        return f"cpu-{platform.machine()}-{instructions}"
    if not torch.cuda.is_available():
        raise EngineError(
            "backend torch: expected a CUDA device, this torch sees none; use --device cpu, or check the driver "
            "with: lada-rt doctor"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def indexed(device: str) -> torch.device:
    """A device by its number, of CUDA the current one: other threads may have another current one."""
    torch = import_torch()
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


class TorchEngine:
    """A stage that torch runs: named arrays or named device tensors in, the same kind out. Thread-safe."""

    def __init__(
        self,
        function: Callable[..., Any],
        output_names: Sequence[str],
        device: torch.device,
        *,
        name: str = "stage",
        n_bytes: int = 0,
        exact: bool = False,
    ) -> None:
        """Args:
        function: takes the inputs by name as tensors on `device`; returns one tensor or a tuple of them.
        output_names: one name for each result.
        device: where it computes.
        name: of the stage or part, for messages and profiles.
        n_bytes: device memory of its weights.
        exact: compute float32 in float32 whatever the process's setting; see `torch_loop.device`.
        """
        self._torch = import_torch()
        self._function = function
        self._output_names = tuple(output_names)
        self.device = device
        self.name = name
        self.n_bytes = n_bytes
        self._exact = exact
        # A package is loaded without its own locks, which cannot be captured in a graph.
        self._lock = threading.Lock()

    def run_device(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate on device tensors; nothing waits for the result.

        Raises:
            EngineError: torch failed or is out of memory, or the inputs do not fit.
        """
        from lada_rt.torch_loop.device import engine_errors, exact_float32, failure, one_line

        precision = exact_float32 if self._exact else contextlib.nullcontext()
        try:
            # no_grad, not inference_mode: the loops update results in place
            with engine_errors(self.name), self._lock, self._torch.no_grad(), precision:
                result = self._function(**inputs)
        except LadaError:
            raise
        except Exception as error:
            raise failure(self.name, error) or EngineError(
                f"backend torch: {self.name}: the run failed ({one_line(error)}); report it with what "
                "lada-rt doctor says"
            ) from error
        outputs = result if isinstance(result, tuple | list) else (result,)
        return dict(zip(self._output_names, outputs, strict=True))

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate on arrays; waits for the result."""
        from lada_rt.torch_loop.device import engine_errors, on_device, to_device, to_host

        with engine_errors(self.name), on_device(self.name, self.device):
            found = self.run_device(**{name: to_device(array, self.device) for name, array in inputs.items()})
            return {name: to_host(tensor) for name, tensor in found.items()}


def load_package(folder: Path, part: Mapping[str, Any], device: torch.device) -> TorchEngine:
    """Load one AOTInductor package.

    Args:
        folder: holds the package.
        part: its entry in the description that lada_rt_export.to_aoti.build_engine returned: `file`, `sha256`,
            `bytes`, `outputs`.
        device: where it was compiled for.

    Raises:
        BundleError: the file is missing or is not the one described; it is not loaded then, for it holds native code.
        EngineError: torch cannot load it.
    """
    torch = import_torch()
    path = folder / Path(str(part["file"])).name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(
            f"{path}: expected an engine package, it cannot be read ({error.strerror}); rebuild it with: "
            "lada-rt build-engine --backend torch"
        ) from None
    if digest != part["sha256"]:
        raise BundleError(
            f"{path}: expected sha256 {str(part['sha256'])[:12]}..., got {digest[:12]}...; rebuild it with: "
            "lada-rt build-engine --backend torch"
        )
    index = -1 if device.type != "cuda" or device.index is None else device.index
    try:
        with _quiet_about_host():
            compiled = torch._inductor.aoti_load_package(str(path), run_single_threaded=True, device_index=index)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"{path}: no device memory for its weights ({' '.join(str(error).split())[:200]}); close other programs on "
            "the device. See what a song needs with: lada-rt inspect --device cuda"
        ) from None
    except Exception as error:
        raise EngineError(
            f"{path}: torch {torch.__version__} cannot load it ({' '.join(str(error).split())[:200]}); rebuild it "
            "with: lada-rt build-engine --backend torch"
        ) from None
    return TorchEngine(
        compiled, part["outputs"], device, name=str(part["name"]), n_bytes=int(part["bytes"]), exact=True
    )


@contextlib.contextmanager
def _quiet_about_host() -> Iterator[None]:
    """Keep torch from warning, at each load, of a processor with other vector instructions than the package's.

    What runs where is in the engine's key, which has been looked at: a package for a GPU uses none, one for a processor
    those that the key names.
    """

    def of_something_else(record: logging.LogRecord) -> bool:
        return "AOTI_CPU_ISA" not in record.getMessage()

    logger = logging.getLogger("torch.export.pt2_archive._package")
    logger.addFilter(of_something_else)
    try:
        yield
    finally:
        logger.removeFilter(of_something_else)
