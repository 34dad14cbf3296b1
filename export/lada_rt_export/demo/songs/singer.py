"""Who sings: the traits of one voice, and the sounds of its language (vowel formants, consonants). Needs
numpy alone.

Formant centres follow the classic measurements of spoken vowels (Peterson and Barney, 1952), rounded and
evened out between men and women; `Singer.formant_scale` moves them to one throat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["CONSONANTS", "VOWELS", "Consonant", "Singer", "draw_singer", "parse_syllable"]

#: F1 to F3 in Hz
VOWELS: dict[str, tuple[float, float, float]] = {
    "a": (740.0, 1200.0, 2550.0),
    "e": (500.0, 1850.0, 2500.0),
    "i": (310.0, 2250.0, 2950.0),
    "o": (480.0, 880.0, 2450.0),
    "u": (340.0, 800.0, 2300.0),
    "ae": (670.0, 1680.0, 2450.0),
    "uh": (600.0, 1150.0, 2400.0),
    "er": (480.0, 1300.0, 1700.0),
}
DIPHTHONGS = {"ai": ("a", "i"), "ei": ("e", "i"), "ou": ("o", "u")}


@dataclass(frozen=True, slots=True)
class Consonant:
    """An onset: `duration_s` before the vowel; `voice` and `noise` are linear gains while it lasts.

    Noise lies around `noise_hz`; `burst_s` of noise follows a closure; `locus` are the formants it starts
    from, 0 for those of the vowel; `damp` is how much the nose or tongue takes from the upper formants, in
    dB.
    """

    duration_s: float
    voice: float
    noise: float = 0.0
    noise_hz: float = 4000.0
    noise_width_hz: float = 2000.0
    burst_s: float = 0.0
    breath: float = 0.0
    locus: tuple[float, float, float] = (0.0, 0.0, 0.0)
    damp: float = 0.0


CONSONANTS: dict[str, Consonant] = {
    "": Consonant(0.02, 0.55),
    "m": Consonant(0.075, 0.55, locus=(260, 1000, 2200), damp=14),
    "n": Consonant(0.07, 0.55, locus=(260, 1600, 2600), damp=12),
    "l": Consonant(0.06, 0.65, locus=(350, 1100, 2600), damp=5),
    "r": Consonant(0.06, 0.65, locus=(350, 1150, 1600), damp=4),
    "w": Consonant(0.06, 0.7, locus=(310, 700, 2200), damp=6),
    "y": Consonant(0.06, 0.7, locus=(280, 2250, 3000), damp=3),
    "b": Consonant(0.06, 0.10, 0.10, 900, 700, 0.010, locus=(250, 850, 2200), damp=10),
    "d": Consonant(0.055, 0.10, 0.14, 4200, 1500, 0.012, locus=(250, 1750, 2600), damp=10),
    "g": Consonant(0.06, 0.08, 0.13, 2000, 700, 0.016, locus=(250, 2000, 2300), damp=10),
    "p": Consonant(0.085, 0.0, 0.12, 1000, 900, 0.014, 0.10, locus=(350, 850, 2200)),
    "t": Consonant(0.09, 0.0, 0.20, 5000, 1800, 0.018, 0.09, locus=(350, 1750, 2600)),
    "k": Consonant(0.09, 0.0, 0.18, 2100, 800, 0.022, 0.10, locus=(350, 2000, 2300)),
    "s": Consonant(0.11, 0.0, 0.17, 7200, 1900, locus=(350, 1750, 2600)),
    "sh": Consonant(0.11, 0.0, 0.20, 3600, 1200, locus=(350, 1900, 2500)),
    "f": Consonant(0.09, 0.0, 0.045, 7500, 4500, locus=(350, 1000, 2300)),
    "h": Consonant(0.07, 0.0, breath=0.16),
    "v": Consonant(0.06, 0.4, 0.025, 7000, 4000, locus=(300, 1000, 2300), damp=8),
    "z": Consonant(0.075, 0.35, 0.09, 7000, 1900, locus=(300, 1750, 2600), damp=8),
}


@dataclass(frozen=True, slots=True)
class Singer:
    """Traits of one voice. Levels are linear, `brightness_db` is added at 3 kHz, `tilt_hz` is where the
    glottal source starts to fall faster; `jitter` and `shimmer` are standard deviations relative to the
    period's own."""

    low_midi: int
    high_midi: int
    formant_scale: float
    bandwidth_scale: float
    brightness_db: float
    tilt_hz: float
    open_quotient: float
    breathiness: float
    jitter: float
    shimmer: float
    vibrato_hz: float
    vibrato_cents: float
    vibrato_delay_s: float
    portamento_s: float
    scoop_cents: float
    scoop_share: float
    room: float


def draw_singer(rng: np.random.Generator) -> Singer:
    """Draw a singer: half of them low voices, half high ones."""
    high_voice = rng.random() < 0.55
    low = int(rng.integers(53, 60) if high_voice else rng.integers(43, 50))
    scale = rng.normal(1.14, 0.035) if high_voice else rng.normal(0.98, 0.035)
    return Singer(
        low_midi=low,
        high_midi=low + int(rng.integers(16, 20)),
        formant_scale=float(np.clip(scale, 0.88, 1.24)),
        bandwidth_scale=float(rng.uniform(0.9, 1.5)),
        brightness_db=float(rng.uniform(-8, 3)),
        tilt_hz=float(rng.uniform(1200, 3500)),
        open_quotient=float(rng.uniform(0.5, 0.75)),
        breathiness=float(np.exp(rng.uniform(np.log(0.006), np.log(0.04)))),
        jitter=float(rng.uniform(0.001, 0.004)),
        shimmer=float(rng.uniform(0.01, 0.05)),
        vibrato_hz=float(rng.uniform(4.8, 6.4)),
        vibrato_cents=float(rng.choice([rng.uniform(0, 15), rng.uniform(15, 55)], p=[0.25, 0.75])),
        vibrato_delay_s=float(rng.uniform(0.15, 0.4)),
        portamento_s=float(rng.uniform(0.05, 0.11)),
        scoop_cents=float(rng.uniform(30, 180)),
        scoop_share=float(rng.uniform(0.1, 0.45)),
        room=float(np.exp(rng.uniform(np.log(0.01), np.log(0.12)))),
    )


def parse_syllable(syllable: str) -> tuple[Consonant, tuple[str, ...]]:
    """Split `onset-vowel` into the consonant and one or two vowels (KeyError for unknown sounds)."""
    onset, _, vowel = syllable.rpartition("-")
    return CONSONANTS[onset], DIPHTHONGS.get(vowel) or (vowel,) * bool(VOWELS[vowel])
