"""A whole song from a seed: score, vocal, accompaniment and what is true about them.

`compose` writes the score without a sound; `render_vocal` and `render_accompaniment` make one track each;
`make_song` does all three. Chance is drawn from separate streams, so that one part of a song does not move
another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lada_rt.errors import ParamError

from lada_rt_export.demo.songs.arrange import Arrangement, arrange, describe
from lada_rt_export.demo.songs.drums import DRUMS, N_TAKES, draw_kit
from lada_rt_export.demo.songs.effects import (
    below_full_scale,
    convolve,
    hall,
    reverberate,
    small_room,
    smooth,
    soft_limit,
)
from lada_rt_export.demo.songs.form import Chord, Form, Note, Section, write_form
from lada_rt_export.demo.songs.instruments import RATE_HZ, Tone, play
from lada_rt_export.demo.songs.melody import write_melody
from lada_rt_export.demo.songs.singer import Singer, draw_singer
from lada_rt_export.demo.songs.styles import STYLES, Style
from lada_rt_export.demo.songs.voice import render_voice

__all__ = [
    "MAX_TEMPO_BPM",
    "MIN_TEMPO_BPM",
    "Score",
    "Song",
    "compose",
    "make_song",
    "render_accompaniment",
    "render_vocal",
]

MIN_DURATION_S = 4.0
MIN_TEMPO_BPM, MAX_TEMPO_BPM = 70, 150
MIX_RMS = 10 ** (-16 / 20)
# second words of the seed: one stream of chance for each part
_STYLE, _FORM, _SINGER, _MELODY, _ARRANGE, _TEXT, _VOICE, _MIX = range(1, 9)


@dataclass(frozen=True, slots=True)
class Score:
    """A song on paper: everything but the sound."""

    seed: int
    style: Style
    form: Form
    singer: Singer
    melody: list[Note]
    arrangement: Arrangement
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Song:
    """A song with separate tracks [2, N] float32 at 48 kHz and its annotations; times in seconds."""

    vocal: np.ndarray
    accompaniment: np.ndarray
    beats_s: np.ndarray
    downbeats_s: np.ndarray
    chords: list[Chord]
    sections: list[Section]
    style: str
    tempo_bpm: float
    key: str
    texts: list[str]
    melody: list[Note]
    rate_hz: int = RATE_HZ

    @property
    def duration_s(self) -> float:
        return self.vocal.shape[1] / self.rate_hz


def compose(
    seed: int, *, style: str | None = None, duration_s: float | None = None, tempo_bpm: float | None = None
) -> Score:
    """Write a song without rendering it.

    Args:
        seed: non-negative; the same arguments give the same song.
        style: a key of STYLES, or None to draw one.
        duration_s: at least 4; None draws 40 to 60.
        tempo_bpm: 70 to 150; None draws one that suits the style.

    Raises:
        ParamError: an unknown style, or a number out of range.
    """
    if seed < 0:
        raise ParamError(f"expected seed >= 0, got {seed}; seeds are non-negative integers")
    if style is not None and style not in STYLES:
        raise ParamError(f"expected a style of {', '.join(STYLES)}, got {style!r}; choose one of them")
    if duration_s is not None and not MIN_DURATION_S <= duration_s <= 600:
        raise ParamError(f"expected duration_s from {MIN_DURATION_S:.0f} to 600, got {duration_s}; change it")
    if tempo_bpm is not None and not MIN_TEMPO_BPM <= tempo_bpm <= MAX_TEMPO_BPM:
        raise ParamError(f"expected tempo_bpm from {MIN_TEMPO_BPM} to {MAX_TEMPO_BPM}, got {tempo_bpm}; change it")
    rng = np.random.default_rng([seed, _STYLE])
    drawn_style = list(STYLES)[rng.integers(len(STYLES))]
    place, drawn_s = rng.random(), float(np.round(rng.uniform(40, 60), 2))
    how = STYLES[style or drawn_style]
    tempo = tempo_bpm or float(np.round(how.tempo_low + place * (how.tempo_high - how.tempo_low)))
    sevenths = rng.random() < how.sevenths
    form = write_form(np.random.default_rng([seed, _FORM]), tempo, duration_s or drawn_s, sevenths=sevenths)
    singer = draw_singer(np.random.default_rng([seed, _SINGER]))
    melody = write_melody(np.random.default_rng([seed, _MELODY]), form, singer.low_midi, singer.high_midi)
    arrangement = arrange(np.random.default_rng([seed, _ARRANGE]), form, how)
    texts = describe(np.random.default_rng([seed, _TEXT]), form, how)
    return Score(seed, how, form, singer, melody, arrangement, texts)


def _n_samples(score: Score) -> int:
    return round(score.form.duration_s * RATE_HZ)


def _fade_out(x: np.ndarray, seconds: float) -> np.ndarray:
    n = min(int(seconds * RATE_HZ), x.shape[-1])
    x[..., x.shape[-1] - n :] *= (0.5 + 0.5 * np.cos(np.pi * np.arange(1, n + 1) / n)).astype(np.float32)
    return x


def render_vocal(score: Score) -> np.ndarray:
    """Sing the melody of a score.

    Returns:
        [2, N] float32 at 48 kHz, peak at most 0.89; half of the songs carry a stereo hall, the others are
        mono.
    """
    rng = np.random.default_rng([score.seed, _VOICE])
    n = _n_samples(score)
    mono = np.zeros(n, np.float32)
    sung = render_voice(score.melody, score.singer, rng, RATE_HZ)
    sung = small_room(sung, RATE_HZ, score.singer.room, rng)
    mono[: min(n, len(sung))] = sung[:n]
    level = np.float32(10 ** (rng.uniform(-2, 6) / 20))
    stereo = np.stack([mono, mono]) * level
    if rng.random() < 0.5:
        wet = np.float32(10 ** (rng.uniform(-26, -14) / 20))
        response = hall(rng, RATE_HZ, float(rng.uniform(0.8, 1.6)))
        stereo += wet * np.stack([convolve(level * mono, side)[:n] for side in response])
    return _fade_out(below_full_scale(stereo), 0.03)


def _place(track: np.ndarray, start: int, sound: np.ndarray, gain: float) -> None:
    m = min(sound.shape[-1], track.shape[-1] - start)
    if m > 0:
        track[:, start : start + m] += np.float32(gain) * sound[..., :m]


def _pan(sound: np.ndarray, pan: float) -> np.ndarray:
    """Constant-power pan of [1, n] or balance of [2, n], to [2, n]."""
    angle = (pan + 1) * np.pi / 4
    gains = np.sqrt(2) * np.array([[np.cos(angle)], [np.sin(angle)]])
    return (sound * gains).astype(np.float32)


def _render_part(score: Score, part: str, tone: Tone) -> np.ndarray:
    """[2, N] of one pitched part; equal notes are rendered once."""
    track = np.zeros((2, _n_samples(score)), np.float32)
    instrument = score.arrangement.instruments[part]
    pan = getattr(score.style, part).pan
    cache: dict[tuple[int, float], np.ndarray] = {}
    for event in score.arrangement.events:
        if event.part != part:
            continue
        key = (event.midi, round(event.duration_s, 4))
        if key not in cache:
            cache[key] = _pan(play(instrument, event.midi, event.duration_s, tone), pan)
        _place(track, round(event.start_s * RATE_HZ), cache[key], event.velocity)
    return track


def _render_drums(score: Score, kit_seed: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """[2, N] the drums, and [2, N] without the bass drum: what goes to the room."""
    n = _n_samples(score)
    dry, rest = np.zeros((2, n), np.float32), np.zeros((2, n), np.float32)
    kit = draw_kit(kit_seed, sorted({hit.drum for hit in score.arrangement.hits}))
    panned = {name: [_pan(take[None], width * DRUMS[name][1]) for take in takes] for name, takes in kit.items()}
    for i, hit in enumerate(score.arrangement.hits):
        track = dry if hit.drum.startswith("kick") else rest
        _place(track, round(hit.start_s * RATE_HZ), panned[hit.drum][i % N_TAKES], hit.velocity)
    return dry + rest, rest


def _pump(score: Score, depth: float) -> np.ndarray:
    """[N] gain that ducks under every bass drum and recovers within a beat."""
    n = _n_samples(score)
    kicks = np.array([hit.start_s for hit in score.arrangement.hits if hit.drum.startswith("kick")])
    if not depth or not len(kicks):
        return np.ones(n, np.float32)
    # at 1 kHz, then smoothed: steps would click
    t = np.arange(n // 48 + 2) / 1000
    which = np.searchsorted(kicks, t + 0.004, side="right") - 1
    since = np.where(which >= 0, t + 0.004 - kicks[np.maximum(which, 0)], 10.0)
    gain = smooth(1 - depth * np.clip(1 - since / (0.8 * score.form.beat_s), 0, 1), 9)
    return np.interp(np.arange(n) / 48, np.arange(len(gain)), gain).astype(np.float32)


def render_accompaniment(score: Score) -> np.ndarray:
    """Play and mix the arrangement of a score.

    Returns:
        [2, N] float32 at 48 kHz, -16 dBFS RMS before peaks above 0.7 are bent under 0.98.
    """
    rng = np.random.default_rng([score.seed, _MIX])
    style = score.style
    kit_seed, width = int(rng.integers(1 << 31)), float(rng.uniform(0.6, 1.0))
    drums, rest = _render_drums(score, kit_seed, width)
    drums_gain = np.float32(10 ** ((style.drums_db + rng.uniform(-1.5, 1.5)) / 20))
    mix = drums * drums_gain
    send = 0.08 * drums_gain * rest
    duck = _pump(score, style.pump)
    for part in ("bass", "comp", "arp", "pad", "lead"):
        place = getattr(style, part)
        tone = Tone(
            dark=float(rng.uniform(0.85, 1.2)),
            decay=float(rng.uniform(0.8, 1.3)),
            detune=float(rng.uniform(0.6, 1.5)),
            seed=int(rng.integers(1 << 31)),
        )
        gain = np.float32(10 ** ((place.gain_db + rng.uniform(-1.5, 1.5)) / 20))
        if any(event.part == part for event in score.arrangement.events):
            track = _render_part(score, part, tone) * gain
            if part in ("comp", "pad"):
                track *= duck
            mix += track
            send += track * np.float32(10 ** (place.send_db / 20) * 4)
    response = hall(rng, RATE_HZ, style.hall_s * float(rng.uniform(0.8, 1.2)))
    mix += 0.35 * reverberate(send, response)
    mix *= np.float32(MIX_RMS / max(float(np.sqrt(np.mean(mix**2))), 1e-9))
    return _fade_out(soft_limit(mix), 0.05)


def make_song(
    seed: int, *, style: str | None = None, duration_s: float | None = None, tempo_bpm: float | None = None
) -> Song:
    """Compose and render a song; arguments and errors are those of `compose`."""
    score = compose(seed, style=style, duration_s=duration_s, tempo_bpm=tempo_bpm)
    beats = score.form.beats_s()
    return Song(
        vocal=render_vocal(score),
        accompaniment=render_accompaniment(score),
        beats_s=beats,
        downbeats_s=beats[::4],
        chords=score.form.chords(),
        sections=score.form.sections(),
        style=score.style.name,
        tempo_bpm=score.form.tempo_bpm,
        key=str(score.form.key),
        texts=score.texts,
        melody=score.melody,
    )
