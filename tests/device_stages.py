"""Small networks and exact logits for the tests of the torch backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lada_rt.decode import LatentStats
from lada_rt.engines.torch import TorchEngine
from lada_rt.geometry import CodecGeometry
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAE, MelVAEConfig
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from lada_rt_export.torch_stages import part_engine, stage_parts
from torch import Tensor, nn

CPU = torch.device("cpu")
VOCAB, MASK = 300, 300
#: windows of 64 codes: 32 latent frames, 256 mel frames
GEOMETRY = CodecGeometry(window_codes=64, hop_codes=48)
QUANTISER = VQConfig(dim=32, codebook_size=VOCAB, codebook_dim=8)
DENOISER = MaskPredictorConfig(
    hidden_size=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    intermediate_size=24,
    n_vocal_codes=VOCAB,
    n_codes=VOCAB,
    condition_size=8,
)
STATS = LatentStats(
    np.linspace(-0.5, 0.5, 32 * 32, dtype=np.float32).reshape(32, 32),
    np.linspace(0.5, 2.0, 32 * 32, dtype=np.float32).reshape(32, 32),
)


def small_modules() -> dict[str, nn.Module]:
    """Every network of the device path at the test's geometry, random weights from one seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    modules: dict[str, nn.Module] = {
        "denoiser": DenoiserStage(MaskPredictor(DENOISER), max_positions=512),
        "flow": FlowStage(
            Flow(FlowConfig(n_layers=2, n_heads=2, head_dim=16, latent_frames=32)),
            VQ(QUANTISER),
            condition_linear(QUANTISER),
        ),
        "mel_decoder": MelDecoderStage(MelVAE(MelVAEConfig(channels=8, multiples=(1, 1, 1, 2), norm_groups=4))),
        "vocoder": VocoderStage(Vocoder(VocoderConfig(initial_channels=32))),
    }
    torch.random.set_rng_state(state)
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}


OUTPUTS = {"denoiser": ("logits",), "flow": ("velocity",), "mel_decoder": ("mel",), "vocoder": ("waveform",)}


def engines_of(modules: dict[str, nn.Module], precision: str = "fp32", device: torch.device = CPU) -> dict[str, Any]:
    parts = [
        part
        for name, module in modules.items()
        for part in stage_parts(name, module, OUTPUTS[name], precision=precision, device=device)
    ]
    return {part.name: part_engine(part, device) for part in parts}


def whole_engines(modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {name: TorchEngine(module, OUTPUTS[name], CPU) for name, module in modules.items()}


def exact_logits(vocal_codes: Tensor, codes: Tensor, prefix: Tensor, rows: Tensor) -> Tensor:
    """Logits made of small integers: the same bits on every device, row by row, with many ties."""
    known = (codes * (codes < VOCAB)).sum() % 9973
    shift = (prefix.sum() * 8).to(torch.int64)
    ids = torch.arange(VOCAB, device=rows.device)
    base = (vocal_codes[0][rows] * 31 + rows * 17 + known * 5 + shift)[:, None]
    return ((base + ids * (rows[:, None] * 7 + 13) + ids * ids) % 97).to(torch.float32) / 8


def exact_engine(device: torch.device = CPU) -> TorchEngine:
    return TorchEngine(exact_logits, ["logits"], device)


def song(n_frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, n_frames), rng.integers(-8, 9, (2, 8)).astype(np.float32) / 8
