"""Whether TensorRT's ONNX parser would take a graph, node by node, without TensorRT.

The table `tensorrt_operators.tsv` says which operators and element types the parser takes and which limits they have;
the limits of the operators that our graphs use are written out below as code, and an operator with a limit that is
not is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

__all__ = ["Operator", "check_graph", "operators"]

#: opsets that the parser reads
OPSETS: Final = range(9, 25)
#: axes of a TensorRT tensor
MAX_RANK: Final = 8
#: K of TopK stays below this
TOPK_LIMIT: Final = 3840

_TYPE_NAMES: Final[dict[int, str]] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT8: "INT8",
    TensorProto.DOUBLE: "DOUBLE",
}
#: operators whose result has a type of its own, chosen by an attribute
_TYPED_RESULT: Final = ("Cast", "Constant", "ConstantOfShape")


@dataclass(frozen=True, slots=True)
class Operator:
    """A row of the table: element types of the operator's data, and its limits in words."""

    name: str
    types: frozenset[str]
    limits: str


@cache
def operators() -> dict[str, Operator]:
    """The table: what TensorRT's parser takes."""
    text = resources.files("lada_rt_export").joinpath("tensorrt_operators.tsv").read_text(encoding="utf-8")
    table = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, types, limits = (*line.split("\t"), "")[:3]
            table[name] = Operator(name, frozenset(types.split(",")), limits)
    return table


def check_graph(graph: onnx.ModelProto | Path) -> list[str]:
    """What the parser would refuse.

    Args:
        graph: a model, or the path of one; large weights beside it are not read.

    Returns:
        One line for each fault, empty if there is none.
    """
    model = graph if isinstance(graph, onnx.ModelProto) else onnx.load(str(graph), load_external_data=False)
    faults = [
        f"opset {opset.domain or 'ai.onnx'} {opset.version}: expected ai.onnx 9 to 24"
        for opset in model.opset_import
        if opset.domain not in ("", "ai.onnx") or opset.version not in OPSETS
    ]
    faults += [f"{function.name}: expected no model-local functions" for function in model.functions]
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    return faults + list(_check_nodes(_inferred(model).graph, version, {}))


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # the library raises several kinds; what stays unknown is reported node by node
        return model


