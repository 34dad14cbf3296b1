"""What TensorRT's parser is handed in place of a bundle's own graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import BundleError
from lada_rt_export.tensorrt_builder import _parsed_graph
from onnx import helper

MARK = helper.make_attribute("TRT_decomposable", 1)


@pytest.mark.parametrize("stage", ["flow", "mel_decoder", "vocoder"])  # weights beside the graph, inside, no attention
def test_only_the_parser_sees_attention_that_may_be_decomposed(stage: str) -> None:
    bundle = Bundle.open(demo_bundle_path())
    graph = bundle.file_path(bundle.stages[stage].graph)
    before = onnx.load(str(graph), load_external_data=False)
    given = onnx.load_from_string(_parsed_graph(graph))
    marked = [node for node in given.graph.node if MARK in node.attribute]
    assert len(marked) == sum(node.op_type == "Attention" for node in before.graph.node)
    assert bool(marked) == (stage != "vocoder")
    for node in marked:
        node.attribute.remove(MARK)
    assert given == before
    bundle.verify()


def test_onnx_runtime_refuses_the_mark(tmp_path: Path) -> None:
    """Which is why bundles are without it."""
    graph = tmp_path / "text_encoder.onnx"
    graph.write_bytes(_parsed_graph(demo_bundle_path() / "graphs" / graph.name))
    with pytest.raises(BundleError, match="INVALID_GRAPH"):
        OnnxEngine(graph)
