"""Drums and hand percussion: one-shots drawn per song, three takes of each so that rolls do not sound like a
machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lada_rt_export.demo.songs.effects import shaped_noise
from lada_rt_export.demo.songs.instruments import RATE_HZ, partials

__all__ = ["DRUMS", "N_TAKES", "draw_kit"]

N_TAKES = 3


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * RATE_HZ)) / RATE_HZ


def _noise(rng: np.random.Generator, t: np.ndarray, low_hz: float, high_hz: float, tau_s: float) -> np.ndarray:
    return shaped_noise(rng, len(t), RATE_HZ, low_hz, high_hz) * np.exp(-t / tau_s)


def _swept(t: np.ndarray, start_hz: float, end_hz: float, sweep_s: float, tau_s: float) -> np.ndarray:
    phase = 2 * np.pi * (end_hz * t + (start_hz - end_hz) * sweep_s * (1 - np.exp(-t / sweep_s)))
    return np.sin(phase) * np.exp(-t / tau_s)


def _metal(rng: np.random.Generator, t: np.ndarray, base_hz: float, tau_s: float, bright: float) -> np.ndarray:
    """Inharmonic clangour and noise above 5 kHz: hats and cymbals."""
    ratios = np.array([2.0, 3.0, 4.16, 5.43, 6.79, 8.21, 9.7, 11.3, 13.1, 15.2, 17.3, 19.6])
    freqs = base_hz * ratios * (1 + 0.004 * rng.standard_normal(len(ratios)))
    ring = partials(freqs, np.ones(12) * (freqs > 3000), np.full(12, tau_s), len(t), rng.uniform(0, 6.28, 12))
    return 0.12 * ring + 0.5 * _noise(rng, t, 6500 * bright, 15000, tau_s)


def _kick(rng: np.random.Generator, base: np.random.Generator, electronic: bool) -> np.ndarray:
    t = _time(0.45)
    end = base.uniform(46, 58)
    tau = base.uniform(0.14, 0.2) if electronic else base.uniform(0.08, 0.13)
    x = _swept(t, end * base.uniform(4, 6), end, 0.022 if electronic else 0.015, tau)
    return x + _noise(rng, t, 1800, 5000, 0.003) * (0.22 if electronic else 0.13)


def _snare(rng: np.random.Generator, base: np.random.Generator, wires: float, ring: float) -> np.ndarray:
    t = _time(0.4)
    hz = base.uniform(170, 215)
    body = _swept(t, hz * 1.4, hz, 0.012, 0.07 * ring) + 0.5 * _swept(t, hz * 1.9, hz * 1.6, 0.01, 0.05 * ring)
    return 0.55 * body + 0.33 * _noise(rng, t, 1500, 9000, wires * base.uniform(0.85, 1.15))


def _clap(rng: np.random.Generator, base: np.random.Generator) -> np.ndarray:
    t = _time(0.35)
    shape = sum(np.where(t >= d, np.exp(-np.maximum(t - d, 0) / 0.006), 0) for d in (0.0, 0.010, 0.021))
    tail = np.where(t >= 0.03, np.exp(-np.maximum(t - 0.03, 0) / base.uniform(0.06, 0.1)), 0)
    return 0.4 * shaped_noise(rng, len(t), RATE_HZ, 1100, 5500) * (shape + tail)


def _hat(rng: np.random.Generator, base: np.random.Generator, tau_s: float) -> np.ndarray:
    return _metal(rng, _time(6 * tau_s + 0.02), base.uniform(480, 620), tau_s, base.uniform(0.9, 1.2))


def _ride(rng: np.random.Generator, base: np.random.Generator) -> np.ndarray:
    t = _time(1.0)
    hz = base.uniform(380, 480)
    ping = partials(hz * np.array([7.1, 9.3, 11.9]), np.array([0.1, 0.08, 0.06]), np.full(3, 0.25), len(t), np.zeros(3))
    return ping + 0.5 * _metal(rng, t, hz, 0.3, 0.9)


def _tom(rng: np.random.Generator, hz: float) -> np.ndarray:
    t = _time(0.5)
    return _swept(t, hz * 1.5, hz, 0.04, 0.14) + 0.12 * _noise(rng, t, 800, 4000, 0.01)


def _rim(rng: np.random.Generator, base: np.random.Generator) -> np.ndarray:
    t = _time(0.12)
    hz = base.uniform(1500, 1900)
    ring = partials(
        hz * np.array([0.28, 1.0, 1.52]),
        np.array([0.4, 0.5, 0.3]),
        np.array([0.02, 0.014, 0.01]),
        len(t),
        np.zeros(3),
    )
    return ring + 0.12 * _noise(rng, t, 2000, 7000, 0.006)


def _shaker(rng: np.random.Generator, base: np.random.Generator) -> np.ndarray:
    t = _time(0.12)
    swell = np.minimum(t / 0.018, 1) * np.exp(-np.maximum(t - 0.018, 0) / 0.025)
    return 0.35 * shaped_noise(rng, len(t), RATE_HZ, base.uniform(4500, 6000), 13000) * swell


def _conga(rng: np.random.Generator, hz: float) -> np.ndarray:
    t = _time(0.35)
    ring = partials(
        hz * np.array([1.0, 1.6, 2.3]),
        np.array([0.8, 0.25, 0.15]),
        np.array([0.11, 0.06, 0.04]),
        len(t),
        np.zeros(3),
    )
    return ring + 0.12 * _noise(rng, t, 1200, 5000, 0.008)


def _brush(rng: np.random.Generator, base: np.random.Generator) -> np.ndarray:
    t = _time(0.3)
    swell = np.minimum(t / 0.01, 1) * np.exp(-t / base.uniform(0.06, 0.09))
    return 0.3 * shaped_noise(rng, len(t), RATE_HZ, 1800, 7500) * swell + 0.12 * _swept(t, 260, 190, 0.01, 0.04)


#: name -> (one-shot from the take's and the kit's chance, pan from -1 left to 1 right, level)
DRUMS: dict[str, tuple[Callable[[np.random.Generator, np.random.Generator], np.ndarray], float, float]] = {
    "kick": (lambda rng, base: _kick(rng, base, False), 0.0, 0.62),
    "kick808": (lambda rng, base: _kick(rng, base, True), 0.0, 0.62),
    "snare": (lambda rng, base: _snare(rng, base, 0.08, 1.0), 0.05, 0.55),
    "snare_tight": (lambda rng, base: _snare(rng, base, 0.05, 0.7), 0.05, 0.5),
    "clap": (_clap, -0.05, 0.5),
    "hat": (lambda rng, base: _hat(rng, base, 0.025), 0.3, 0.26),
    "open_hat": (lambda rng, base: _hat(rng, base, 0.16), 0.3, 0.24),
    "ride": (_ride, -0.35, 0.3),
    "crash": (lambda rng, base: _metal(rng, _time(2.2), base.uniform(300, 380), 0.55, 0.6), -0.25, 0.34),
    "tom_high": (lambda rng, base: _tom(rng, base.uniform(150, 170)), 0.25, 0.5),
    "tom_low": (lambda rng, base: _tom(rng, base.uniform(85, 100)), -0.25, 0.5),
    "rim": (_rim, 0.2, 0.36),
    "shaker": (_shaker, -0.4, 0.2),
    "conga_high": (lambda rng, base: _conga(rng, base.uniform(290, 330)), -0.3, 0.3),
    "conga_low": (lambda rng, base: _conga(rng, base.uniform(195, 225)), -0.3, 0.3),
    "brush": (_brush, 0.1, 0.4),
}


def draw_kit(seed: int, names: Sequence[str] = tuple(DRUMS)) -> dict[str, list[np.ndarray]]:
    """Render N_TAKES takes [n] float32 of the drums named; each starts at once and fades to zero."""
    kit: dict[str, list[np.ndarray]] = {}
    for name in names:
        shot, _pan, level = DRUMS[name]
        i = list(DRUMS).index(name)
        kit[name] = []
        for take in range(N_TAKES):
            # the same `base` for all takes: one instrument, struck three times
            x = shot(np.random.default_rng([seed, i, take]), np.random.default_rng([seed, i]))
            hump = np.hanning(len(x))  # takes the offset away below the audible
            x = x - hump * (x.sum() / hump.sum())
            fade = min(len(x), RATE_HZ // 50)
            x[-fade:] *= np.linspace(1, 0, fade)
            x[:24] *= np.linspace(0, 1, 24)
            kit[name].append((level * (1 + 0.05 * (take - 1)) * x).astype(np.float32))
    return kit
