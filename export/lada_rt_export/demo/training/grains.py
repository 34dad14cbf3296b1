"""What the mel of the trained demo bundle holds: 256 rows of signed strengths, each the strength of a short grain.

A vocoder that sees magnitudes alone cannot hold a pitch. It is the same at every frame, so a steady log-mel makes a
sound that repeats every frame, 10 ms: all partials land on multiples of 100 Hz. Large vocoders live off the
irregularities of real recordings; at the size of a demo hardly a chord survives. So the demo's rows carry phase:

    row[f] = strength[f] * texture[f % 16]

`strength` says how loud a semitone or a band of noise is, and changes slowly. `texture` turns a row from frame to
frame by an odd multiple of 1/16 turn, close to how far the row's pitch turns in 10 ms. It repeats after 16 frames, two
latent frames, with the other sign in the second: a mel decoder can make it from latents that change sign from frame to
frame, and a flow from the place of a frame in its patch of two. Pitches are rounded by it, above the bass by 15 cents
on average. The vocoder then only adds up grains of two frames, one for each row: a linear map of the architecture's own
shape, which `grain_vocoder` writes into the weights. It is not trained.

    rows 0..143     72 semitones from E1, in pairs of cosine and sine
    rows 144..215   72 bands of noise, 50 Hz to 18 kHz, even in the mel scale
    rows 216..255   nothing
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor

from lada_rt_export.models.vocoder import Vocoder, VocoderConfig

__all__ = [
    "CYCLE_FRAMES",
    "N_ROWS",
    "N_TONE_ROWS",
    "grain_vocoder",
    "grains",
    "play_rows",
    "rows_of",
    "strengths",
    "textures",
]

RATE_HZ, HOP = 48_000, 480
N_ROWS = 256
N_TONES, LOWEST_MIDI = 72, 28
N_TONE_ROWS = 2 * N_TONES
N_BANDS, LOW_HZ, HIGH_HZ = 72, 50.0, 18_000.0
N_USED = N_TONE_ROWS + N_BANDS
#: textures repeat after so many frames, and change sign after half of them
CYCLE_FRAMES = 16
#: rows of one latent bin; slot 2 c and 2 c + 1 turn by (2 c + 1) / 16 of a turn each frame
_SLOTS = 8
#: amplitude 1 / _SCALE is a strength of one
_SCALE = 6.0
_TONE_WINDOW, _BAND_WINDOW = 4096, 1024
#: fainter peaks of the spectrum are no tones
_FAINTEST = 1e-4
_NOISE_SEED = 5
Floats = np.ndarray


@dataclass(frozen=True, slots=True)
class _Layout:
    """Pitch, row and turn of each tone: `hz` [72], `row` [72] of its cosine, `sign` [72] of its sine."""

    hz: Floats
    row: np.ndarray
    sign: Floats


@functools.cache
def _layout() -> _Layout:
    hz = 440.0 * 2.0 ** ((np.arange(N_TONES) + LOWEST_MIDI - 69) / 12)
    # turns of a frame, the nearest whole number of them taken off: -0.5 to 0.5
    turns = (hz * HOP / RATE_HZ + 0.5) % 1.0 - 0.5
    # as many tones as bins share a slot: in the order of their turns, which keeps each close to its slot's
    n_bins = N_TONE_ROWS // _SLOTS
    slot = np.empty(N_TONES, np.int64)
    slot[np.argsort(np.abs(turns), kind="stable")] = np.repeat(np.arange(_SLOTS // 2), n_bins)
    row = np.empty(N_TONES, np.int64)
    for c in range(_SLOTS // 2):
        row[slot == c] = _SLOTS * np.arange(n_bins) + 2 * c
    return _Layout(hz, row, np.where(turns < 0, -1.0, 1.0))


@functools.cache
def _band_edges() -> Floats:
    low, high = 2595 * np.log10(1 + np.array([LOW_HZ, HIGH_HZ]) / 700)
    return 700 * (10 ** (np.linspace(low, high, N_BANDS + 1) / 2595) - 1)


@functools.cache
def textures() -> Tensor:
    """[256, 16] float32 of unit power; the second half is the first with the other sign."""
    from_middle = np.arange(CYCLE_FRAMES) + 0.5 - CYCLE_FRAMES / 2
    slots = []
    for c in range(_SLOTS // 2):
        angle = 2 * np.pi * (2 * c + 1) * from_middle / CYCLE_FRAMES
        slots += [np.cos(angle), np.sin(angle)]
    return torch.from_numpy(np.tile(np.stack(slots), (N_ROWS // _SLOTS, 1)).astype(np.float32))


@functools.cache
def grains() -> Tensor:
    """[256, 960] float32: what a strength of one at frame f adds to samples 480 f - 240 to 480 f + 720.

    Values are those of half precision, in which a bundle stores them.
    """
    layout, n = _layout(), 2 * HOP
    from_centre = np.arange(n) - (n - 1) / 2
    window = 1 - np.abs(from_centre) / HOP
    out = np.zeros((N_ROWS, n))
    angle = 2 * np.pi * layout.hz[:, None] * from_centre / RATE_HZ
    out[layout.row] = np.cos(angle) * window
    out[layout.row + 1] = -layout.sign[:, None] * np.sin(angle) * window
    rng = np.random.default_rng(_NOISE_SEED)
    edges = _band_edges()
    for band in range(N_BANDS):
        # partials 7 Hz apart with random phases: noise, to a grain of 20 ms
        hz = np.arange(edges[band] + 2, edges[band + 1], 7.0)
        sound = np.cos(2 * np.pi * (hz[:, None] * np.arange(n) / RATE_HZ + rng.random((len(hz), 1)))).sum(axis=0)
        # unit power after the window's and the texture's share
        out[N_TONE_ROWS + band] = sound * window * np.sqrt(3.0 / np.mean(sound**2))
    return torch.from_numpy((out / _SCALE).astype(np.float16).astype(np.float32))


def _spectrum(audio: Tensor, size: int) -> Tensor:
    side = (size - HOP) // 2
    window = torch.hann_window(size)
    return torch.stft(F.pad(audio, (side, side)), size, HOP, window=window, center=False, return_complex=True).abs()


def _tone_levels(audio: Tensor) -> Floats:
    """Amplitude of each semitone, [B, 72, F]: peaks of the spectrum, each given to the semitone nearest to it."""
    n_bins = 1 + int(_layout().hz[-1] * 1.1 * _TONE_WINDOW / RATE_HZ)
    magnitude = _spectrum(audio, _TONE_WINDOW)[:, : n_bins + 1].numpy() * (4 / _TONE_WINDOW)
    left, middle, right = magnitude[:, :-2], magnitude[:, 1:-1], magnitude[:, 2:]
    at = np.nonzero((middle >= left) & (middle > right) & (middle > _FAINTEST))
    a, b, c = (np.log(np.maximum(m[at], 1e-9)) for m in (left, middle, right))
    # vertex of the parabola through the logarithms
    offset = np.clip(0.5 * (a - c) / np.minimum(a - 2 * b + c, -1e-9), -0.5, 0.5)
    power = np.exp(2 * (b - 0.25 * (a - c) * offset))
    midi = 69 + 12 * np.log2((at[1] + 1 + offset) * RATE_HZ / _TONE_WINDOW / 440)
    tone = np.round(midi).astype(int) - LOWEST_MIDI
    inside = (tone >= 0) & (tone < N_TONES)
    out = np.zeros((len(audio), N_TONES, magnitude.shape[2]), np.float32)
    np.add.at(out, (at[0][inside], tone[inside], at[2][inside]), power[inside])
    return np.sqrt(out)


@functools.cache
def _band_shares() -> tuple[Floats, Floats]:
    """Share of each FFT bin in each band [72, 513], and of each tone's power [72, 72]."""
    edges, n_bins = _band_edges(), _BAND_WINDOW // 2 + 1
    width = RATE_HZ / _BAND_WINDOW
    hz = np.arange(n_bins) * width
    low, high = edges[:-1, None], edges[1:, None]
    bins = np.clip(np.minimum(hz + width / 2, high) - np.maximum(hz - width / 2, low), 0, None) / width
    window = torch.hann_window(_BAND_WINDOW, dtype=torch.float64).numpy()
    waves = np.exp(2j * np.pi * _layout().hz[:, None] * np.arange(_BAND_WINDOW) / RATE_HZ) * window
    power = np.abs(np.fft.fft(waves, axis=1)[:, :n_bins]) ** 2
    tones = bins @ (0.5 * power / power.sum(axis=1, keepdims=True)).T
    return bins.astype(np.float32), tones.astype(np.float32)