def _check_nodes(graph: onnx.GraphProto, version: int, outer: dict[str, onnx.ValueInfoProto]) -> Iterator[str]:
    values = outer | {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        values[tensor.name] = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
    for node in graph.node:
        look = _Node(node, version, values, constants)
        yield from (f"{node.op_type} {node.name or node.output[0]}: {fault}" for fault in look.faults())
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _check_nodes(attribute.g, version, values)


class _Node:
    """One node with what is known of its inputs and outputs."""

    def __init__(
        self,
        node: onnx.NodeProto,
        version: int,
        values: dict[str, onnx.ValueInfoProto],
        constants: dict[str, onnx.TensorProto],
    ) -> None:
        self.node, self.version, self.values, self.constants = node, version, values, constants
        self.attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def faults(self) -> Iterator[str]:
        node = self.node
        operator = operators().get(node.op_type)
        if node.domain not in ("", "ai.onnx") or operator is None:
            yield f"operator {node.domain or 'ai.onnx'}.{node.op_type} is not supported"
            return
        for name in self._typed_names():
            found = self.type_of(name)
            if found not in operator.types:
                yield f"{name} has type {found}, supported are {', '.join(sorted(operator.types))}"
        for name in (*node.input, *node.output):
            rank = self.rank(name) if name else 0
            if rank is not None and rank > MAX_RANK:
                yield f"{name} has {rank} axes, at most {MAX_RANK} are supported"
        if operator.limits:
            rule = _RULES.get(node.op_type)
            if rule is None:
                yield f"its limit is not checked here: {operator.limits}"
            else:
                yield from rule(self)

    def _typed_names(self) -> list[str]:
        """Inputs and outputs of the operator's data type: the type variable of its first input."""
        node = self.node
        schema = onnx.defs.get_schema(node.op_type, self.version)
        if not node.input:
            return [node.output[0]]
        variable = schema.inputs[0].type_str
        names = []
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name and (formal.type_str == variable or len(schema.inputs) == 1):
                names.append(name)
        for index, name in enumerate(node.output):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            if name and formal.type_str == variable:
                names.append(name)
        return [*names, node.output[0]] if node.op_type in _TYPED_RESULT else names

    def type_of(self, name: str) -> str:
        value = self.values.get(name)
        if value is None:
            return _TYPE_NAMES.get(self.constants[name].data_type, "?") if name in self.constants else "unknown"
        return _TYPE_NAMES.get(value.type.tensor_type.elem_type, "unknown")

    def rank(self, name: str) -> int | None:
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return len(self.constants[name].dims) if name in self.constants else None
        return len(value.type.tensor_type.shape.dim)

    def given(self, index: int) -> str:
        """Name of an input, empty where there is none."""
        return self.node.input[index] if index < len(self.node.input) else ""

    def constant(self, index: int) -> Any:
        """Value of an input that is known when the engine is built, else None."""
        name = self.given(index)
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def is_constant(self, index: int) -> bool:
        return self.given(index) in self.constants


_Rule = Callable[[_Node], Iterator[str]]


def _attention(node: _Node) -> Iterator[str]:
    for index, what in enumerate(("Q", "K", "V", "mask")):
        name = node.given(index)
        if name and node.rank(name) != 4:
            yield f"{what} must have 4 axes, it has {node.rank(name)}"
    if any(node.given(index) for index in range(4, 7)):
        yield "past_key, past_value and nonpad_kv_seqlen are not supported"
    if any(node.node.output[1:]):
        yield "only its first result is supported"
    for name in ("softcap", "qk_matmul_output_mode"):
        if name in node.attributes:
            yield f"attribute {name} is not supported"


def _only_first_output(node: _Node) -> Iterator[str]:
    if any(node.node.output[1:]):
        yield "only its first result is supported"


def _top_k(node: _Node) -> Iterator[str]:
    if node.attributes.get("sorted", 1) != 1:
        yield "sorted must be 1"
    k = node.constant(1)
    if k is None or not int(k.reshape(-1)[0]) < TOPK_LIMIT:
        yield f"K must be a constant below {TOPK_LIMIT}, it is {None if k is None else int(k.reshape(-1)[0])}"


def _constant_axes(node: _Node) -> Iterator[str]:
    if node.given(1) and not node.is_constant(1):
        yield "axes must be a constant"


def _constant_second(node: _Node) -> Iterator[str]:
    if not node.is_constant(1):
        yield f"input {node.given(1)} must be a constant"


def _constant_value(node: _Node) -> Iterator[str]:
    for name in node.attributes:
        if name == "sparse_value" or name.startswith("value_string"):
            yield f"attribute {name} is not supported"


def _resize(node: _Node) -> Iterator[str]:
    modes = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    wanted: dict[str, tuple[Any, ...]] = {
        "coordinate_transformation_mode": tuple(m.encode() for m in modes),
        "mode": (b"nearest", b"linear"),
        "nearest_mode": (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil"),
        "keep_aspect_ratio_policy": (b"stretch",),
        "antialias": (0,),
    }
    for name, allowed in wanted.items():
        if node.attributes.get(name, allowed[0]) not in allowed:
            yield f"{name} {node.attributes[name]!r} is not supported"
    if "axes" in node.attributes and list(node.attributes["axes"]) != list(range(node.rank(node.given(0)) or 0)):
        yield "axes must be all axes in order"


def _scatter_nd(node: _Node) -> Iterator[str]:
    if node.attributes.get("reduction", b"none") != b"none":
        yield "no reduction is supported"


def _rotary(node: _Node) -> Iterator[str]:
    if node.given(3) and node.type_of(node.given(3)) != "INT64":
        yield "position_ids must be INT64"


def _same_windows(node: _Node) -> Iterator[str]:
    if len(node.attributes.get("kernel_shape", ())) not in (2, 3):
        yield "windows must have 2 or 3 axes"
    if any(d != 1 for d in node.attributes.get("dilations", ())):
        yield "dilations must be 1"
    yield from _only_first_output(node)


_RULES: Final[dict[str, _Rule]] = {
    "Attention": _attention,
    "AveragePool": _same_windows,
    "Constant": _constant_value,
    "CumSum": _constant_second,
    "LayerNormalization": _only_first_output,
    "MaxPool": _same_windows,
    "OneHot": _constant_second,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "ScatterND": _scatter_nd,
    "Squeeze": _constant_axes,
    "TopK": _top_k,
    "Unsqueeze": _constant_axes,
    **{
        f"Reduce{kind}": _constant_axes
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
    },
}
