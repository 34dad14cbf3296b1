"""Graphs for ONNX Runtime on CPUs: which attention is replaced, that the result stays, and that bundles carry them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lada_rt import engines
from lada_rt.bundle import Bundle, StageEntry, demo_bundle_path, parse_stage
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import BundleError, ExportError
from lada_rt.geometry import CodecGeometry
from lada_rt_export import stage_graph
from lada_rt_export.cpu_graph import with_tiled_attention, write_cpu_graph
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.stages_mucodec import FlowStage
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from lada_rt_export.stage_graph import GraphJob, build_graph
from lada_rt_export.stages import StageSizes, StageSpec, stage_spec
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH = 70, 8


def attention_graph(
    *,
    heads: int = 3,
    mask: bool = False,
    read_scores: bool = False,
    perm: tuple[int, ...] = (0, 2, 1, 3),
    **options: Any,
) -> onnx.ModelProto:
    """q, k, v [B, TOKENS, heads * WIDTH] split into heads, attended to, joined."""
    nodes, constants = [], {"split": [-1, TOKENS, heads, WIDTH], "join": [-1, TOKENS, heads * WIDTH]}
    for name in "qkv":
        nodes += [
            helper.make_node("Reshape", [name, "split"], [f"{name}_split"]),
            helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=perm),
        ]
    inputs = [f"{name}_heads" for name in "qkv"] + (["mask"] if mask else [])
    nodes += [
        helper.make_node("Attention", inputs, ["attended"], **options),
        helper.make_node("Transpose", ["attended"], ["swapped"], perm=perm),
        helper.make_node("Reshape", ["swapped", "join"], ["out"]),
    ]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", TOKENS, heads * WIDTH]) for name in "qkv"] + (
        [helper.make_tensor_value_info("mask", TensorProto.FLOAT, [TOKENS, TOKENS])] if mask else []
    )
    made = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", TOKENS, heads * WIDTH])]
    if read_scores:
        made.append(helper.make_tensor_value_info("attended", TensorProto.FLOAT, ["B", heads, TOKENS, WIDTH]))
    stored = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "attention", given, made, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["out"], feeds)[0])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"is_causal": 0}], ids=["plain", "scale", "not causal"])
def test_attention_between_head_transposes_is_replaced_and_gives_the_same(heads: int, options: dict[str, Any]) -> None:
    model = attention_graph(heads=heads, **options)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, TOKENS, heads * WIDTH)).astype(np.float32) for name in "qkv"}
    expected = run(model, feeds)
    assert with_tiled_attention(model) == 1
    assert [node.op_type for node in model.graph.node] == ["MultiHeadAttention"]
    assert not model.graph.initializer
    onnx.checker.check_model(model, full_check=False)
    np.testing.assert_allclose(run(model, feeds), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [{"mask": True}, {"is_causal": 1}, {"softcap": 5.0}, {"read_scores": True}, {"perm": (2, 0, 1, 3)}],
    ids=lambda form: next(iter(form)),
)
def test_attention_of_another_form_is_left_alone(form: dict[str, Any]) -> None:
    model = attention_graph(**form)
    before = model.SerializeToString(deterministic=True)
    assert with_tiled_attention(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_a_value_that_another_node_reads_stays() -> None:
    model = attention_graph()
    model.graph.node.append(helper.make_node("Identity", ["q_heads"], ["kept"]))
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, ["B", 3, TOKENS, WIDTH]))
    assert with_tiled_attention(model) == 1
    assert sorted(n.op_type for n in model.graph.node) == ["Identity", "MultiHeadAttention", "Reshape", "Transpose"]
    onnx.checker.check_model(model, full_check=False)


def test_nothing_is_written_for_a_graph_without_such_attention(tmp_path: Path) -> None:
    onnx.save(attention_graph(mask=True), str(tmp_path / "a.onnx"))
    assert not write_cpu_graph(tmp_path / "a.onnx", tmp_path / "a.cpu.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def flow_spec(precision: str = "fp32") -> StageSpec:
    """The smallest flow on a window of 64 latents."""
    torch.manual_seed(5)
    codec = VQConfig(dim=16, codebook_size=30, codebook_dim=8)
    estimator = Flow(FlowConfig(n_layers=2, n_heads=2, head_dim=8, time_features=16, latent_frames=64))
    stage = FlowStage(estimator, VQ(codec), condition_linear(codec)).eval().requires_grad_(False)
    geometry = CodecGeometry(
        encode_window_samples=128 * 1920 + 480, encode_window_codes=128, window_codes=128, hop_codes=96
    )
    return stage_spec("flow", stage, StageSizes(geometry, 30, 30, 8, 8, 1000, 261, 751), precision)


def job(folder: Path, precision: str = "fp32") -> GraphJob:
    return GraphJob(flow_spec(precision), folder, 1 << 30, lambda line: None)


def test_the_flow_has_a_proven_graph_for_cpus_over_the_same_weights(tmp_path: Path) -> None:
    entry = build_graph(job(tmp_path))
    assert entry.cpu_graph is not None
    assert entry.cpu_graph.path == "graphs/flow.cpu.onnx"
    assert (tmp_path / entry.cpu_graph.path).stat().st_size < 60_000
    assert len(entry.files) == 3
    assert 0 < entry.proof["cpu_graph"]["max_rel_error"] <= entry.proof["tolerance"]
    model = onnx.load(str(tmp_path / entry.cpu_graph.path), load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("MultiHeadAttention") == 2
    assert "Attention" not in operators
    inputs = {name: tensor.numpy() for name, tensor in flow_spec().cases()[-1].inputs.items()}
    found, expected = (
        OnnxEngine(tmp_path / file.path, n_threads=1).run(**inputs)["velocity"]
        for file in (entry.cpu_graph, entry.graph)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert parse_stage("flow", entry.to_json()) == entry


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build_graph(job(tmp_path / name)) for name in "ab")
    assert first.cpu_graph == second.cpu_graph
    assert first.external_data == second.external_data


def test_a_graph_for_cpus_that_misses_its_tolerance_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Path, target: Path) -> bool:
        model = onnx.load(str(graph), load_external_data=False)
        with_tiled_attention(model)
        for node in model.graph.node:
            if node.op_type == "MultiHeadAttention":
                node.attribute.append(helper.make_attribute("scale", 0.01))
        target.write_bytes(model.SerializeToString())
        return True

    monkeypatch.setattr(stage_graph, "write_cpu_graph", wrong)
    with pytest.raises(ExportError, match=r"flow: velocity .* differs"):
        build_graph(job(tmp_path))
    assert not list((tmp_path / "graphs").iterdir())


def test_half_precision_has_no_graph_for_cpus(tmp_path: Path) -> None:
    entry = build_graph(job(tmp_path, "bf16"))
    assert entry.cpu_graph is None
    assert not entry.external_data


class _Opened:
    """Stands for an engine: which file it was opened with."""

    def __init__(self, graph: Path, **options: Any) -> None:
        self.graph, self.options = graph, options


@pytest.mark.parametrize(
    ("device", "with_cpu", "expected"),
    [
        ("cpu", True, "flow.cpu.onnx"),
        ("cuda", True, "flow.onnx"),
        ("cpu", False, "flow.onnx"),
    ],
)
def test_only_cpus_run_it_and_bundles_without_it_work(
    device: str, with_cpu: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(demo_bundle_path())
    entry: StageEntry = dataclasses.replace(bundle.stages["flow"], cpu_graph=None)
    if with_cpu:
        cpu_graph = dataclasses.replace(entry.graph, path="graphs/flow.cpu.onnx")
        entry = dataclasses.replace(entry, cpu_graph=cpu_graph)
    bundle = dataclasses.replace(bundle, stages={**bundle.stages, "flow": entry})
    monkeypatch.setattr("lada_rt.engines.onnxruntime.OnnxEngine", _Opened)
    loaded, _, _ = engines.load_engines(bundle, backend="onnxruntime", device=device)
    opened = loaded["flow"]
    assert isinstance(opened, _Opened)
    assert opened.graph.name == expected


def test_an_altered_graph_for_cpus_is_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_bundle_path(), tmp_path / "demo.bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "graphs" / "flow.onnx").read_bytes()
    (folder / "graphs" / "flow.cpu.onnx").write_bytes(data)
    manifest["stages"]["flow"]["cpu_graph"] = {
        "path": "graphs/flow.cpu.onnx",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(folder)
    bundle.verify()
    (folder / "graphs" / "flow.cpu.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"flow\.cpu\.onnx: expected sha256"):
        bundle.verify()
