"""Stage modules to AOTInductor packages, each compared with its module before it is kept."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lada_rt.bundle import file_sha256
from lada_rt.engines.base import Engine
from lada_rt.engines.torch import TorchEngine, device_key, load_package
from lada_rt.errors import ExportError
from lada_rt.torch_loop.path import WholeFlow
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lada_rt_export.host_code import host_compilation, why_not_compiled
from lada_rt_export.proof import prove, reference
from lada_rt_export.stages import StageSpec
from lada_rt_export.symbolic_sizes import sums_divide
from lada_rt_export.torch_stages import StagePart, stage_parts
from lada_rt_export.tracing import quiet, widened
from lada_rt_export.workspace import available_memory

__all__ = ["ATTENTION", "build_engine"]

#: attention kernels in order of preference; none of them is handed a mask
ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_STEP_TIMES = 3


def build_engine(
    spec: StageSpec, folder: Path, *, precision: str, device: str, memory_bytes: int = sys.maxsize
) -> dict[str, Any]:
    """Compile a stage for the torch backend of this machine.

    Args:
        spec: the stage; its module stays as it is.
        folder: where the packages go, `<part>.pt2`. It is made when missing.
        precision: of the weights: `fp32`, `bf16` or `fp16`.
        device: `cpu` or `cuda`.
        memory_bytes: what the proof may take at most; sizes that need more are left out of it.

    Returns:
        What the runtime's loader reads: `backend`, `stage`, `precision`, `device_key`, `torch`,
        `parts` (for each package `name`, `file`, `sha256`, `bytes`, `outputs`) and `proof`.

    Raises:
        ExportError: torch cannot compile the stage, or it misses its tolerance; no file is left then.
        EngineError: the device is missing.
    """
    key = device_key(device)
    where = torch.device(device)
    spec = replace(spec, precision=precision)
    folder.mkdir(parents=True, exist_ok=True)
    parts = stage_parts(spec.name, spec.module, spec.outputs, precision=precision, device=where)
    paths = {part.name: folder / f"{part.name}.pt2" for part in parts}
    try:
        case = {name: tensor.to(where) for name, tensor in spec.cases()[-1].inputs.items()}
        examples = _examples(spec, parts, case)
        for part in parts:
            with host_compilation(where):
                _compile(part, examples[part.name], _axes(spec, part), paths[part.name])
        entries = [
            {
                "name": part.name,
                "file": paths[part.name].name,
                "sha256": file_sha256(paths[part.name]),
                "bytes": paths[part.name].stat().st_size,
                "outputs": list(part.outputs),
            }
            for part in parts
        ]
        engines = {part.name: load_package(folder, entry, where) for part, entry in zip(parts, entries, strict=True)}
        answers = reference(spec, min(available_memory() // 2, memory_bytes))
        proof = prove(spec, answers, _whole(spec, engines), f"AOTInductor package on {key}")
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise
    return {
        "backend": "torch",
        "stage": spec.name,
        "precision": precision,
        "device_key": key,
        "torch": torch.__version__,
        "parts": entries,
        "proof": proof,
    }


def _whole(spec: StageSpec, engines: Mapping[str, TorchEngine]) -> Engine:
    """The stage behind one engine, whatever its parts."""
    if spec.name in engines:
        return engines[spec.name]
    return WholeFlow(engines["flow_prepare"], engines["flow_step"])


def _examples(spec: StageSpec, parts: list[StagePart], case: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inputs of each part that belong to one case of the stage."""
    if len(parts) == 1:
        return {spec.name: dict(case)}
    prepare = {name: case[name] for name in ("context", "codes", "conditional")}
    prepare["times"] = torch.linspace(0.0, 0.9, _STEP_TIMES, device=case["t"].device)
    with torch.inference_mode():
        tables = dict(zip(parts[0].outputs, parts[0].module(**prepare), strict=True))
    return {
        "flow_prepare": prepare,
        "flow_step": {
            "x": case["x"],
            "condition": tables["condition"].clone(),
            "modulation": tables["modulation"][0].clone(),
            "closing": tables["closing"][0].clone(),
        },
    }


def _axes(spec: StageSpec, part: StagePart) -> dict[str, Mapping[int, str]]:
    if part.name == "flow_prepare":
        return {"context": {0: "B"}, "codes": {0: "B"}, "conditional": {0: "B"}, "times": {0: "N"}}
    if part.name == "flow_step":
        return {"x": {0: "B"}, "condition": {0: "B"}}
    return dict(spec.dynamic)


def _compile(part: StagePart, example: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]], path: Path) -> None:
    order = [name for name in inspect.signature(part.module.forward).parameters if name in example]
    inputs = {name: widened(example[name], axes.get(name, {})) for name in order}
    dynamic = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in order}
    try:
        with quiet(), sums_divide(), torch.no_grad(), sdpa_kernel(list(ATTENTION), set_priority=True):
            program = torch.export.export(part.module, (), kwargs=inputs, dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        path.unlink(missing_ok=True)
        raise ExportError(
            f"{part.name}: torch {torch.__version__} cannot compile it ({why_not_compiled(error)}); "
            "use another backend for this stage"
        ) from error
