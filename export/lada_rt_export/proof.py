"""Comparing an engine with its torch module: the same random inputs at several sizes, the error in numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lada_rt.bench.difference import relative_error
from lada_rt.engines.base import Engine
from lada_rt.errors import ExportError
from torch import Tensor, nn

from lada_rt_export.stages import ProofCase, StageSpec

__all__ = ["ModuleEngine", "Reference", "Results", "module_results", "prove", "reference"]

Results = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Reference:
    """What the float32 module answers.

    Attributes:
        cases: the sizes that fit the memory, from the smallest.
        results: of each case.
        seconds: of each case.
        left_out: sizes that did not fit, with the memory they were judged to need.
    """

    cases: list[ProofCase]
    results: list[Results]
    seconds: list[float]
    left_out: dict[str, int]


def reference(spec: StageSpec, memory_bytes: int) -> Reference:
    """Run the float32 module on every case that fits.

    Args:
        spec: the stage; `spec.module` is float32.
        memory_bytes: what activations may take. The smallest case always runs.
    """
    cases: list[ProofCase] = []
    results: list[Results] = []
    left_out: dict[str, int] = {}
    seconds: list[float] = []
    for case in spec.cases():
        if cases and case.activation_bytes > memory_bytes:
            left_out[case.size] = case.activation_bytes
            continue
        start = time.perf_counter()
        results.append(module_results(spec, spec.module, case))
        seconds.append(time.perf_counter() - start)
        cases.append(case)
    return Reference(cases, results, seconds, left_out)


def module_results(spec: StageSpec, module: nn.Module, case: ProofCase) -> Results:
    """Named results of a module on one case."""
    device = next(iter(module.parameters())).device
    with torch.inference_mode():
        result = module(**{name: tensor.to(device) for name, tensor in case.inputs.items()})
    tensors = (result,) if isinstance(result, Tensor) else tuple(result)
    return {name: t.cpu().numpy() for name, t in zip(spec.outputs, tensors, strict=True)}


def prove(
    spec: StageSpec,
    expected: Reference,
    engine: Engine,
    method: str,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run an engine on the inputs of the reference.

    Args:
        spec: the stage.
        expected: what the float32 module answered.
        engine: to be compared.
        method: what was run, in words for the manifest.
        log: told of each size: seconds and error.

    Returns:
        For the manifest: what was run, the error of each size and the worst, the tolerance, sizes left out.

    Raises:
        ExportError: an error is over the tolerance.
    """
    allowed = spec.tolerance
    errors: dict[str, float] = {}
    for case, wanted, module_s in zip(expected.cases, expected.results, expected.seconds, strict=True):
        arrays = {name: tensor.numpy() for name, tensor in case.inputs.items()}
        start = time.perf_counter()
        found = engine.run(**arrays)
        engine_s = time.perf_counter() - start
        wanted_values, found_values = spec.compare(wanted), spec.compare(found)
        for name, value in wanted_values.items():
            error = relative_error(found_values[name], value)
            if not error <= allowed:
                shapes = ", ".join(f"{k}{list(v.shape)}" for k, v in arrays.items())
                raise ExportError(
                    f"{spec.name}: {name} of the {case.size} size ({shapes}) differs from the float32 module by "
                    f"{error:.2e}, allowed {allowed:.0e}; the engine was not kept, choose another --precision"
                )
            errors[case.size] = max(errors.get(case.size, 0.0), error)
        log(f"  {case.size}: module {module_s:.2f} s, engine {engine_s:.2f} s, error {errors[case.size]:.1e}")
    proof: dict[str, Any] = {
        "method": method,
        "max_rel_error": _rounded(max(errors.values())),
        "tolerance": allowed,
        "errors": {size: _rounded(error) for size, error in errors.items()},
        "sizes": {
            case.size: {name: list(tensor.shape) for name, tensor in case.inputs.items()} for case in expected.cases
        },
    }
    if expected.left_out:
        proof["left_out_for_memory"] = {size: f"{n / 1e9:.1f} GB" for size, n in expected.left_out.items()}
    return proof


def _rounded(error: float) -> float:
    return float(f"{error:.1e}")


class ModuleEngine:
    """A torch module as an engine: proves a precision that no engine on this machine can run."""

    def __init__(self, spec: StageSpec, module: nn.Module) -> None:
        self._spec, self._module = spec, module

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        case = ProofCase("", {name: torch.from_numpy(array) for name, array in inputs.items()}, 0)
        return module_results(self._spec, self._module, case)
