"""A stage's graph for ONNX Runtime on CPUs: the same network in operators of its own, over the same weights.

ONNX Runtime computes the standard Attention from a matrix of all scores, 67 MB for one head over 4096 tokens. Its own
MultiHeadAttention works in tiles that stay in the cache and takes its inputs as the projections leave them. TensorRT
knows no such operator, so the stage's graph stays as it is, and this one lies beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx
from lada_rt.errors import ExportError
from onnx import helper, numpy_helper

__all__ = ["CPU_STAGES", "with_tiled_attention", "write_cpu_graph"]

#: stages that gain from it: attention without a mask over tokens that are many and short
CPU_STAGES: Final = ("flow",)
_DOMAIN: Final = "com.microsoft"
#: [B, tokens, heads, width] to [B, heads, tokens, width] and back
_SWAP: Final = [0, 2, 1, 3]


def write_cpu_graph(graph: Path, target: Path) -> bool:
    """Write the CPU's form of a graph.

    Args:
        graph: an .onnx file whose large weights lie in a file beside it.
        target: in the same folder; it refers to the same weights.

    Returns:
        False, and nothing is written, if the graph holds no attention of the form that is replaced.

    Raises:
        ExportError: it cannot be written.
    """
    model = onnx.load(str(graph), load_external_data=False)
    if not with_tiled_attention(model):
        return False
    try:
        target.write_bytes(model.SerializeToString(deterministic=True))
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from error
    return True


def with_tiled_attention(model: onnx.ModelProto) -> int:
    """Replace each unmasked Attention between head transposes by one MultiHeadAttention, in place.

    Returns:
        How many were replaced.
    """
    links = _Links(model.graph)
    found = [tiled for node in model.graph.node if (tiled := links.tiled(node)) is not None]
    if not found:
        return 0
    for tiled, outer in found:
        # it takes the place of the last node of its group; what led there is dead then
        outer.CopyFrom(tiled)
    _drop_dead(model.graph)
    if _DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return len(found)


class _Links:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}

    def tiled(self, attention: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """The node that replaces an Attention and the node whose place it takes; None where it cannot."""
        if attention.op_type != "Attention" or attention.domain or len(attention.input) != 3:
            return None
        options: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in attention.attribute}
        masked = options.pop("is_causal", 0)
        sides = [self._flat(name) for name in attention.input]
        swap = self._only_reader(attention)
        join = None if swap is None or not _swaps(swap) else self._only_reader(swap)
        if masked or not set(options) <= {"scale"} or None in sides or join is None or join.op_type != "Reshape":
            return None
        heads = {side[1] for side in sides if side is not None}
        if len(heads) != 1 or len(self._shape(join)) != 3:
            return None
        flat = [side[0] for side in sides if side is not None]
        node = helper.make_node(
            "MultiHeadAttention", flat, list(join.output), domain=_DOMAIN, num_heads=heads.pop(), **options
        )
        return node, join

    def _flat(self, name: str) -> tuple[str, int] | None:
        """What is split into heads and transposed to give `name`, and the number of heads."""
        swap = self._maker.get(name)
        split = self._maker.get(swap.input[0]) if swap is not None and _swaps(swap) else None
        if split is None or split.op_type != "Reshape":
            return None
        shape = self._shape(split)
        return (split.input[0], shape[2]) if len(shape) == 4 and shape[2] > 0 else None

    def _shape(self, reshape: onnx.NodeProto) -> list[int]:
        constant = self._constants.get(reshape.input[1])
        return [] if constant is None else [int(n) for n in numpy_helper.to_array(constant)]

    def _only_reader(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        readers = self._readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and node.output[0] not in self._outputs else None


def _swaps(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and list(node.attribute[0].ints) == _SWAP


def _drop_dead(graph: onnx.GraphProto) -> None:
    """Remove nodes, constants and shapes of values that lead to no output."""
    live = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        if live.isdisjoint(graph.node[index].output):
            del graph.node[index]
        else:
            live.update(graph.node[index].input)
    for named in (graph.initializer, graph.value_info):
        for index in reversed(range(len(named))):
            if named[index].name not in live:
                del named[index]
