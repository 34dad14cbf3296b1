"""What bench/gpu_check.py measures: networks of a size with random weights, their work, their lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lada_rt.geometry import CodecGeometry
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAE, MelVAEConfig
from lada_rt_export.models.muq import MuQ, MuQConfig
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from lada_rt_export.stages import StageSizes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["FULL", "OUTPUTS", "TINY", "Size", "flops", "make_stage", "stage_sizes"]

OUTPUTS = {
    "encoder": ("codes",),
    "denoiser": ("logits",),
    "flow": ("velocity",),
    "mel_decoder": ("mel",),
    "vocoder": ("waveform",),
}
PREFIX_SLOTS = 2


@dataclass(frozen=True)
class Size:
    """Networks, geometry and the lengths to measure at."""

    denoiser: MaskPredictorConfig
    muq: MuQConfig
    quantiser: VQConfig
    flow: FlowConfig
    mel: MelVAEConfig
    vocoder: VocoderConfig
    geometry: CodecGeometry = field(default_factory=CodecGeometry)
    seconds: tuple[float, ...] = (30.0, 163.84, 240.0)
    steps: tuple[int, ...] = (20, 60)
    flow_steps: int = 20
    #: edge of the square product that measures the ceiling
    matmul: int = 8192
    copy_bytes: int = 4 << 30
    #: frames of the vocoder's comparison, and of one chunk of the public code
    vocoder_frames: int = 1024
    repeat: int = 5

    @property
    def n_frames(self) -> int:
        """Codes of the song that single stages are measured at: the middle length."""
        return self.geometry.n_codes(round(self.seconds[1] * self.geometry.sample_rate_hz))


FULL = Size(MaskPredictorConfig(), MuQConfig(), VQConfig(), FlowConfig(), MelVAEConfig(), VocoderConfig())
TINY = Size(
    denoiser=MaskPredictorConfig(
        hidden_size=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        intermediate_size=24,
        n_vocal_codes=300,
        n_codes=300,
        condition_size=8,
    ),
    muq=MuQConfig(conv_dim=4, dim=32, n_layers=1, n_heads=2, ffn_dim=32),
    quantiser=VQConfig(dim=32, codebook_size=300, codebook_dim=8),
    flow=FlowConfig(n_layers=2, n_heads=2, head_dim=16, latent_frames=8),
    mel=MelVAEConfig(channels=4, multiples=(1, 1, 1, 2), n_res_blocks=1, norm_groups=2),
    vocoder=VocoderConfig(initial_channels=32, resblock_kernels=(3, 5), dilations=((1, 3),) * 2),
    geometry=CodecGeometry(
        window_codes=16, hop_codes=12, encode_window_samples=16 * 1920 + 480, encode_window_codes=16
    ),
    seconds=(0.5, 1.2, 1.5),
    steps=(2, 3),
    flow_steps=2,
    matmul=64,
    copy_bytes=1 << 20,
    vocoder_frames=16,
    repeat=1,
)


def stage_sizes(size: Size) -> StageSizes:
    """What the exporter's table of stages reads from a bundle."""
    return StageSizes(
        size.geometry,
        vocab_size=size.quantiser.codebook_size,
        mask_id=size.denoiser.mask_id,
        feature_size=size.denoiser.condition_size,
        ref_hidden_size=768,
        ref_chunk_samples=1_440_000,
        text_vocab_size=250_002,
        max_frames=9001,
    )


def make_stage(name: str, size: Size, device: torch.device, seed: int = 1) -> nn.Module:
    """A float32 stage with random weights, made on the device, in eval mode.

    torch's own initial weights keep transformers' activations near one; the vocoder's would fade to silence through
    its depth, so its convolutions are scaled to keep the variance.
    """
    torch.manual_seed(seed)
    makers: dict[str, Callable[[], nn.Module]] = {
        "encoder": lambda: EncoderStage(MuQ(size.muq).eval(), VQ(size.quantiser)),
        "denoiser": lambda: DenoiserStage(MaskPredictor(size.denoiser)),
        "flow": lambda: FlowStage(Flow(size.flow), VQ(size.quantiser), condition_linear(size.quantiser)),
        "mel_decoder": lambda: MelDecoderStage(MelVAE(size.mel)),
        "vocoder": lambda: VocoderStage(Vocoder(size.vocoder)),
    }
    with torch.device(device):
        stage = makers[name]()
    if isinstance(stage, VocoderStage):
        _keep_variance(stage)
    if isinstance(stage, DenoiserStage):
        # a spread of logits like that of a trained model: a nucleus of some hundred tokens
        stage.mask_predictor.to_logits.weight.data *= 5
    return stage.eval().requires_grad_(False)


def _keep_variance(stage: VocoderStage) -> None:
    for name, module in stage.named_modules():
        if isinstance(module, nn.Conv1d):
            gain = 0.05 if name.endswith("conv_post") else 0.7
            fan_in = module.in_channels * module.kernel_size[0]
            module.weight.data.normal_(0, gain * fan_in**-0.5)
        elif isinstance(module, nn.ConvTranspose1d):
            taps = module.kernel_size[0] / module.stride[0]
            module.weight.data.normal_(0, (module.in_channels * taps) ** -0.5)


def flops(name: str, size: Size, *, n_frames: int = 0, n_rows: int = 0, batch: int = 1, mel_frames: int = 0) -> int:
    """Floating-point operations of one call of a stage, two for each multiply-add, counted on shapes alone.

    Args:
        name: of the stage.
        n_frames, n_rows: of the denoiser.
        batch: rows of flow, mel decoder, vocoder.
        mel_frames: of the vocoder.
    """
    meta = torch.device("meta")
    stage = _META.setdefault((name, id(size)), make_stage(name, size, meta))
    g = size.geometry
    latents = (batch, g.latent_channels, g.window_latents, g.latent_bins)

    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=meta)

    def reals(*shape: int) -> Tensor:
        return torch.empty(shape, device=meta)

    inputs: dict[str, Tensor]
    if name == "denoiser":
        prefix = reals(1, PREFIX_SLOTS, size.denoiser.condition_size)
        inputs = {"vocal_codes": ids(1, n_frames), "codes": ids(1, n_frames), "prefix": prefix, "rows": ids(n_rows)}
    elif name == "flow":
        inputs = {"x": reals(*latents), "context": reals(*latents), "codes": ids(batch, g.window_codes)}
        inputs |= {"conditional": reals(batch), "t": reals(batch)}
    elif name == "mel_decoder":
        inputs = {"latents": reals(batch, g.latent_channels // 2, g.window_latents, g.latent_bins)}
    else:
        inputs = {"mel": reals(batch, g.mel_bins, mel_frames)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage(**inputs)
    return int(counter.get_total_flops())


_META: dict[tuple[str, int], nn.Module] = {}
