"""Fixed transforms that training needs and inference does not: the encoder's mel, chroma and flux per code."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.bench.quality import chroma
from torch import Tensor

from lada_rt_export.models.muq import MuQ, resample_kernel, resample_to_24k

__all__ = ["code_chroma", "encoder_mel", "mel_flux"]

RATE_HZ = 48_000


@torch.no_grad()
def encoder_mel(muq: MuQ, audio: Tensor) -> Tensor:
    """What the encoder's convolutions see: [B, 2, N] float32 at 48 kHz to [B, 128, 4 * (N // 1920)].

    By FFT in place of the graph's convolution, which is slower on a CPU and equal up to rounding.
    """
    wav = resample_to_24k(audio, resample_kernel().expand(1, 2, -1) * 0.5).squeeze(1)
    config = muq.config
    quantum = 4 * config.hop_samples
    wav = wav[:, : wav.shape[1] // quantum * quantum]
    front = muq.front_end
    spectrum = torch.stft(
        wav, config.n_fft, config.hop_samples, window=front.window, center=True, pad_mode="reflect", return_complex=True
    )[..., :-1]
    power = front.filterbank @ spectrum.abs().square()
    return (front.decibels(power) - config.mel_mean) * (1.0 / config.mel_std)


def code_chroma(audio: np.ndarray, n_codes: int) -> np.ndarray:
    """[C, N] at 48 kHz to the pitch class profile at the middle of each 40 ms, [n_codes, 12] float32."""
    profile = chroma(audio, RATE_HZ)
    # frame i is centred on half a window past i hops of 2048 samples
    middles = (np.arange(n_codes) + 0.5) * 1920
    at = np.clip(np.round((middles - 4096) / 2048).astype(int), 0, len(profile) - 1)
    return profile[at]


def mel_flux(mel: Tensor) -> Tensor:
    """Rise of the normalised decibel mel [B, 128, 4 n], in four parts of the spectrum: [B, 4, 4 n]."""
    rise = F.pad(mel[:, :, 1:] - mel[:, :, :-1], (1, 0)).clamp(min=0)
    return rise.unflatten(1, (4, -1)).mean(dim=2)
