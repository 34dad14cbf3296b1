"""Mel VAE: the encoder half, which only training needs, and its stage. The mel's rows are those of `grains`.

The encoder sees strengths. It cuts them into patches of 8 frames by 8 rows, one for each position of the latent grid,
so that all its work is on that grid. The decoder makes rows, strengths with their textures, and for that the latents
say where they are: the first `active_latents` of the 16 channels carry the sound and change sign from frame to frame,
as textures do; one more is the sign itself; one is a sign that changes from bin to bin, which is constant in time and
costs the flow nothing, as its deviation is zero. The others are zero.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.training.data import CodecSongs
from lada_rt_export.demo.training.grains import N_ROWS, N_TONE_ROWS, rows_of
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.mel_vae import MelVAE

__all__ = ["N_CLOCKS", "MelAutoencoder", "MelEncoder", "MelVAETask"]

_PATCH = 8
_WIDTH = 96
_KL = 1e-3
_MIN_LOG_VARIANCE, _FIRST_LOG_VARIANCE, _MAX_LOG_VARIANCE = -12.0, -4.5, 4.0
#: weight of the mean absolute error beside the root mean square ones
_ABSOLUTE = 0.5
#: signs of frames and of bins
N_CLOCKS = 2


def _signs(n: int, device: torch.device) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(n, device=device) % 2)


class MelEncoder(nn.Module):
    """Strengths of one side to the mean and log variance of its active latents, before their signs."""

    def __init__(self, active: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, _WIDTH, _PATCH, _PATCH)
        self.bin = nn.Parameter(0.1 * torch.randn(_WIDTH, 1, N_ROWS // _PATCH))
        self.mix = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, (3, 1), padding=(1, 0)) for _ in range(2))
        self.out = nn.Conv2d(_WIDTH, 2 * active, 1)
        # little noise at first: the decoder has to find the textures in what is left
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias[active:], _FIRST_LOG_VARIANCE)

    def forward(self, strength: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 256, 8 L] -> mean and log variance, [B, active, L, 32] float32 each."""
        # a root: faint rows count too
        x = self.patch(strength.sqrt().transpose(1, 2).unsqueeze(1)) + self.bin
        for conv in self.mix:
            x = x + conv(F.silu(x))
        mean, log_variance = self.out(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)


class MelAutoencoder(nn.Module):
    """Encoder half and the decoder of inference. Frames are counted from the start of what it is given."""

    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.encoder = MelEncoder(sizes.active_latents)
        self.vae = MelVAE(sizes.mel_vae).requires_grad_(True)
        self.n_channels = sizes.mel_vae.embed_channels

    def place(self, active: Tensor) -> Tensor:
        """[B, active, L, 32] with signs, clocks and zeros: the latents [B, 16, L, 32]."""
        batch, n_active, n_frames, n_bins = active.shape
        frames = _signs(n_frames, active.device)[:, None].expand(batch, 1, n_frames, n_bins)
        bins = _signs(n_bins, active.device).expand(batch, 1, n_frames, n_bins)
        zeros = active.new_zeros(batch, self.n_channels - n_active - N_CLOCKS, n_frames, n_bins)
        return torch.cat([active * frames, frames, bins, zeros], dim=1)

    def decode(self, active: Tensor) -> Tensor:
        """[B, active, L, 32] -> rows [B, 256, 8 L]."""
        return self.vae(self.place(active)).squeeze(1).transpose(1, 2)

    @torch.no_grad()
    def latents(self, strength: Tensor) -> Tensor:
        """The means for strengths [B, 256, 8 L]: [B, 16, L, 32] float32."""
        return self.place(self.encoder(strength)[0])


class MelVAETask:
    """Trains `MelAutoencoder` by the errors of tones and noise, each over its own power, and a light prior."""

    name = "mel_vae"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs) -> None:
        self.songs, self.budget = songs, sizes.budgets["mel_vae"]
        self.modules = MelAutoencoder(sizes)

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        batch, n_codes = self.budget.crop(step)
        strength, _ = self.songs.strength_crops(rng, batch, 4 * n_codes)
        rows = rows_of(strength)
        mean, log_variance = self.modules.encoder(strength)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = self.modules.decode(z).float() - rows
        tones = _relative(error[:, :N_TONE_ROWS], rows[:, :N_TONE_ROWS])
        noise = _relative(error[:, N_TONE_ROWS:], rows[:, N_TONE_ROWS:])
        absolute = error.abs().mean() / rows.abs().mean().clamp(min=1e-3)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = tones + noise + _ABSOLUTE * absolute + _KL * kl
        return {"loss": loss, "tones": tones, "noise": noise, "absolute": absolute, "kl": kl}


def _relative(error: Tensor, truth: Tensor) -> Tensor:
    """Root of the mean square of the error over that of the truth, silence taken for faint noise."""
    return (error.square().mean() / truth.square().mean().clamp(min=1e-4)).sqrt()
