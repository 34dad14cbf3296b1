"""Mel VAE: the encoder half, which only training needs, and its stage.

The encoder cuts the mel into patches of 8 frames by 8 bands, one for each position of the latent grid, so that all its
work is on that grid. Of the 16 latent channels the first `active_latents` carry something; the others are zero, in
training and, by a deviation of zero in the latent statistics, at inference: the flow has that much less to make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.training.data import CodecSongs
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.mel_vae import MelVAE

__all__ = ["MelAutoencoder", "MelEncoder", "MelVAETask"]

_PATCH = 8
#: middle and spread of log-mel values
_MEL_MEAN, _MEL_STD = -5.0, 3.0
_KL = 1e-3
_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -12.0, 4.0


class MelEncoder(nn.Module):
    """Log-mel of one side to the mean and log variance of its active latents."""

    def __init__(self, active: int) -> None:
        super().__init__()
        width = 64
        self.patch = nn.Conv2d(1, width, _PATCH, _PATCH)
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(width, 2 * active, 1)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 256, 8 L] -> mean and log variance, [B, active, L, 32] float32 each."""
        x = self.patch((mel.transpose(1, 2).unsqueeze(1) - _MEL_MEAN) / _MEL_STD)
        for conv in self.mix:
            x = x + conv(F.silu(x))
        mean, log_variance = self.out(x).float().chunk(2, dim=1)
        return mean, log_variance.clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)


class MelAutoencoder(nn.Module):
    """Encoder half and the decoder of inference."""

    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.encoder = MelEncoder(sizes.active_latents)
        self.vae = MelVAE(sizes.mel_vae).requires_grad_(True)
        self.n_channels = sizes.mel_vae.embed_channels
        # silence and sound are far from zero: start in between
        nn.init.constant_(self.vae.decoder.conv_out.bias, _MEL_MEAN)  # type: ignore[arg-type]

    def pad(self, active: Tensor) -> Tensor:
        """[B, active, L, 32] with zeros for the channels that carry nothing: [B, 16, L, 32]."""
        return F.pad(active, (0, 0, 0, 0, 0, self.n_channels - active.shape[1]))

    def decode(self, active: Tensor) -> Tensor:
        """[B, active, L, 32] -> log-mel [B, 256, 8 L]."""
        return self.vae(self.pad(active)).squeeze(1).transpose(1, 2)

    @torch.no_grad()
    def latents(self, mel: Tensor) -> Tensor:
        """The means for a log-mel [B, 256, 8 L]: [B, 16, L, 32] float32."""
        return self.pad(self.encoder(mel)[0])


class MelVAETask:
    """Trains `MelAutoencoder` by the difference of mels and of their steps in time, and a light prior."""

    name = "mel_vae"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs) -> None:
        self.songs, self.budget = songs, sizes.budgets["mel_vae"]
        self.modules = MelAutoencoder(sizes)

    def optimised(self) -> Mapping[str, nn.Module]:
        return {self.name: self.modules}

    def step(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Losses]]:
        batch, n_codes = self.budget.crop(step)
        mel, _ = self.songs.mel_crops(rng, batch, 4 * n_codes)
        mean, log_variance = self.modules.encoder(mel)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        out = self.modules.decode(z).float()
        mel_loss = F.l1_loss(out, mel)
        edge_loss = F.l1_loss(out.diff(dim=2), mel.diff(dim=2))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        yield self.name, {"loss": mel_loss + 0.5 * edge_loss + _KL * kl, "mel": mel_loss, "edges": edge_loss, "kl": kl}
