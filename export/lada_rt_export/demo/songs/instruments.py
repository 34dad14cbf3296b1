"""Pitched instruments by modal synthesis: every note is a sum of decaying partials, each below the Nyquist
frequency.

A partial is a complex exponential z**t. Writing t = 256 q + r makes the sum over partials one matrix product,
(amplitude * z**256q) @ z**r, so a one-second note of sixty partials takes about a millisecond and cannot
alias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lada_rt_export.demo.songs.effects import shaped_noise

__all__ = ["INSTRUMENTS", "RATE_HZ", "Tone", "partials", "play"]

RATE_HZ = 48000
_BLOCK = 256
_NOTE_RMS = 0.1


@dataclass(frozen=True, slots=True)
class Tone:
    """How one song's copy of an instrument differs: spectral slope, decay and detuning, each 1 when
    average."""

    dark: float = 1.0
    decay: float = 1.0
    detune: float = 1.0
    seed: int = 0


def partials(
    freqs_hz: np.ndarray,
    amps: np.ndarray,
    tau_s: np.ndarray,
    n: int,
    phases: np.ndarray,
    rate_hz: int = RATE_HZ,
) -> np.ndarray:
    """Sum decaying sines.

    Args:
        freqs_hz, amps, tau_s, phases: [K]; time constants to fall by 1/e; those above 0.42 rate_hz are
        dropped. n: samples.

    Returns:
        [n] float32.
    """
    keep = freqs_hz < 0.42 * rate_hz
    rate = (2j * np.pi * freqs_hz[keep] - 1 / tau_s[keep]) / rate_hz
    blocks = -(-n // _BLOCK)
    coarse = np.exp(np.arange(blocks)[:, None] * (_BLOCK * rate) + 1j * phases[keep]) * amps[keep]  # [q, K]
    fine = np.exp(rate[:, None] * np.arange(_BLOCK))  # [K, r]
    left = np.concatenate([coarse.real, coarse.imag], axis=1).astype(np.float32)
    right = np.concatenate([fine.imag, fine.real], axis=0).astype(np.float32)
    return (left @ right).ravel()[:n]


def _harmonics(hz: float, top_hz: float, most: int = 64) -> np.ndarray:
    return np.arange(1, max(2, min(most, int(top_hz / hz)) + 1), dtype=float)


def _string(
    hz: float,
    n: int,
    tone: Tone,
    *,
    slope: float,
    tau_s: float,
    damping: float,
    pluck_at: float,
    stiffness: float,
    noise: float,
    top_hz: float = 14000.0,
    rate_hz: int = RATE_HZ,
) -> np.ndarray:
    """A plucked or struck string: comb of the plucking point, stretched partials, treble that dies first."""
    k = _harmonics(hz, top_hz)
    freqs = hz * k * np.sqrt(1 + stiffness * k * k)
    amps = (0.15 + np.abs(np.sin(np.pi * k * pluck_at))) / k ** (slope * tone.dark)
    tau = tau_s * tone.decay * (220 / hz) ** 0.35 / (1 + damping * (k - 1))
    x = partials(freqs, amps, tau, n, np.zeros(len(k)), rate_hz)
    if noise:
        rng = np.random.default_rng([tone.seed, int(hz * 100)])
        m = min(n, rate_hz // 25)
        x[:m] += noise * shaped_noise(rng, m, rate_hz, 1500, 6000) * np.exp(-np.arange(m) / (0.004 * rate_hz))
    return x


def steel_guitar(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(hz, n, tone, slope=1.25, tau_s=0.9, damping=0.14, pluck_at=0.14, stiffness=6e-5, noise=0.06)[None]


def nylon_guitar(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(hz, n, tone, slope=1.6, tau_s=0.55, damping=0.22, pluck_at=0.22, stiffness=3e-5, noise=0.03)[None]


def clean_guitar(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(
        hz,
        n,
        tone,
        slope=0.85,
        tau_s=0.5,
        damping=0.12,
        pluck_at=0.09,
        stiffness=6e-5,
        noise=0.05,
        top_hz=7000,
    )[None]


def piano(hz: float, n: int, tone: Tone) -> np.ndarray:
    """Two slightly mistuned strings, the second with a longer decay: the double slope of a real piano."""
    first = _string(hz, n, tone, slope=1.25, tau_s=0.5, damping=0.16, pluck_at=0.12, stiffness=3e-4, noise=0.02)
    second = _string(
        hz * (1 + 4e-4 * tone.detune), n, tone,
        slope=1.4, tau_s=1.6, damping=0.3, pluck_at=0.12, stiffness=3e-4, noise=0.0,
    )  # fmt: skip
    return (first + 0.6 * second)[None]


def electric_piano(hz: float, n: int, tone: Tone) -> np.ndarray:
    """A tine: strong fundamental, some bark, a short inharmonic ring."""
    ratios = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.27, 11.2])
    amps = np.array([1.0, 0.38, 0.13, 0.07, 0.03, 0.10, 0.05]) / ratios ** (0.3 * (tone.dark - 1))
    tau = np.array([1.3, 0.7, 0.5, 0.35, 0.3, 0.07, 0.03]) * tone.decay * (220 / hz) ** 0.3
    return partials(hz * ratios, amps, tau, n, np.zeros(7))[None]


def organ(hz: float, n: int, tone: Tone) -> np.ndarray:
    """Drawbars, with the two halves of the rotor a little out of tune."""
    ratios = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
    amps = np.array([0.5, 1.0, 0.5, 0.6, 0.35, 0.3, 0.12, 0.1]) / ratios ** (0.5 * (tone.dark - 1))
    return _ensemble(hz * ratios, amps, n, tone, cents=4.0)


def _ensemble(freqs_hz: np.ndarray, amps: np.ndarray, n: int, tone: Tone, cents: float) -> np.ndarray:
    """[2, n] three players a side, each a few cents off, in random phase."""
    rng = np.random.default_rng([tone.seed, int(freqs_hz[0] * 100)])
    sides = []
    for _ in range(2):
        offsets = np.array([-1.0, 0.1, 0.9]) * cents * tone.detune * rng.uniform(0.7, 1.3, 3)
        freqs = np.concatenate([freqs_hz * 2 ** (c / 1200) for c in offsets])
        phases = rng.uniform(0, 2 * np.pi, len(freqs))
        sides.append(partials(freqs, np.tile(amps, 3), np.full(len(freqs), 1e3), n, phases))
    return np.stack(sides)


def saw_pad(hz: float, n: int, tone: Tone) -> np.ndarray:
    k = _harmonics(hz, 9000, 40)
    return _ensemble(hz * k, 1 / k / (1 + (hz * k * tone.dark / 2200) ** 2), n, tone, cents=11.0)


def strings(hz: float, n: int, tone: Tone) -> np.ndarray:
    k = _harmonics(hz, 8000, 32)
    f = hz * k
    body = 1 + 0.8 * np.exp(-0.5 * ((f - 500) / 150) ** 2) + 0.6 * np.exp(-0.5 * ((f - 1300) / 400) ** 2)
    return _ensemble(f, body / k**1.1 / (1 + (f * tone.dark / 3000) ** 2), n, tone, cents=8.0)


def synth_pluck(hz: float, n: int, tone: Tone) -> np.ndarray:
    k = _harmonics(hz, 12000, 48)
    tau = 0.30 * tone.decay / (1 + 0.22 * (k - 1))
    sides = [partials(hz * k * (1 + d * tone.detune), 1 / k, tau, n, np.zeros(len(k))) for d in (-1.2e-3, 1.2e-3)]
    return np.stack(sides)


def synth_lead(hz: float, n: int, tone: Tone) -> np.ndarray:
    """A hollow pulse wave with a slow fall of its treble."""
    k = _harmonics(hz, 9000, 40)
    amps = np.abs(np.sin(np.pi * k * 0.3)) / k / (1 + (hz * k * tone.dark / 3500) ** 2)
    one = partials(hz * k, amps, 2.0 / (1 + 0.08 * k), n, np.zeros(len(k)))
    two = partials(hz * 1.003 * k, amps, 2.0 / (1 + 0.08 * k), n, np.zeros(len(k)))
    return np.stack([one + 0.5 * two, 0.5 * one + two])


def flute(hz: float, n: int, tone: Tone) -> np.ndarray:
    """A few harmonics with vibrato that grows, and breath."""
    t = np.arange(n) / RATE_HZ
    depth = 0.005 * np.clip((t - 0.15) / 0.3, 0, 1)
    phase = 2 * np.pi * hz * (t - depth * np.cos(2 * np.pi * 5.1 * t) / (2 * np.pi * 5.1))
    x = np.sin(phase) + 0.28 / tone.dark * np.sin(2 * phase) + 0.12 / tone.dark * np.sin(3 * phase)
    rng = np.random.default_rng([tone.seed, int(hz * 100)])
    air = shaped_noise(rng, n, RATE_HZ, 1200, 5000) * (0.02 + 0.08 * np.exp(-t / 0.04))
    return (x + air).astype(np.float32)[None]


def finger_bass(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(
        hz,
        n,
        tone,
        slope=1.25,
        tau_s=0.45,
        damping=0.28,
        pluck_at=0.2,
        stiffness=1e-4,
        noise=0.03,
        top_hz=4000,
    )[None]


def pick_bass(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(
        hz,
        n,
        tone,
        slope=0.95,
        tau_s=0.6,
        damping=0.16,
        pluck_at=0.1,
        stiffness=1e-4,
        noise=0.05,
        top_hz=5000,
    )[None]


def upright_bass(hz: float, n: int, tone: Tone) -> np.ndarray:
    return _string(
        hz, n, tone, slope=1.8, tau_s=0.32, damping=0.4, pluck_at=0.3, stiffness=8e-5, noise=0.02, top_hz=2500
    )[None]


def synth_bass(hz: float, n: int, tone: Tone) -> np.ndarray:
    k = _harmonics(hz, 6000)
    tau = 0.8 * tone.decay / (1 + 0.3 * (k - 1))
    amps = np.where(k == 1, 1.4, 1 / k**tone.dark)
    return partials(hz * k, amps, tau, n, np.zeros(len(k)))[None]


def power_chord(hz: float, n: int, tone: Tone) -> np.ndarray:
    """Root, fifth and octave through an overdriven amplifier and its cabinet, twice: one take a side.

    The drive runs at twice the rate, for its new harmonics would fold back otherwise.
    """
    takes = []
    for cents in (-4.0 * tone.detune, 4.0 * tone.detune):
        x = np.zeros(2 * n, np.float32)
        for ratio in (1.0, 1.5, 2.0):
            x += _string(
                hz * ratio * 2 ** (cents / 1200), 2 * n, tone,
                slope=0.9, tau_s=2.2, damping=0.05, pluck_at=0.11, stiffness=4e-5, noise=0.05,
                top_hz=6000, rate_hz=2 * RATE_HZ,
            )  # fmt: skip
        driven = np.tanh(x * (4.0 / max(float(np.std(x)), 1e-6)) * 0.5)
        spectrum = np.fft.rfft(driven)[: n + 1]
        f = np.fft.rfftfreq(2 * n, 0.5 / RATE_HZ)
        f = f[: n + 1]
        cabinet = 1 / (1 + (90 / np.maximum(f, 1)) ** 4) / (1 + (f * tone.dark / 4200) ** 4)
        cabinet *= 1 + 0.8 * np.exp(-0.5 * ((f - 2400) / 700) ** 2) - 0.35 * np.exp(-0.5 * ((f - 500) / 200) ** 2)
        takes.append(np.fft.irfft((spectrum * cabinet)[: n // 2 + 1], n)[:n])
    return np.stack(takes).astype(np.float32)


#: name -> (note, attack seconds, release seconds)
INSTRUMENTS: dict[str, tuple[Callable[[float, int, Tone], np.ndarray], float, float]] = {
    "steel_guitar": (steel_guitar, 0.001, 0.12),
    "nylon_guitar": (nylon_guitar, 0.0015, 0.10),
    "clean_guitar": (clean_guitar, 0.001, 0.04),
    "piano": (piano, 0.0015, 0.15),
    "electric_piano": (electric_piano, 0.002, 0.10),
    "organ": (organ, 0.008, 0.05),
    "saw_pad": (saw_pad, 0.12, 0.25),
    "strings": (strings, 0.20, 0.30),
    "synth_pluck": (synth_pluck, 0.001, 0.08),
    "synth_lead": (synth_lead, 0.006, 0.06),
    "flute": (flute, 0.04, 0.06),
    "finger_bass": (finger_bass, 0.002, 0.04),
    "pick_bass": (pick_bass, 0.0015, 0.04),
    "upright_bass": (upright_bass, 0.003, 0.06),
    "synth_bass": (synth_bass, 0.002, 0.03),
    "power_chord": (power_chord, 0.001, 0.05),
}


def play(instrument: str, midi: int, duration_s: float, tone: Tone) -> np.ndarray:
    """Render one note, brought to a common loudness.

    Args:
        instrument: a key of INSTRUMENTS.
        midi: pitch, 69 is 440 Hz.
        duration_s: from attack to the begin of the release.

    Returns:
        [1 or 2, n] float32 at RATE_HZ, fading to zero at the end; an RMS of 0.1 over its first third of a
        second.
    """
    note, attack_s, release_s = INSTRUMENTS[instrument]
    n = int((duration_s + release_s) * RATE_HZ)
    n += n % 2
    x = note(440.0 * 2 ** ((midi - 69) / 12), n, tone)
    rise, fall = max(2, int(attack_s * RATE_HZ)), min(n, int(release_s * RATE_HZ))
    envelope = np.ones(n, np.float32)
    envelope[:rise] = 0.5 - 0.5 * np.cos(np.pi * np.arange(min(rise, n)) / rise)
    envelope[n - fall :] *= 0.5 + 0.5 * np.cos(np.pi * (np.arange(fall) + 1) / fall)
    x = x * envelope
    # decaying sines that start at zero leave a small offset: take it away as a hump of a few hertz
    hump = np.hanning(n).astype(np.float32)
    x = x - hump * (x.sum(axis=1, keepdims=True) / hump.sum())
    early = x[:, : min(n, RATE_HZ // 3)]
    return x * np.float32(_NOTE_RMS / max(float(np.sqrt(np.mean(early**2))), 1e-6))
