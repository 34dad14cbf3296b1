"""A graph in bfloat16 is proven on the GPU where ONNX Runtime has one that starts, else by its module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lada_rt.engines.onnxruntime import load_onnxruntime
from lada_rt.errors import EngineError, ExportError
from lada_rt_export import stage_graph
from lada_rt_export.stage_graph import GraphJob, build_graph
from lada_rt_export.stages import ProofCase, StageSpec
from torch import Tensor, nn


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.to(self.linear.weight.dtype)).float()
        return result


def build(folder: Path, log: list[str]) -> dict[str, Any]:
    def draw(rng: torch.Generator) -> list[ProofCase]:
        return [ProofCase("smallest", {"x": torch.randn(2, 8, generator=rng)}, 0)]

    spec = StageSpec(
        "denoiser", Product().eval().requires_grad_(False), {"x": {0: "B"}}, {"y": ("B", 8)}, {"B": (1, 2, 4)}, draw,
        precision="bf16",
    )  # fmt: skip
    return dict(build_graph(GraphJob(spec, folder, 1 << 30, log.append)).proof)


def test_cuda_that_is_listed_but_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without a GPU, or without a library: its session quietly runs on the CPU, which has
    no bfloat16 MatMul."""
    ort = load_onnxruntime()
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("it may start here")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    log: list[str] = []
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        proof = build(tmp_path, log)
    assert 0 < proof["max_rel_error"] <= proof["tolerance"]
    assert proof["method"].startswith("bfloat16 torch module; ONNX Runtime's CPU has no bfloat16 MatMul")
    assert "its GPU did not (denoiser.onnx: ONNX Runtime cannot load it" in proof["method"]
    assert str(tmp_path) not in proof["method"]
    assert any("the module is compared instead" in line for line in log)
    assert (tmp_path / "graphs" / "denoiser.onnx").is_file()


class OnGpu:
    """An engine of ONNX Runtime's CUDA provider."""

    result: Exception | float = 0.0

    def __init__(self, graph: Path, **options: Any) -> None:
        assert options == {"device": "cuda"}

    def run(self, *, x: np.ndarray) -> dict[str, np.ndarray]:
        if isinstance(self.result, Exception):
            raise self.result
        return {"y": np.full_like(x, self.result)}


@pytest.mark.parametrize(
    ("result", "raises"), [(EngineError("out of memory"), None), (1e9, ExportError)], ids=["fails", "is wrong"]
)
def test_a_gpu_that_fails_is_passed_over_and_one_that_is_wrong_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Exception | float, raises: type[Exception] | None
) -> None:
    monkeypatch.setattr(stage_graph, "cuda_available", lambda: True)
    monkeypatch.setattr(stage_graph, "OnnxEngine", OnGpu)
    monkeypatch.setattr(OnGpu, "result", result)
    if raises is None:
        assert "its GPU did not (out of memory)" in build(tmp_path, [])["method"]
        return
    with pytest.raises(raises, match="differs from the float32 module"):
        build(tmp_path, [])
    assert not list((tmp_path / "graphs").iterdir())
