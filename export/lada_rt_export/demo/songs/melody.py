"""A sung melody over a form. It outlines every chord it sings (root and third are among its notes), so that
the harmony can be inferred from the voice alone; blocks of four bars repeat as verses and choruses do. Needs
numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lada_rt_export.demo.songs.form import QUALITIES, Form, Note

__all__ = ["write_melody"]

BLOCK_BARS = 4

# onsets in beats; a bar that runs on, and a bar that ends a phrase and leaves room to breathe
_RUNNING = (
    (0, 1, 1.5, 2, 3),
    (0, 0.5, 1, 2, 3),
    (0, 1, 2, 2.5, 3, 3.5),
    (0, 0.5, 1, 1.5, 2, 3),
    (0, 1.5, 2, 3),
    (0, 1, 2, 3),
    (0, 0.5, 1.5, 2, 2.5, 3.5),
    (0, 1.5, 2.5, 3),
    (0, 0.5, 1, 2, 2.5, 3),
    (0.5, 1, 1.5, 2, 3),
)
_CLOSING = ((0, 1, 2), (0, 0.5, 1), (0, 1), (0, 1, 1.5, 2), (0, 0.5, 1.5), (0, 0.5, 1, 2))
_SLOW_RUNNING = ((0, 0.5, 0.75, 1, 2, 2.5, 3), (0, 0.75, 1.5, 2, 3, 3.5), (0, 0.25, 0.5, 1, 2, 2.5, 3))
_CLOSING_END = 3.0

_ONSETS = ("", "m", "n", "l", "r", "w", "y", "b", "d", "g", "p", "t", "k", "s", "sh", "f", "h", "v", "z")
_ONSET_WEIGHTS = np.array([5, 4, 4, 5, 3, 3, 2, 3, 4, 2, 2, 4, 3, 4, 2, 2, 3, 2, 1], float)
_VOWELS = ("a", "e", "i", "o", "u", "ae", "uh", "er", "ai", "ei", "ou")
_VOWEL_WEIGHTS = np.array([4, 3, 3, 3, 2, 2, 2, 1, 3, 3, 3], float)


@dataclass(frozen=True, slots=True)
class _Sung:
    bar: int
    beat: float
    beats: float
    midi: int
    level: float
    syllable: str


def draw_syllable(rng: np.random.Generator) -> str:
    """A consonant-like onset and a vowel, written `onset-vowel`."""
    onset = rng.choice(len(_ONSETS), p=_ONSET_WEIGHTS / _ONSET_WEIGHTS.sum())
    vowel = rng.choice(len(_VOWELS), p=_VOWEL_WEIGHTS / _VOWEL_WEIGHTS.sum())
    return f"{_ONSETS[onset]}-{_VOWELS[vowel]}"


def _rhythm(rng: np.random.Generator, tempo_bpm: float, n_bars: int) -> list[tuple[int, float, float]]:
    """(bar, beat, beats) of a block: phrases of two bars, the second phrase often in the rhythm of the
    first."""
    running = _RUNNING + (_SLOW_RUNNING if tempo_bpm < 92 else ())
    if tempo_bpm > 125:
        running = tuple(p for p in running if len(p) <= 5)
    phrase = [running[rng.integers(len(running))], _CLOSING[rng.integers(len(_CLOSING))]]
    bars = []
    for first in range(0, n_bars, 2):
        if first and rng.random() < 0.4:
            phrase = [running[rng.integers(len(running))], phrase[1]]
        bars += phrase[: n_bars - first]
    notes = []
    for b, onsets in enumerate(bars):
        closing = b % 2 == 1 or b == n_bars - 1
        ends = [*onsets[1:], _CLOSING_END + 0.5 * rng.integers(-1, 1) if closing else 4.0]
        for beat, end in zip(onsets, ends, strict=True):
            if end > beat:
                notes.append((b, float(beat), float(end - beat)))
    return notes


def _pitches(
    rng: np.random.Generator,
    rhythm: list[tuple[int, float, float]],
    chords: list[tuple[int, str]],
    scale: tuple[int, ...],
    low: int,
    high: int,
) -> list[int]:
    candidates = np.arange(low, high + 1)
    centre = low + (high - low) * rng.uniform(0.35, 0.6)
    midi = round(centre)
    out: list[int] = []
    for i, (bar, beat, _beats) in enumerate(rhythm):
        root, quality = chords[i]
        tones = [(root + step) % 12 for step in QUALITIES[quality]]
        # a tone of the chord replaces the scale's neighbour a semitone off (G# in E7 over A minor silences G)
        foreign = [t for t in tones if t not in scale]
        allowed = {s for s in scale if all((s - f) % 12 not in (1, 11) for f in foreign)} | set(tones)
        span = [j for j in range(i, len(rhythm)) if rhythm[j][0] == bar and chords[j] == chords[i]]
        heard = {out[j] % 12 for j in range(i) if rhythm[j][0] == bar and chords[j] == chords[i]}
        missing = {t for t in tones[:2] if t not in heard}
        if beat == 0 or (i and chords[i] != chords[i - 1]):
            pool = set(tones[:3])
        elif beat == int(beat) and rng.random() < 0.75:
            pool = set(tones)
        else:
            pool = allowed
        if len(missing) >= len(span):
            pool = missing
        pcs = candidates % 12
        usable = np.isin(candidates, [p for p in candidates if pcs[p - low] in pool])
        # an arch over the block: up to the middle, back at the end
        arch = centre + 4.0 * np.sin(np.pi * (i + 0.5) / len(rhythm)) - 1.0
        move = np.abs(candidates - midi)
        weight = usable * np.exp(-move / 2.2 - np.abs(candidates - arch) / 7.0) * np.where(move == 0, 0.45, 1.0)
        midi = int(rng.choice(candidates, p=weight / weight.sum()))
        out.append(midi)
    return out


def write_melody(rng: np.random.Generator, form: Form, low_midi: int, high_midi: int) -> list[Note]:
    """Write the sung notes of a form; sections without vocal stay empty.

    Args:
        rng: the only source of chance.
        low_midi, high_midi: the singer's range, at least an octave.

    Returns:
        Notes in order, never overlapping, with micro-timing, levels and syllables. A block of four bars that
        comes back (same section name, same place) comes back with its notes and syllables.
    """
    blocks: dict[tuple[str, int, int], list[_Sung]] = {}
    sung: list[_Sung] = []
    for first, bar in enumerate(form.bars):
        name = form.section_names[bar.section]
        if name not in ("verse", "chorus") or bar.index % BLOCK_BARS:
            continue
        n_bars = 1
        while n_bars < BLOCK_BARS and first + n_bars < len(form.bars):
            if form.bars[first + n_bars].section != bar.section:
                break
            n_bars += 1
        lift = 3 if name == "chorus" else 0
        which = (name, bar.index // BLOCK_BARS % 2, n_bars)
        if which not in blocks:
            rhythm = _rhythm(rng, form.tempo_bpm, n_bars)
            chords = [form.bars[first + b].chord_at(beat) for b, beat, _ in rhythm]
            midis = _pitches(rng, rhythm, chords, form.key.pitch_classes, low_midi + lift, high_midi - 3 + lift)
            base = 1.0 if name == "chorus" else 0.8
            blocks[which] = [
                _Sung(b, beat, beats, midi, base * float(rng.uniform(0.85, 1.1)), draw_syllable(rng))
                for (b, beat, beats), midi in zip(rhythm, midis, strict=True)
            ]
        sung += [_Sung(first + s.bar, s.beat, s.beats, s.midi, s.level, s.syllable) for s in blocks[which]]
    lag_s = rng.uniform(-0.004, 0.012)
    starts = [form.time_s(s.bar, s.beat) + lag_s + float(np.clip(rng.normal(0, 0.007), -0.02, 0.02)) for s in sung]
    notes = []
    for i, s in enumerate(sung):
        end_s = starts[i] + s.beats * form.beat_s * float(rng.uniform(0.93, 1.0))
        if i + 1 < len(sung):
            # near enough to the next note: sing legato into it
            gap_s = starts[i + 1] - end_s
            end_s = starts[i + 1] if gap_s < 0.09 else end_s
        notes.append(Note(starts[i], end_s - starts[i], float(s.midi), s.level, s.syllable))
    return notes
