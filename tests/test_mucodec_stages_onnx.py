"""The MuCodec stages as ONNX graphs: same results as the modules, dynamic batch, only operators both engines take."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from dataclasses import dataclass

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lada_rt_export.models import flow, mel_vae, muq, vocoder, vq
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.onnx_check import operators
from torch import Tensor, nn

FRAMES = 8
RESULTS = {"encoder": "codes", "flow": "velocity", "mel_decoder": "mel", "vocoder": "waveform"}


def encoder() -> nn.Module:
    config = muq.MuQConfig(conv_dim=4, dim=16, n_heads=2, n_layers=2, ffn_dim=32)
    return EncoderStage(muq.MuQ(config), vq.VQ(vq.VQConfig(dim=16, codebook_size=30, codebook_dim=8)))


def encoder_inputs(batch: int, size: int) -> dict[str, Tensor]:
    return {"audio": 0.1 * torch.randn(batch, 2, 4800 + 1920 * size + 7)}


def flow_stage() -> nn.Module:
    config = vq.VQConfig(dim=16, codebook_size=30, codebook_dim=8)
    estimator = flow.Flow(flow.FlowConfig(n_layers=2, n_heads=2, head_dim=8, latent_frames=FRAMES))
    return FlowStage(estimator, vq.VQ(config), vq.condition_linear(config))


def flow_inputs(batch: int, _size: int) -> dict[str, Tensor]:
    x, context = torch.randn(2, batch, 32, FRAMES, 32)
    codes = torch.randint(30, (batch, 2 * FRAMES))
    return {
        "x": x,
        "context": context,
        "codes": codes,
        "conditional": torch.arange(batch) % 2.0,
        "t": torch.linspace(0, 0.95, batch),
    }


def mel_decoder() -> nn.Module:
    # 256 grid positions in blocks of 100 queries: two full ones and a remainder
    config = mel_vae.MelVAEConfig(channels=8, multiples=(1, 2), n_res_blocks=1, norm_groups=4, attention_block=100)
    return MelDecoderStage(mel_vae.MelVAE(config))


def mel_decoder_inputs(batch: int, _size: int) -> dict[str, Tensor]:
    return {"latents": torch.randn(batch, 16, FRAMES, 32)}


def vocoder_stage() -> nn.Module:
    config = vocoder.VocoderConfig(initial_channels=32, resblock_kernels=(3, 7), dilations=((1, 3), (1, 3)))
    return VocoderStage(vocoder.Vocoder(config))


def vocoder_inputs(batch: int, size: int) -> dict[str, Tensor]:
    return {"mel": torch.randn(batch, 256, 3 + size)}


#: stage -> (module, inputs for a batch and a size, axes beside the batch that vary)
STAGES = {
    "encoder": (encoder, encoder_inputs, {"audio": 2}),
    "flow": (flow_stage, flow_inputs, {}),
    "mel_decoder": (mel_decoder, mel_decoder_inputs, {}),
    "vocoder": (vocoder_stage, vocoder_inputs, {"mel": 2}),
}


@dataclass
class Exported:
    name: str
    module: nn.Module
    graph: onnx.ModelProto
    session: ort.InferenceSession

    def ops(self) -> Counter[str]:
        bodies = [self.graph.graph, *self.graph.functions]
        return Counter(node.op_type for body in bodies for node in body.node)


@pytest.fixture(scope="module", params=sorted(STAGES))
def exported(request: pytest.FixtureRequest) -> Exported:
    name: str = request.param
    build, inputs, varying = STAGES[name]
    torch.manual_seed(7)
    module, example = build(), inputs(2, 3)
    dynamic = torch.export.Dim.DYNAMIC
    axes = {key: {0: dynamic} | ({varying[key]: dynamic} if key in varying else {}) for key in example}
    program = torch.onnx.export(
        module,
        kwargs=example,
        dynamo=True,
        opset_version=23,
        input_names=list(example),
        output_names=[RESULTS[name]],
        dynamic_shapes=axes,
        verbose=False,
    )
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Exported(name, module, program.model_proto, session)


def test_graph_names_are_the_interface(exported: Exported) -> None:
    arguments = list(inspect.signature(exported.module.forward).parameters)
    assert [i.name for i in exported.session.get_inputs()] == arguments
    assert [o.name for o in exported.session.get_outputs()] == [RESULTS[exported.name]]


@pytest.mark.parametrize(("batch", "size"), [(1, 0), (2, 3), (3, 11)])
def test_graph_equals_the_module(exported: Exported, batch: int, size: int) -> None:
    torch.manual_seed(10 * batch + size)
    inputs = STAGES[exported.name][1](batch, size)
    want = exported.module(**inputs).numpy()
    (got,) = exported.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert got.dtype == want.dtype
    if exported.name == "encoder":
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_graph_uses_operators_every_backend_takes(exported: Exported) -> None:
    supported = set(operators())
    ops = exported.ops()
    assert set(ops) <= supported, sorted(set(ops) - supported)
    attention = {"encoder": 2, "flow": 2, "mel_decoder": 3, "vocoder": 0}
    assert ops["Attention"] == attention[exported.name]
    assert not {"Softmax", "STFT", "DFT", "GroupNormalization"} & ops.keys()


def test_interface_shapes() -> None:
    """Lengths of the contract: one code per 1920 samples, eight mel frames per latent, 480 F + 16 samples."""
    audio = 0.1 * torch.randn(1, 2, 1920 * 5 + 480)
    assert encoder()(audio).shape == (1, 5)
    assert encoder()(audio).dtype == torch.int64
    released = MelDecoderStage(
        mel_vae.MelVAE(mel_vae.MelVAEConfig(channels=4, multiples=(1, 1, 1, 1), n_res_blocks=1, norm_groups=4))
    )
    assert released(torch.randn(2, 16, 3, 32)).shape == (2, 256, 24)
    assert vocoder_stage()(torch.randn(2, 256, 5)).shape == (2, 480 * 5 + 16)
