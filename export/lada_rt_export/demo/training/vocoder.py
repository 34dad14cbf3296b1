"""Vocoder stage: HiFi-GAN's generator with a multi-resolution STFT loss and, if asked for, a small discriminator.

STFT loss after Yamamoto et al., arXiv 1910.11480; the discriminator sees spectrograms of two resolutions, with
least-squares targets (HiFi-GAN, arXiv 2010.05646). In the second half of the training every other crop's mel is the mel
VAE's reconstruction, which is what the vocoder meets later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.training.data import CodecSongs
from lada_rt_export.demo.training.features import log_mel
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.mel_vae import MelAutoencoder
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.vocoder import Vocoder

__all__ = ["VocoderTask", "multi_resolution_loss"]

_SIZES = (256, 512, 1024, 2048)
_MEL = 0.5
_ADVERSARIAL = 0.05
_DISCRIMINATED = (512, 1024)


def _magnitude(x: Tensor, size: int) -> Tensor:
    """[B, N] to magnitudes [B, bins, frames], a hop of a quarter; never zero, for the gradient of the root."""
    window = torch.hann_window(size, device=x.device)
    spectrum = torch.stft(x, size, size // 4, window=window, center=False, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt() * (2 / size)


def multi_resolution_loss(wave: Tensor, truth: Tensor) -> Tensor:
    """Spectral convergence plus difference of log magnitudes over four sizes; [B, N] float32 each, N >= 2048."""
    total = wave.new_zeros(())
    for size in _SIZES:
        x, y = _magnitude(wave, size), _magnitude(truth, size)
        # a floor about 20 dB under a full mix: silence would divide by nothing
        convergence = (y - x).norm() / y.norm().clamp(min=1e-3 * math.sqrt(y.numel()))
        total = total + convergence + F.l1_loss((x + 1e-5).log(), (y + 1e-5).log())
    return total / len(_SIZES)


class Discriminator(nn.Module):
    """Scores of spectrogram patches, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(1, 16, (9, 3), stride=(4, 1), padding=(4, 1)),
                nn.LeakyReLU(0.1),
                nn.Conv2d(16, 32, (9, 3), stride=(4, 2), padding=(4, 1)),
                nn.LeakyReLU(0.1),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(32, 1, 3, padding=1),
            )
            for _ in _DISCRIMINATED
        )

    def forward(self, wave: Tensor) -> list[Tensor]:
        spectra = [(_magnitude(wave, size) + 1e-5).log()[:, None] / 4 + 1 for size in _DISCRIMINATED]
        return [net(spectrum) for net, spectrum in zip(self.nets, spectra, strict=True)]


class VocoderModules(nn.Module):
    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.vocoder = Vocoder(sizes.vocoder).requires_grad_(True)
        self.discriminator = Discriminator() if sizes.adversarial else None


class VocoderTask:
    """Trains `Vocoder` on single sides of accompaniments."""

    name = "vocoder"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs, autoencoder: MelAutoencoder | None = None) -> None:
        """`autoencoder`: trained and frozen; None when the modules are only to be loaded."""
        self.songs, self.budget = songs, sizes.budgets["vocoder"]
        self.modules = VocoderModules(sizes)
        self.autoencoder = autoencoder
        self.hop = sizes.geometry.samples_per_mel_frame

    def optimised(self) -> Mapping[str, nn.Module]:
        groups: dict[str, nn.Module] = {self.name: self.modules.vocoder}
        if self.modules.discriminator is not None:
            groups["discriminator"] = self.modules.discriminator
        return groups

    def step(self, step: int, rng: np.random.Generator) -> Iterator[tuple[str, Losses]]:
        batch, n_frames = self.budget.crop(step)
        mel, places = self.songs.mel_crops(rng, batch, n_frames)
        truth = self.songs.audio_crops(places, n_frames)
        if self.autoencoder is not None and 2 * step >= self.budget.n_steps:
            with torch.no_grad():
                rebuilt = self.autoencoder.decode(self.autoencoder.encoder(mel)[0]).float()
            every_other = torch.arange(batch, device=mel.device)[:, None, None] % 2 == step % 2
            mel = torch.where(every_other, rebuilt, mel)
        wave = self.modules.vocoder(mel).squeeze(1).float()[:, : n_frames * self.hop]
        judge = self.modules.discriminator if step >= self.budget.n_steps // 3 else None
        if judge is not None:
            scores, false_scores = judge(truth), judge(wave.detach())
            loss = sum(((1 - s) ** 2).mean() + (f**2).mean() for s, f in zip(scores, false_scores, strict=True))
            assert isinstance(loss, Tensor)
            yield "discriminator", {"loss": loss}
        stft = multi_resolution_loss(wave, truth)
        mel_loss = F.l1_loss(log_mel(wave), log_mel(truth))
        losses = {"loss": stft + _MEL * mel_loss, "stft": stft, "mel": mel_loss}
        if judge is not None:
            fooled = torch.stack([((1 - s) ** 2).mean() for s in judge(wave)]).sum()
            losses |= {"loss": losses["loss"] + _ADVERSARIAL * fooled, "fooled": fooled}
        yield self.name, losses
