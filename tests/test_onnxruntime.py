"""What ONNX Runtime says where memory is missing, told with its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lada_rt import EngineError
from lada_rt.engines.onnxruntime import OnnxEngine, load_onnxruntime
from onnx import TensorProto, helper


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Zeros, as many as asked for."""
    made = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
        "zeros",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "zeros.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("low_memory", [False, True], ids=["arena", "no arena"])
def test_out_of_memory_is_no_bug_to_report(graph: Path, low_memory: bool) -> None:
    """The two allocators word it differently. The tensor is larger than any address space."""
    engine = OnnxEngine(graph, n_threads=1, low_memory=low_memory)
    with pytest.raises(EngineError) as caught:
        engine.run(shape=np.array([2**46]))
    message = str(caught.value)
    assert message.startswith("backend onnxruntime: the machine is out of memory (")
    assert message.endswith("); lower max_concurrent, generate a shorter segment, or give the process more memory")
    assert engine.run(shape=np.array([3]))["y"].tolist() == [0, 0, 0]


def test_other_failures_are_reported(graph: Path) -> None:
    engine = OnnxEngine(graph, n_threads=1)
    with pytest.raises(EngineError, match=r"the run failed .* report it"):
        engine.run(shape=np.zeros(1, np.float32))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("bad allocation")])
def test_a_graph_that_does_not_fit(graph: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def session(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(load_onnxruntime(), "InferenceSession", session)
    with pytest.raises(EngineError, match=r"zeros\.onnx: no memory to load it \(.*\); close other programs, or give"):
        OnnxEngine(graph, n_threads=1)
