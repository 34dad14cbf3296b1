"""The check of graphs against what TensorRT's parser takes: the shipped graphs pass, every kind of fault is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt_export.onnx_check import check_graph, operators
from onnx import TensorProto, helper, numpy_helper

F, H, I = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64  # noqa: E741  the letters of the types


def model(
    *nodes: onnx.NodeProto,
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, int] | None = None,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 23,
    domain: str = "",
) -> onnx.ModelProto:
    """A graph of a few nodes; results have the type given, by default float32."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, (outputs or {}).get(n, F), None) for n in nodes[-1].output],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, opset)])


BUNDLE = Bundle.open(demo_bundle_path())


@pytest.mark.parametrize("stage", sorted(BUNDLE.stages))
def test_the_embedded_bundle_passes(stage: str) -> None:
    assert check_graph(BUNDLE.file_path(BUNDLE.stages[stage].graph)) == []


def test_every_graph_of_the_embedded_bundle_is_checked_but_those_for_cpus() -> None:
    """A graph for CPUs may use ONNX Runtime's own operators: nothing else reads it."""
    for_cpus = {s.cpu_graph.path for s in BUNDLE.stages.values() if s.cpu_graph is not None}
    graphs = {s.graph.path for s in BUNDLE.stages.values()}
    found = {p.relative_to(BUNDLE.path).as_posix() for p in BUNDLE.path.rglob("*.onnx")}
    assert found == graphs | for_cpus
    assert not graphs & for_cpus
    for path in for_cpus:
        assert any("com.microsoft" in line for line in check_graph(BUNDLE.path / path))


def test_the_table_is_complete() -> None:
    """159 of the 201 listed operators are taken."""
    assert len(operators()) == 159
    assert operators()["TopK"].limits
    assert operators()["MatMul"].types == {"FP32", "FP16", "BF16"}
    assert "Multinomial" not in operators()


def test_good_nodes_pass() -> None:
    good = [
        model(helper.make_node("MatMul", ["a", "b"], ["y"]), inputs={"a": (F, [2, 3]), "b": (F, [3, 4])}),
        model(
            helper.make_node("Attention", ["q", "k", "v"], ["y"]),
            inputs={n: (H, [1, 2, 5, 8]) for n in "qkv"},
            outputs={"y": H},
        ),
        model(
            helper.make_node("TopK", ["x", "k"], ["y", "i"]),
            inputs={"x": (F, [1, 9000])},
            outputs={"i": I},
            constants={"k": np.array([3839])},
        ),
        model(
            helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
            inputs={"x": (F, [2, 3])},
            constants={"axes": np.array([1])},
        ),
        model(helper.make_node("Cast", ["x"], ["y"], to=I), inputs={"x": (F, [2])}, outputs={"y": I}),
    ]
    assert [check_graph(m) for m in good] == [[]] * len(good)


