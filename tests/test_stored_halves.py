"""Weights stored in half precision: fewer bytes, the same results, and the same weights again for TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from lada_rt_export.stored_halves import restore_floats, store_halves
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(5)
ROUNDED = RNG.standard_normal((64, 64)).astype(np.float16).astype(np.float32)
FINE = RNG.standard_normal((64, 64)).astype(np.float32)
TOO_LARGE = np.full((64, 64), 1e6, np.float32)
FEW = np.ones((64,), np.float32)
WEIGHTS = {"rounded": ROUNDED, "fine": FINE, "too_large": TOO_LARGE, "few": FEW}


def products() -> onnx.ModelProto:
    """x times each weight, one result each; `rounded` is used twice."""
    nodes = [
        helper.make_node("MatMul", ["x", "rounded"], ["a"]),
        helper.make_node("MatMul", ["a", "rounded"], ["b"]),
        helper.make_node("MatMul", ["x", "fine"], ["c"]),
        helper.make_node("MatMul", ["x", "too_large"], ["d"]),
        helper.make_node("Add", ["x", "few"], ["e"]),
    ]
    row = [2, 64]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, row)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, row) for name in "bcde"],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def halved() -> onnx.ModelProto:
    model = ir.from_proto(products())
    assert store_halves(model) == 1
    return ir.to_proto(model)


def run(model: onnx.ModelProto | Path) -> list[np.ndarray]:
    data = str(model) if isinstance(model, Path) else model.SerializeToString()
    x = np.random.default_rng(6).standard_normal((2, 64)).astype(np.float32)
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def dtypes(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_only_weights_that_lose_no_bit_are_stored_in_half() -> None:
    model = halved()
    onnx.checker.check_model(model, full_check=True)
    found = dtypes(model)
    assert found.pop("rounded.half") == TensorProto.FLOAT16
    assert found == dict.fromkeys(("fine", "too_large", "few"), TensorProto.FLOAT)
    assert products().ByteSize() - model.ByteSize() > 64 * 64 * 2 - 300
    for want, got in zip(run(products()), run(model), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("beside", [False, True], ids=["inline", "data file"])
def test_restoring_gives_the_first_weights_and_no_casts(tmp_path: Path, beside: bool) -> None:
    graph = tmp_path / "stage.onnx"
    onnx.save(halved(), str(graph), save_as_external_data=beside, location="stage.data", size_threshold=1024)
    (tmp_path / "there").mkdir()
    target = restore_floats(graph, tmp_path / "there" / "stage.onnx")
    assert target.parent.name == "there"
    assert (target.parent / "stage.data").exists() == beside
    model = onnx.load(str(target))
    assert all(node.op_type != "Cast" for node in model.graph.node)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert set(weights) == set(WEIGHTS)
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(weights[name], array)
    for want, got in zip(run(products()), run(target), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_graph_without_halves_is_left_where_it_is(tmp_path: Path) -> None:
    graph = tmp_path / "stage.onnx"
    onnx.save(products(), str(graph))
    assert restore_floats(graph, tmp_path / "other.onnx") == graph
    assert not (tmp_path / "other.onnx").exists()
