"""Weights that half precision holds exactly are stored in it: a network trained for that takes half the disk.

Nothing is rounded here. The graph computes in float32 as before, a Cast after each such weight restores it; ONNX
Runtime folds the casts when it loads a graph. TensorRT is handed the weights themselves: its parser takes a convolution
for one of varying weights when a node computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from lada_rt.bench.graph_sizes import HALF_SUFFIX
from onnx import TensorProto, numpy_helper

__all__ = ["exact_half", "restore_floats", "store_halves"]

#: smaller weights are not worth a node
_MIN_ELEMENTS: Final = 2048
#: a weight that half precision does not hold, as nearly all released ones, shows it in its first values
_N_FIRST: Final = 4096


def store_halves(model: ir.Model) -> int:
    """Replace float32 initializers by float16 ones and casts where no bit is lost, in place.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _MIN_ELEMENTS:
            continue
        if value.is_graph_input() or value.is_graph_output():
            continue
        half = exact_half(tensor.numpy())
        if half is None:
            continue
        stored = ir.Value(
            name=name + HALF_SUFFIX,
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=name + HALF_SUFFIX),
        )
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value}, name=f"restore_{name}")
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(stored)
        restored = cast.outputs[0]
        restored.name, restored.shape, restored.type = name, value.shape, value.type
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)
    return len(casts)


def exact_half(array: np.ndarray) -> np.ndarray | None:
    """A float32 array in float16, or None if that changes a value."""
    first = array.reshape(-1)[:_N_FIRST]
    with np.errstate(over="ignore"):
        if not np.array_equal(first.astype(np.float16).astype(np.float32), first):
            return None
        half: Any = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else None


def restore_floats(graph: Path, target: Path) -> Path:
    """Undo `store_halves` in a file.

    Args:
        graph: an .onnx file; large weights lie beside it.
        target: written if the graph stores halves, with a .data file beside it if the graph has one.

    Returns:
        `target`, or `graph` if there is nothing to restore.
    """
    model = onnx.load(str(graph), load_external_data=False)
    stored = {t.name for t in model.graph.initializer if t.name.endswith(HALF_SUFFIX)}
    casts = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in stored}
    if not casts:
        return graph
    beside = any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer)
    model = onnx.load(str(graph))
    for tensor in model.graph.initializer:
        if tensor.name in casts:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, casts[tensor.name]))
    for index in reversed(range(len(model.graph.node))):
        node = model.graph.node[index]
        if node.op_type == "Cast" and node.input[0] in casts:
            del model.graph.node[index]
    onnx.save(model, str(target), save_as_external_data=beside, location=f"{target.stem}.data")
    return target
