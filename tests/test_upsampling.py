"""The vocoder's transposed convolution: right in every call on the CPU, one ConvTranspose in the graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lada_rt_export.models.vocoder import Upsampling, Vocoder, VocoderConfig

#: largest error over largest value; measured 5e-7 at most in float32, 5e-3 in bfloat16
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("rate", "kernel"), list(zip(VocoderConfig().rates, VocoderConfig().kernels, strict=True)))
def test_equals_float64_in_every_call(rate: int, kernel: int, dtype: torch.dtype) -> None:
    """Many calls: oneDNN's own is wrong in one of three, at kernel 10 and rate 5."""
    torch.manual_seed(rate + kernel)
    layer = Upsampling(240, 120, kernel, rate, padding=(kernel - rate) // 2).requires_grad_(False).to(dtype)
    for length in (1, 2, 288):
        x = torch.randn(2, 240, length).to(dtype)
        bias = layer.bias
        assert bias is not None
        wanted = F.conv_transpose1d(x.double(), layer.weight.double(), bias.double(), rate, (kernel - rate) // 2)
        for _ in range(10):
            found = layer(x)
            assert found.dtype == dtype
            assert found.shape == wanted.shape
            assert (found.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


def test_the_graph_keeps_the_operator() -> None:
    """TensorRT and ONNX Runtime have kernels for it; the product and sum are for torch on the CPU alone."""
    model = Vocoder(VocoderConfig(initial_channels=32, resblock_kernels=(3,), dilations=((1,),)))
    example = (torch.randn(2, 256, 5),)
    program = torch.onnx.export(model, example, dynamo=True, opset_version=23, optimize=False, verify=False)
    assert program is not None
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("ConvTranspose") == len(VocoderConfig().rates)
    assert "Col2Im" not in operators