ATTENTION = {n: (F, [1, 2, 5, 8]) for n in "qkv"}
FAULTS = {
    "operator": (model(helper.make_node("Det", ["x"], ["y"]), inputs={"x": (F, [3, 3])}), "Det is not supported"),
    "foreign domain": (
        model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), inputs={"x": (F, [3])}),
        r"com\.microsoft\.Gelu is not supported",
    ),
    "double": (
        model(
            helper.make_node("Add", ["x", "x"], ["y"]),
            inputs={"x": (TensorProto.DOUBLE, [3])},
            outputs={"y": TensorProto.DOUBLE},
        ),
        "x has type DOUBLE, supported are",
    ),
    "integer product": (
        model(helper.make_node("MatMul", ["x", "x"], ["y"]), inputs={"x": (I, [3, 3])}, outputs={"y": I}),
        "x has type INT64, supported are BF16, FP16, FP32",
    ),
    "half STFT": (
        model(
            helper.make_node("STFT", ["x", "step", "w"], ["y"]),
            inputs={"x": (H, [1, 400, 1]), "step": (I, []), "w": (H, [64])},
            outputs={"y": H},
        ),
        "x has type FP16, supported are FP32",
    ),
    "large K": (
        model(
            helper.make_node("TopK", ["x", "k"], ["y", "i"]),
            inputs={"x": (F, [1, 9000])},
            outputs={"i": I},
            constants={"k": np.array([3840])},
        ),
        "K must be a constant below 3840, it is 3840",
    ),
    "unknown K": (
        model(
            helper.make_node("TopK", ["x", "k"], ["y", "i"]),
            inputs={"x": (F, [1, 9000]), "k": (I, [1])},
            outputs={"i": I},
        ),
        "K must be a constant below 3840, it is None",
    ),
    "unsorted TopK": (
        model(
            helper.make_node("TopK", ["x", "k"], ["y", "i"], sorted=0),
            inputs={"x": (F, [1, 9])},
            outputs={"i": I},
            constants={"k": np.array([3])},
        ),
        "sorted must be 1",
    ),
    "3-D attention": (
        model(
            helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=2, kv_num_heads=2),
            inputs={n: (F, [1, 5, 16]) for n in "qkv"},
        ),
        "Q must have 4 axes, it has 3",
    ),
    "3-D mask": (
        model(
            helper.make_node("Attention", ["q", "k", "v", "m"], ["y"]),
            inputs={**ATTENTION, "m": (F, [2, 5, 5])},
        ),
        "mask must have 4 axes, it has 3",
    ),
    "soft cap": (
        model(helper.make_node("Attention", ["q", "k", "v"], ["y"], softcap=0.0), inputs=ATTENTION),
        "attribute softcap is not supported",
    ),
    "cache": (
        model(
            helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "ck", "cv"]),
            inputs={**ATTENTION, "pk": (F, [1, 2, 4, 8]), "pv": (F, [1, 2, 4, 8])},
        ),
        "past_key, past_value",
    ),
    "norm statistics": (
        model(
            helper.make_node("LayerNormalization", ["x", "w", "b"], ["y", "mean"]),
            inputs={"x": (F, [2, 4]), "w": (F, [4]), "b": (F, [4])},
        ),
        "only its first result",
    ),
    "axes that are computed": (
        model(
            helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
            inputs={"x": (F, [2, 3]), "axes": (I, [1])},
        ),
        "axes must be a constant",
    ),
    "cubic": (
        model(
            helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic"),
            inputs={"x": (F, [1, 1, 4, 4])},
            constants={"s": np.array([1, 1, 2, 2], np.float32)},
        ),
        "mode b'cubic' is not supported",
    ),
    "an unchecked limit": (
        model(
            helper.make_node("GridSample", ["x", "g"], ["y"]),
            inputs={"x": (F, [1, 1, 4, 4]), "g": (F, [1, 4, 4, 2])},
        ),
        "its limit is not checked here: 4-D input only",
    ),
    "nine axes": (
        model(helper.make_node("Relu", ["x"], ["y"]), inputs={"x": (F, [1] * 9)}),
        "x has 9 axes, at most 8",
    ),
    "opset": (
        model(helper.make_node("Relu", ["x"], ["y"]), inputs={"x": (F, [1])}, opset=25),
        "opset ai.onnx 25: expected ai.onnx 9 to 24",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found(name: str) -> None:
    graph, pattern = FAULTS[name]
    faults = check_graph(graph)
    assert faults
    with pytest.raises(ValueError, match=pattern):
        raise ValueError("; ".join(faults))


def test_branches_of_conditions_are_looked_into() -> None:
    def branch(operator: str) -> onnx.GraphProto:
        node = helper.make_node(operator, ["x"], [f"{operator}_y"])
        return helper.make_graph([node], operator, [], [helper.make_tensor_value_info(node.output[0], F, None)])

    graph = model(
        helper.make_node("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch("Det")),
        inputs={"c": (TensorProto.BOOL, []), "x": (F, [3, 3])},
    )
    assert any("Det is not supported" in fault for fault in check_graph(graph))
    assert not any("Relu" in fault for fault in check_graph(graph))


def test_weights_beside_the_graph_are_not_needed(tmp_path: Path) -> None:
    graph = model(
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        inputs={"x": (F, [2, 64])},
        constants={"w": np.zeros((64, 64), np.float32)},
    )
    path = tmp_path / "g.onnx"
    onnx.save_model(graph, str(path), save_as_external_data=True, location="w.data", size_threshold=0)
    (tmp_path / "w.data").unlink()
    assert check_graph(path) == []
