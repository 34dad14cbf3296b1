"""Torch modules to ONNX graphs, each compared with its module before it is kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from lada_rt.bundle import FileEntry, StageEntry, TensorEntry, file_sha256
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import ExportError
from onnx import external_data_helper
from torch import Tensor

from lada_rt_export.stages import StageSpec

__all__ = ["OPSET", "export_stage", "output_error", "prove"]

#: native Attention, RMSNormalization and RotaryEmbedding come with opset 23
OPSET = 23
#: weights beyond this go to a file of their own: a protobuf cannot pass 2 GB
EXTERNAL_DATA_BYTES = 256 << 20
PROOF_SEED = 20_240


def export_stage(spec: StageSpec, folder: Path, *, relative: str = "graphs") -> StageEntry:
    """Export one stage to `folder/<relative>/<name>.onnx`, prove it, and describe it.

    The same module gives the same bytes: names and stack traces of the exporting process are stripped.

    Args:
        spec: the stage.
        folder: of the bundle being built.
        relative: sub-folder for the graph.

    Returns:
        The manifest entry, with the measured error under `proof`.

    Raises:
        ExportError: the exporter failed or the graph misses its tolerance; no file is left then.
    """
    target = folder / relative / f"{spec.name}.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    cases = spec.proof_inputs(torch.Generator().manual_seed(PROOF_SEED))
    model = _to_onnx(spec, cases[-1])
    files = _save(model, target)
    try:
        proof = prove(spec, target, cases)
    except ExportError:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    entries = [FileEntry(str(Path(relative) / f.name), file_sha256(f), f.stat().st_size) for f in files]
    return StageEntry(
        name=spec.name,
        graph=entries[0],
        external_data=tuple(entries[1:]),
        precision=spec.precision,
        inputs=_input_entries(spec, cases[-1]),
        outputs=_output_entries(spec),
        proof=proof,
    )


def prove(spec: StageSpec, graph: Path, cases: list[dict[str, Tensor]]) -> dict[str, float | int]:
    """Run the graph against its module on random inputs of several sizes.

    Returns:
        {"cases": how many, "max_rel_error": worst over cases and outputs, "tolerance": allowed}.

    Raises:
        ExportError: over tolerance.
    """
    engine = OnnxEngine(graph)
    worst = 0.0
    for index, case in enumerate(cases):
        with torch.inference_mode():
            reference = spec.module(**case)
        expected = dict(zip(spec.outputs, reference if isinstance(reference, tuple) else (reference,), strict=True))
        found = engine.run(**{name: tensor.numpy() for name, tensor in case.items()})
        for name, tensor in expected.items():
            error = output_error(found[name], tensor.numpy())
            if not error <= spec.tolerance:
                sizes = ", ".join(f"{k}{list(v.shape)}" for k, v in case.items())
                raise ExportError(
                    f"{spec.name}: output {name} of case {index} ({sizes}) differs from the module by {error:.2e}, "
                    f"allowed {spec.tolerance:.0e}; the graph was not kept"
                )
            worst = max(worst, error)
    return {"cases": len(cases), "max_rel_error": float(f"{worst:.3e}"), "tolerance": spec.tolerance}


def output_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Error of one output: largest difference over largest expected value; for ids the share that differs."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    if expected.dtype.kind in "iu":
        return float(np.mean(found != expected))
    scale = float(np.abs(expected).max())
    difference = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    return difference / scale if scale > 0 else difference


def _to_onnx(spec: StageSpec, example: Mapping[str, Tensor]) -> onnx.ModelProto:
    axes = {axis: torch.export.Dim.DYNAMIC for dims in spec.dynamic.values() for axis in dims.values()}
    shapes = {name: {d: axes[a] for d, a in spec.dynamic.get(name, {}).items()} for name in example}
    # A batch of one would be taken for a constant.
    widened = {name: _widen(tensor, spec.dynamic.get(name, {})) for name, tensor in example.items()}
    try:
        with _quiet():
            program = torch.onnx.export(
                spec.module,
                kwargs=widened,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(spec.outputs),
                dynamic_shapes=shapes,
                optimize=True,
                verify=False,
            )
    except Exception as error:
        raise ExportError(f"{spec.name}: torch.onnx.export failed ({' '.join(str(error).split())[:300]})") from error
    assert program is not None
    model = program.model_proto
    _strip(model)
    _name_axes(model, spec)
    return model


def _widen(tensor: Tensor, dims: Mapping[int, str]) -> Tensor:
    if dims.get(0) == "B" and tensor.shape[0] == 1:
        return torch.cat([tensor, tensor])
    return tensor


def _strip(model: onnx.ModelProto) -> None:
    """Drop stack traces and file paths of the exporting process: large, private, different on each machine."""
    graphs = [model.graph]
    model.doc_string = ""
    del model.metadata_props[:]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in (*graph.value_info, *graph.input, *graph.output):
            del value.metadata_props[:]
            value.doc_string = ""
        for tensor in graph.initializer:
            del tensor.metadata_props[:]
            tensor.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            graphs.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    del graphs


def _name_axes(model: onnx.ModelProto, spec: StageSpec) -> None:
    """Give dynamic dimensions the names of the stage table in place of the exporter's s0, s1, ..."""
    for value in model.graph.input:
        for dim, axis in spec.dynamic.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[dim].dim_param = axis
    for value in model.graph.output:
        for dim, size in enumerate(spec.output_shapes[value.name]):
            if isinstance(size, str):
                value.type.tensor_type.shape.dim[dim].dim_param = size


def _save(model: onnx.ModelProto, target: Path) -> list[Path]:
    """Write the graph, with its weights beside it when they are large. Returns the files, the graph first."""
    n_bytes = sum(len(t.raw_data) for t in model.graph.initializer)
    target.unlink(missing_ok=True)
    if n_bytes <= EXTERNAL_DATA_BYTES:
        onnx.checker.check_model(model, full_check=False)
        target.write_bytes(model.SerializeToString(deterministic=True))
        return [target]
    data = target.with_suffix(".data")
    data.unlink(missing_ok=True)
    external_data_helper.convert_model_to_external_data(
        model, all_tensors_to_one_file=True, location=data.name, size_threshold=1024
    )
    onnx.save_model(model, str(target))
    return [target, data]


def _input_entries(spec: StageSpec, example: Mapping[str, Tensor]) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(spec.dynamic.get(name, {}).get(d, n) for d, n in enumerate(tensor.shape)),
        )
        for name, tensor in example.items()
    )


def _output_entries(spec: StageSpec) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(name, "int64" if name == "codes" else "float32", tuple(spec.output_shapes[name]))
        for name in spec.outputs
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warnings about itself."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
