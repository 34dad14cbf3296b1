"""One stage to proven ONNX graphs: answers of the float32 module, export in the wanted precision, comparison."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lada_rt.bundle import FileEntry, StageEntry, file_sha256
from lada_rt.engines.base import Engine
from lada_rt.engines.onnxruntime import OnnxEngine, cuda_available
from lada_rt.errors import BundleError, EngineError, ExportError
from torch import nn

from lada_rt_export.cpu_graph import CPU_STAGES, write_cpu_graph
from lada_rt_export.onnx_check import check_graph
from lada_rt_export.proof import ModuleEngine, Reference, prove, reference
from lada_rt_export.stages import DTYPES, StageSpec
from lada_rt_export.to_onnx import EXTERNAL_DATA_BYTES, write_graph

__all__ = ["GraphJob", "build_graph"]


@dataclass(frozen=True, slots=True)
class GraphJob:
    """Export and prove one stage.

    Attributes:
        spec: with the float32 module; it is converted in place when the precision is another.
        folder: of the bundle being built.
        memory_bytes: what the proof's activations may take.
        log: told one line per step.
    """

    spec: StageSpec
    folder: Path
    memory_bytes: int
    log: Callable[[str], None]


def build_graph(job: GraphJob) -> StageEntry:
    """Write `graphs/<stage>.onnx`, prove it, and describe it; for some stages also `graphs/<stage>.cpu.onnx`.

    Returns:
        The manifest entry, with the measured errors under `proof`, of the CPU's graph under `proof["cpu_graph"]`.

    Raises:
        ExportError: the exporter failed, a node is beyond what engines take, or the graph misses its tolerance; no file
            is left then.
    """
    spec = job.spec
    target = job.folder / "graphs" / f"{spec.name}.onnx"
    expected = reference(spec, job.memory_bytes)
    job.log(f"  module run at {len(expected.cases)} sizes in {sum(expected.seconds):.0f} s")
    module = spec.module.to(DTYPES[spec.precision])
    start = time.monotonic()
    # two graphs can share weights only if these lie beside them
    for_cpu = spec.name in CPU_STAGES and spec.precision == "fp32"
    inline_bytes = 0 if for_cpu else EXTERNAL_DATA_BYTES
    files = write_graph(spec, module, expected.cases[0].inputs, target, inline_bytes=inline_bytes)
    job.log(f"  exported in {time.monotonic() - start:.0f} s, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")
    try:
        faults = check_graph(target)
        if faults:
            raise ExportError(
                f"{spec.name}: {len(faults)} nodes are beyond what TensorRT's parser takes, first {faults[0]}; "
                "use the torch version that pip install 'lada-rt[export]' chooses"
            )
        gc.collect()
        proof = _proof(job, module, target, expected)
        cpu_graph = _cpu_graph(job, target, expected, proof) if for_cpu else None
    except ExportError:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    entries = [_entry(job.folder, file) for file in files]
    return StageEntry(
        name=spec.name,
        graph=entries[0],
        external_data=tuple(entries[1:]),
        precision=spec.precision,
        inputs=spec.input_entries(),
        outputs=spec.output_entries(),
        proof=proof,
        cpu_graph=cpu_graph,
    )


def _cpu_graph(job: GraphJob, graph: Path, expected: Reference, proof: dict[str, Any]) -> FileEntry | None:
    """Write and prove the CPU's form of a graph, and note its errors in `proof`; None where it has no other form.

    Raises:
        ExportError: it misses the tolerance; it is not left then.
    """
    target = graph.with_suffix(".cpu.onnx")
    if not write_cpu_graph(graph, target):
        return None
    try:
        found = prove(job.spec, expected, OnnxEngine(target, low_memory=True), "CPU graph in ONNX Runtime", job.log)
    except ExportError:
        target.unlink()
        raise
    proof["cpu_graph"] = {name: found[name] for name in ("method", "max_rel_error", "errors")}
    return _entry(job.folder, target)


def _proof(job: GraphJob, module: nn.Module, graph: Path, expected: Reference) -> dict[str, Any]:
    """Compare the graph, or its module where nothing here runs the graph.

    Raises:
        ExportError: it misses the tolerance.
    """
    spec = job.spec
    if spec.precision != "bf16":
        engine: Engine = OnnxEngine(graph, low_memory=True)
        return prove(spec, expected, engine, "graph in ONNX Runtime on the CPU", job.log)
    reason = "ONNX Runtime's CPU has no bfloat16 MatMul to run the graph"
    if cuda_available():
        try:
            engine = OnnxEngine(graph, device="cuda")
            return prove(spec, expected, engine, "graph in ONNX Runtime on the GPU", job.log)
        except (BundleError, EngineError) as error:  # its provider is listed where it cannot start, too
            reason += f", and its GPU did not ({str(error).replace(str(graph), graph.name)})"
            job.log(f"  {error}; the module is compared instead")
    return prove(spec, expected, ModuleEngine(spec, module), f"bfloat16 torch module; {reason}", job.log)


def _entry(folder: Path, file: Path) -> FileEntry:
    return FileEntry(file.relative_to(folder).as_posix(), file_sha256(file), file.stat().st_size)
