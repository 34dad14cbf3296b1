"""Precision of each stage, the graph that is exported, and its proof against the float32 module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lada_rt.bench.difference import relative_error
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import ExportError, ParamError
from lada_rt_export import stage_graph, stages
from lada_rt_export.proof import ModuleEngine, module_results, prove, reference
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.stage_graph import GraphJob, build_graph
from lada_rt_export.stages import stage_precisions, stage_spec
from lada_rt_export.synthetic_release import write_synthetic_release
from lada_rt_export.to_onnx import write_graph


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ReleaseSource:
    release = write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", 7)
    return ReleaseSource(Release.locate(release.checkpoint, release.pretrained_root))


def test_the_precision_of_each_stage() -> None:
    assert set(stage_precisions("fp32").values()) == {"fp32"}
    half = stage_precisions("bf16")
    assert {name for name, precision in half.items() if precision == "bf16"} == {"denoiser", "flow"}
    assert stage_precisions("bf16,vocoder=fp16,flow=fp32") == half | {"vocoder": "fp16", "flow": "fp32"}
    with pytest.raises(ParamError):
        stage_precisions("fp16,ref_encoder=fp16")


def test_half_precision_must_not_be_heard(source: ReleaseSource) -> None:
    """-60 dB for what makes the sound, more for what is sampled from or integrated."""
    allowed = {
        (name, precision): stage_spec(name, source.module(name), source.sizes, precision).tolerance
        for name, precision in [("vocoder", "fp16"), ("mel_decoder", "bf16"), ("vocoder", "fp32"), ("flow", "fp16")]
    }
    assert list(allowed.values()) == [1e-3, 1e-3, 1e-4, 1e-2]


@pytest.mark.parametrize(
    ("stage", "precision", "words"),
    [("denoiser", "fp16", "graph in ONNX Runtime"), ("denoiser", "bf16", "torch module"), ("flow", "fp16", "graph in")],
)
def test_half_precision_is_proven_against_the_float32_module(
    source: ReleaseSource, tmp_path: Path, stage: str, precision: str, words: str
) -> None:
    spec = stage_spec(stage, source.module(stage), source.sizes, precision)
    entry = build_graph(GraphJob(spec, tmp_path, 8 << 30, lambda line: None))
    assert entry.precision == precision
    assert words in entry.proof["method"]
    # rounding shows, and stays in bounds
    assert 1e-5 < entry.proof["max_rel_error"] <= entry.proof["tolerance"] == stages.TOLERANCES[precision]
    model = onnx.load(tmp_path / entry.graph.path)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    attention = [types[name] for node in model.graph.node if node.op_type == "Attention" for name in node.input]
    assert set(attention) == {wanted}
    assert all(v.type.tensor_type.elem_type != wanted for v in (*model.graph.input, *model.graph.output))


def test_a_graph_over_tolerance_is_not_kept(
    source: ReleaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = stage_spec("text_encoder", source.module("text_encoder"), source.sizes)
    monkeypatch.setattr(stages, "TOLERANCES", {"fp32": 1e-12})
    with pytest.raises(ExportError, match=r"text_encoder: feature of the smallest size .* differs .* allowed 1e-12"):
        build_graph(GraphJob(spec, tmp_path, 8 << 30, lambda line: None))
    assert not list((tmp_path / "graphs").iterdir())


def test_errors_are_relative_and_what_is_no_number_is_infinite() -> None:
    wanted = np.array([[1.0, -4.0]], np.float32)
    assert relative_error(wanted + np.float32(0.5), wanted) == pytest.approx(0.125)
    assert relative_error(wanted * np.nan, wanted) == float("inf")
    assert relative_error(wanted[0], wanted) == float("inf")
    assert relative_error(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == 0.25


def test_sizes_beyond_the_memory_are_left_out_and_named(source: ReleaseSource) -> None:
    spec = stage_spec("ref_encoder", source.module("ref_encoder"), source.sizes)
    expected = reference(spec, 500 << 20)
    assert [case.size for case in expected.cases] == ["smallest", "typical"]
    proof = prove(spec, expected, ModuleEngine(spec, spec.module), "itself")
    assert proof["max_rel_error"] == 0
    assert list(proof["left_out_for_memory"]) == ["largest"]


def test_the_reference_encoder_is_judged_by_mean_and_feature(source: ReleaseSource) -> None:
    """A sum over thousands of frames would hide what happened to the last chunk's mean."""
    spec = stage_spec("ref_encoder", source.module("ref_encoder"), source.sizes)
    results = {
        "frame_sum_out": np.full((1, 4), 1000.0, np.float32),
        "frame_count_out": np.full(1, 500.0, np.float32),
        "feature": np.zeros((1, 3), np.float32),
    }
    compared = spec.compare(results)
    assert set(compared) == {"mean_frame", "feature"}
    assert (compared["mean_frame"] == 2).all()


def test_large_weights_lie_beside_the_graph_in_the_same_bytes(
    source: ReleaseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_graph, "EXTERNAL_DATA_BYTES", 1 << 16)
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        spec = stage_spec("denoiser", source.module("denoiser"), source.sizes)
        entry = build_graph(GraphJob(spec, folder, 8 << 30, lambda line: None))
        assert [Path(f.path).name for f in entry.files] == ["denoiser.onnx", "denoiser.data"]
        assert entry.external_data[0].bytes > 10 * entry.graph.bytes
        digests.append([f.sha256 for f in entry.files])
    assert digests[0] == digests[1]
    inputs = {name: tensor.numpy() for name, tensor in spec.cases()[0].inputs.items()}
    found = OnnxEngine(folder / entry.graph.path).run(**inputs)
    with torch.inference_mode():
        wanted = spec.module(**spec.cases()[0].inputs).numpy()
    assert relative_error(found["logits"], wanted) < 1e-5


def test_encoder_proof_meets_many_codes(source: ReleaseSource) -> None:
    """A proof on which every frame has one code would prove nothing."""
    spec = stage_spec("encoder", source.module("encoder"), source.sizes)
    case = spec.cases()[0]
    with torch.inference_mode():
        codes = spec.module(**case.inputs)
    assert len(codes.unique()) > 10


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every bfloat16 widened, which ONNX Runtime can run on the CPU."""
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    del widened.graph.value_info[:]
    tensors = [*widened.graph.initializer, *(a.t for n in widened.graph.node for a in n.attribute if a.HasField("t"))]
    for tensor in (t for t in tensors if t.data_type == narrow):
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in widened.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    return widened


@pytest.mark.parametrize("stage", ["denoiser", "flow", "vocoder"])
def test_a_bfloat16_graph_is_its_module(source: ReleaseSource, tmp_path: Path, stage: str) -> None:
    """No CPU runs the graph, so its proof runs the module; widened, both have the same weights and must agree."""
    spec = stage_spec(stage, source.module(stage), source.sizes, "bf16")
    case = spec.cases()[0]
    module = spec.module.to(torch.bfloat16)
    graph, *_ = write_graph(spec, module, case.inputs, tmp_path / f"{stage}.onnx")
    model = onnx.load(graph)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    onnx.save(in_float32(model), tmp_path / "widened.onnx")
    found = OnnxEngine(tmp_path / "widened.onnx").run(**{name: t.numpy() for name, t in case.inputs.items()})
    for name, wanted in module_results(spec, module.float(), case).items():
        assert relative_error(found[name], wanted) < 1e-5