def _band_levels(audio: Tensor, tones: Floats) -> Floats:
    """RMS of each band, [B, 72, F], without what the tones [B, 72, F] explain."""
    bins, shares = _band_shares()
    # the spectrum has two sides; divided by the window's power, bins sum to the mean square
    power = _spectrum(audio, _BAND_WINDOW).square().numpy() * (2 / (_BAND_WINDOW**2 * 0.375))
    return np.sqrt(np.maximum(bins @ power - shares @ np.square(tones), 0))


def strengths(audio: Tensor) -> Tensor:
    """Measure the rows of a sound, before their texture.

    Args:
        audio: [B, N] float32 at 48 kHz, N a multiple of 480.

    Returns:
        [B, 256, N / 480] float32, not negative. Frame f is centred on sample 480 f + 240.
    """
    layout = _layout()
    tones = _tone_levels(audio)
    out = np.zeros((len(audio), N_ROWS, tones.shape[2]), np.float32)
    out[:, layout.row] = out[:, layout.row + 1] = tones
    out[:, N_TONE_ROWS:N_USED] = _band_levels(audio, tones)
    return torch.from_numpy(out * np.float32(_SCALE))


def rows_of(strength: Tensor) -> Tensor:
    """[B, 256, F] strengths that begin at a multiple of 16 frames to the rows that the vocoder takes."""
    n = strength.shape[2]
    texture = textures().to(strength.device)
    return strength * texture.repeat(1, -(-n // CYCLE_FRAMES))[:, :n]


def play_rows(rows: Tensor) -> Tensor:
    """[B, 256, F] to the sum of grains [B, 480 F]: what `grain_vocoder` plays before its tanh."""
    return F.conv_transpose1d(rows, grains().to(rows.device)[:, None], stride=HOP)[:, 0, HOP // 2 : -(HOP // 2)]


#: signals pass leaky units unharmed on top of these constants, which two channels carry so that the next layer can
#: take them off again, at the ends as well
_ROW_OFFSET, _SAMPLE_OFFSET = 4.0, 2.0


@torch.no_grad()
def grain_vocoder(config: VocoderConfig) -> Vocoder:
    """A vocoder whose weights play rows as `play_rows` does, in float32, up to its tanh; nothing in it is trained.

    Between the first and the last layer a channel carries a sample of every group, 80 in a tick of 600 Hz, and each
    further layer splits groups. Residual blocks add nothing. Half precision holds every weight. Training would have to
    tread lightly: offsets of
    hundreds of channels cancel only as long as their weights belong together.

    Raises:
        ParamError: the vocoder is too narrow, or does not have the released rates.
    """
    if config.initial_channels < N_USED + 2 or (config.rates, config.kernels) != ((6, 5, 4, 2, 2), (12, 10, 8, 4, 4)):
        raise ParamError(
            f"expected at least {N_USED + 2} channels and the released rates, got {config}; correct the preset"
        )
    rng_state = torch.random.get_rng_state()
    vocoder = Vocoder(config)
    torch.random.set_rng_state(rng_state)
    for parameter in vocoder.parameters():
        parameter.zero_()
    pre, post = vocoder.conv_pre, vocoder.conv_post
    assert pre.bias is not None
    used = torch.arange(N_USED)
    pre.weight[used, used, 3] = 1.0
    pre.bias[: N_USED + 2] = _ROW_OFFSET

    group = 80
    bank = grains()[:N_USED].reshape(N_USED, 12, group).transpose(1, 2)  # row, sample of a tick, tick
    _lay(vocoder.ups[0], bank)
    for index, (rate, kernel) in enumerate(zip(config.rates[1:], config.kernels[1:], strict=True), start=1):
        first = (kernel - rate) // 2
        smaller = group // rate
        split = torch.zeros(group, smaller, kernel)
        for part in range(rate):
            for sample in range(smaller):
                split[part * smaller + sample, sample, first + part] = 1.0
        _lay(vocoder.ups[index], split)
        group = smaller
    post.weight[0, 0, 3], post.weight[0, 1, 3] = 1.0, -1.0
    return vocoder


def _lay(conv: torch.nn.Module, bank: Tensor) -> None:
    """Write [n_in, n_out, kernel] into the first channels of a transposed convolution, and the offsets' channels."""
    assert isinstance(conv, torch.nn.ConvTranspose1d)
    n_in, n_out, _ = bank.shape
    assert conv.bias is not None
    conv.weight[:n_in, :n_out] = bank
    # two channels carry the offset: half precision holds what is taken off only as a sum of two
    most = -bank.sum(dim=0)
    conv.weight[n_in, :n_out] = most.half().float()
    conv.weight[n_in + 1, :n_out] = (most - most.half().float()).half().float()
    conv.bias[: n_out + 2] = _SAMPLE_OFFSET
