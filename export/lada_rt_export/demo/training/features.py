"""Fixed transforms that training needs and inference does not: the vocoder's mel, chroma and flux per code."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.bench.quality import chroma
from torch import Tensor

from lada_rt_export.models.muq import MuQ, resample_kernel, resample_to_24k

__all__ = ["N_FFT", "code_chroma", "encoder_mel", "log_mel", "mel_filterbank", "mel_flux"]

RATE_HZ = 48_000
N_FFT, HOP = 2048, 480
N_MELS = 256
LOW_HZ, HIGH_HZ = 20.0, 24_000.0
FLOOR = 1e-5


def _slaney(hz: np.ndarray) -> np.ndarray:
    """Linear below 1 kHz, logarithmic above: 15 mel a kHz, then 27 to each factor of 6.4."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / np.log(6.4))


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


@functools.cache
def mel_filterbank() -> Tensor:
    """[256, 1025] float32: Slaney triangles of unit area from 20 Hz to 24 kHz. Source: mucodec spec 6."""
    ends = _slaney(np.array([LOW_HZ, HIGH_HZ]))
    edges = _slaney_hz(np.linspace(ends[0], ends[1], N_MELS + 2))
    freqs = np.linspace(0, RATE_HZ / 2, N_FFT // 2 + 1)
    rising = (freqs - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - freqs) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(triangles.astype(np.float32))


def log_mel(audio: Tensor) -> Tensor:
    """Natural log-mel as the vocoder takes it. Source: mucodec spec 6.

    Args:
        audio: [B, N] float32 at 48 kHz, N a multiple of 480.

    Returns:
        [B, 256, N / 480] float32. Frame f is centred on sample 480 f + 240, so that 480 samples belong to each frame.
    """
    side = (N_FFT - HOP) // 2
    padded = F.pad(audio, (side, side))
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
    mel = mel_filterbank().to(audio.device) @ spectrum.abs()
    return mel.clamp(min=FLOOR).log()


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
