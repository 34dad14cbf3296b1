"""Torch modules to ONNX graphs whose bytes depend on the module alone.

One graph serves ONNX Runtime and TensorRT. Weights are never held twice: the exporter's own tensors are views of the
module's, and large ones are written out one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from lada_rt.errors import ExportError
from torch import Tensor, nn

from lada_rt_export.stages import StageSpec
from lada_rt_export.stored_halves import store_halves
from lada_rt_export.tracing import quiet, widened

__all__ = ["EXTERNAL_DATA_BYTES", "OPSET", "write_graph"]

#: native Attention, RMSNormalization and RotaryEmbedding come with opset 23
OPSET: Final = 23
#: weights beyond this go to a file of their own: a protobuf cannot pass 2 GB, and a separate file can be memory-mapped
EXTERNAL_DATA_BYTES: Final = 256 << 20
#: smaller tensors stay in the graph, where shape inference can see them
_INLINE_BYTES: Final = 1024
#: engines map the file page by page
_PAGE_BYTES: Final = 4096
#: operator -> attributes with their defaults, which TensorRT's parser refuses to see spelt out
_IMPLIED: Final[Mapping[str, Mapping[str, Any]]] = {"Attention": {"softcap": 0.0, "qk_matmul_output_mode": 0}}


def write_graph(
    spec: StageSpec,
    module: nn.Module,
    example: Mapping[str, Tensor],
    target: Path,
    *,
    inline_bytes: int = EXTERNAL_DATA_BYTES,
) -> list[Path]:
    """Export one stage.

    The same module gives the same bytes: names and stack traces of the exporting process are stripped.

    Args:
        spec: names and axes of the stage.
        module: the stage in the precision that the graph is to have.
        example: inputs to trace with.
        target: the .onnx file.
        inline_bytes: weights of more bytes in all go to a .data file beside it.

    Returns:
        The files written, the graph first.

    Raises:
        ExportError: the exporter failed, or the disk is full.
    """
    axes = {axis: torch.export.Dim.DYNAMIC for dims in spec.dynamic.values() for axis in dims.values()}
    shapes = {name: {d: axes[a] for d, a in spec.dynamic.get(name, {}).items()} for name in example}
    inputs = {name: widened(tensor, spec.dynamic.get(name, {})) for name, tensor in example.items()}
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(spec.outputs),
                dynamic_shapes=shapes,
                optimize=True,
                verify=False,
            )
    except Exception as error:
        raise ExportError(
            f"{spec.name}: torch.onnx.export failed ({' '.join(str(error).split())[:300]}); "
            "use the torch and onnx versions that pip install 'lada-rt[export]' chooses"
        ) from error
    assert program is not None
    model: Any = program.model
    store_halves(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        data = _externalise(model, target, inline_bytes)
        proto = ir.to_proto(model)
        del program, model
        _strip(proto)
        _name_axes(proto, spec)
        target.write_bytes(proto.SerializeToString(deterministic=True))
        onnx.checker.check_model(str(target), full_check=False)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
    return [target] if data is None else [target, data]


def _externalise(model: Any, target: Path, inline_bytes: int) -> Path | None:
    """Write large weights to a file of their own, in the order of the graph, and leave references in the model."""
    data = target.with_suffix(".data")
    data.unlink(missing_ok=True)
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    if sum(v.const_value.nbytes for v in values) <= inline_bytes:
        return None
    with data.open("wb") as file:
        for value in values:
            tensor = value.const_value
            if tensor.nbytes <= _INLINE_BYTES:
                continue
            file.write(b"\0" * (-file.tell() % _PAGE_BYTES))
            offset = file.tell()
            file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                data.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=str(target.parent),
            )
            del tensor
    return data


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
            for index in reversed(range(len(node.attribute))):
                attribute = node.attribute[index]
                implied = _IMPLIED.get(node.op_type, {})
                if attribute.name in implied and onnx.helper.get_attribute_value(attribute) == implied[attribute.name]:
                    del node.attribute[index]
            graphs.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)


def _name_axes(model: onnx.ModelProto, spec: StageSpec) -> None:
    """Give dynamic dimensions the names of the stage table in place of the exporter's s0, s1, ..."""
    for value in model.graph.input:
        for dim, axis in spec.dynamic.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[dim].dim_param = axis
    for value in model.graph.output:
        for dim, size in enumerate(spec.output_shapes[value.name]):
            if isinstance(size, str):
                value.type.tensor_type.shape.dim[dim].dim_param = size
