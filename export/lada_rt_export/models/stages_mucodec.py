"""The MuCodec stages: modules whose forward arguments and results are the engine interface.

Inputs and outputs are float32 or int64 whatever the weights are, so a caller never converts. Argument names
are the input names of the exported graph; `stages` names the results.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.flow import Flow
from lada_rt_export.models.mel_vae import MelVAE
from lada_rt_export.models.mucodec_common import Float32Buffers
from lada_rt_export.models.muq import MuQ, resample_kernel, resample_to_24k
from lada_rt_export.models.vocoder import Vocoder
from lada_rt_export.models.vq import VQ, condition_grid, fold_condition

__all__ = ["EncoderStage", "FlowStage", "MelDecoderStage", "VocoderStage"]


class EncoderStage(Float32Buffers):
    """Audio to codes, float32 throughout. Source: mucodec spec 2.3 to 2.8.

    The reference's second limiter (2.3) is left out: after the preparation of 2.1 no sample reaches its
    threshold.

    Args:
        muq: encoder whose last hidden state is the quantised one: as many layers as the layer index,
            no closing norm.
        vq: quantiser with `dim` equal to the encoder's.
        kernel: the stored resampling kernel [1, 1, 28], else the formula's.

    Raises:
        ParamError: the widths of encoder and quantiser differ.
    """

    kernel: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    directions: Tensor

    def __init__(self, muq: MuQ, vq: VQ, kernel: Tensor | None = None) -> None:
        super().__init__()
        if muq.config.dim != vq.config.dim:
            raise ParamError(
                f"encoder and quantiser must have one width, got {muq.config.dim} and {vq.config.dim}; "
                "take both from one codec"
            )
        self.muq = muq
        taps = resample_kernel() if kernel is None else kernel.float()
        # averaging the channels is linear: half the filter on each of them is the filtered mean
        self.register_buffer("kernel", taps.expand(1, 2, -1) * 0.5)
        self.register_buffer("proj_weight", vq.in_proj.folded_weight())
        self.register_buffer("proj_bias", vq.in_proj.bias.detach().clone())
        self.register_buffer("directions", vq.unit_codebook().t().contiguous())

    def forward(self, audio: Tensor) -> Tensor:
        """audio float32 [B, 2, N] at 48 kHz -> codes int64 [B, N // 1920]; N 1966560 gives 1024.

        The lowest index wins ties. N must exceed 2048 samples, the reach of the mirrored edge.
        """
        wav = resample_to_24k(audio, self.kernel).squeeze(1)  # [B, N / 2]
        latents = F.linear(self.muq(wav), self.proj_weight, self.proj_bias)  # [B, n, codebook_dim]
        return torch.matmul(latents, self.directions).argmax(dim=2)


class FlowStage(Float32Buffers):
    """Velocity of the flow for rows that are conditioned on codes or not. Source: mucodec spec 3.1, 3.4, 4.

    Args:
        flow: the estimator.
        vq: the quantiser that made the codes.
        condition: the linear layer from quantised vectors to condition vectors.
    """

    codebook: Tensor
    condition_weight: Tensor
    condition_bias: Tensor

    def __init__(self, flow: Flow, vq: VQ, condition: nn.Linear) -> None:
        super().__init__()
        self.flow = flow
        weight, bias = fold_condition(vq, condition)
        self.register_buffer("codebook", vq.codebook.weight.detach().clone())
        self.register_buffer("condition_weight", weight)
        self.register_buffer("condition_bias", bias)

    def condition(self, codes: Tensor) -> Tensor:
        """int64 [B, 2 L] -> condition grid [B, 32, L, 32] float32."""
        rows = F.embedding(codes, self.codebook)
        return condition_grid(rows @ self.condition_weight + self.condition_bias)

    def forward(self, x: Tensor, context: Tensor, codes: Tensor, conditional: Tensor, t: Tensor) -> Tensor:
        """One evaluation of the estimator.

        Args:
            x: float32 [B, 32, L, 32], the state.
            context: float32 [B, 32, L, 32], normalised in-context latents, zero where there are none.
            codes: int64 [B, 2 L].
            conditional: float32 [B], 1 to condition the row, 0 to zero its condition channels.
            t: float32 [B] in [0, 1].

        Returns:
            velocity float32 [B, 32, L, 32].
        """
        mu = self.condition(codes) * conditional[:, None, None, None]
        return self.flow(torch.cat([x, context, mu], dim=1), t)


class MelDecoderStage(nn.Module):
    """Latents of one audio channel per row to log-mel. Source: mucodec spec 6."""

    def __init__(self, vae: MelVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """latents float32 [B, 16, L, 32], un-normalised -> mel float32 [B, 256, 8 L]."""
        return self.vae(latents).squeeze(1).transpose(1, 2).float()


class VocoderStage(nn.Module):
    """Log-mel to waveform in one pass. Source: mucodec spec 7, 7.2."""

    def __init__(self, vocoder: Vocoder) -> None:
        super().__init__()
        self.vocoder = vocoder

    def forward(self, mel: Tensor) -> Tensor:
        """mel float32 [B, 256, F] -> waveform float32 [B, 480 F + 16]."""
        return self.vocoder(mel).squeeze(1).float()
