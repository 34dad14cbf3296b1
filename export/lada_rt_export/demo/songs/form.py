"""What a song is before it sounds: key, tempo, progressions, sections, beats and chords. Needs numpy alone.

Chord symbols are roman numerals; a progression is four bars, and a bar may hold two chords ("I,V"). Intro,
interlude and outro play the progressions of verse or chorus, so that harmony heard once can be expected
again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lada_rt.errors import ParamError

__all__ = ["QUALITIES", "Bar", "Chord", "Form", "Key", "Note", "Section", "pitch_name", "write_form"]

BEATS_PER_BAR = 4
PITCH_NAMES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")

#: semitones above the root
QUALITIES: dict[str, tuple[int, ...]] = {
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "min7": (0, 3, 7, 10),
}

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}

# (semitones above the tonic, triad, with the seventh)
_NUMERALS: dict[str, tuple[int, str, str]] = {
    "I": (0, "maj", "maj7"),
    "ii": (2, "min", "min7"),
    "iii": (4, "min", "min7"),
    "IV": (5, "maj", "maj7"),
    "V": (7, "maj", "7"),
    "vi": (9, "min", "min7"),
    "bVII": (10, "maj", "maj"),
    "i": (0, "min", "min7"),
    "iv": (5, "min", "min7"),
    "v": (7, "min", "min7"),
    "III": (3, "maj", "maj7"),
    "VI": (8, "maj", "maj7"),
    "VII": (10, "maj", "7"),
    "V7": (7, "7", "7"),
    "V/V": (2, "7", "7"),
    "V/vi": (4, "7", "7"),
    "V/ii": (9, "7", "7"),
    "V/IV": (0, "7", "7"),
    "V/iv": (0, "7", "7"),
    "V/III": (10, "7", "7"),
}

PROGRESSIONS = {
    "major": (
        "I V vi IV",
        "vi IV I V",
        "I vi IV V",
        "I IV vi V",
        "IV I V vi",
        "I iii IV V",
        "ii V I vi",
        "I ii vi V",
        "I V/vi vi IV",
        "I V/ii ii V",
        "IV V/vi vi I",
        "I IV V/V V",
        "I V/IV IV iv",
        "I bVII IV I",
        "I IV I,V vi",
        "vi ii V I",
    ),
    "minor": (
        "i VI III VII",
        "i VII VI VII",
        "i iv VII III",
        "i VI iv V7",
        "i VII VI V7",
        "i III VII iv",
        "VI VII i i",
        "i iv v i",
        "i V/iv iv V7",
        "VI V/III III VII",
        "iv VII III VI",
        "i VI iv,V7 i",
    ),
}


@dataclass(frozen=True, slots=True)
class Note:
    """One sung note. `midi` 69 is 440 Hz; `level` is linear; an empty `syllable` lets the singer choose."""

    start_s: float
    duration_s: float
    midi: float
    level: float = 1.0
    syllable: str = ""


@dataclass(frozen=True, slots=True)
class Chord:
    """A chord from `start_s` to `end_s`; `root` 0 is C, `quality` a key of QUALITIES."""

    start_s: float
    end_s: float
    root: int
    quality: str

    @property
    def triad(self) -> int:
        """0 to 11 for major triads from C, 12 to 23 for minor ones; sevenths count as their triads."""
        return self.root + (12 if self.quality in ("min", "min7") else 0)

    @property
    def pitch_classes(self) -> tuple[int, ...]:
        return tuple((self.root + step) % 12 for step in QUALITIES[self.quality])


@dataclass(frozen=True, slots=True)
class Section:
    """intro, verse, chorus, interlude or outro; `has_vocal` is False in intro and interlude."""

    name: str
    start_s: float
    end_s: float

    @property
    def has_vocal(self) -> bool:
        return self.name in ("verse", "chorus")


@dataclass(frozen=True, slots=True)
class Key:
    """A tonic pitch class and "major" or "minor"."""

    tonic: int
    mode: str

    def __str__(self) -> str:
        return f"{PITCH_NAMES[self.tonic]} {self.mode}"

    @property
    def pitch_classes(self) -> tuple[int, ...]:
        return tuple((self.tonic + step) % 12 for step in SCALES[self.mode])


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its section, its place in the section, and its chords as (first beat, root, quality)."""

    section: int
    index: int
    chords: tuple[tuple[float, int, str], ...]

    def chord_at(self, beat: float) -> tuple[int, str]:
        root, quality = self.chords[0][1:]
        for first, r, q in self.chords[1:]:
            if beat >= first - 1e-6:
                root, quality = r, q
        return root, quality


@dataclass(frozen=True, slots=True)
class Form:
    """The plan of a song; bar 0 starts at `offset_s`, and every bar has four beats."""

    key: Key
    tempo_bpm: float
    offset_s: float
    duration_s: float
    bars: tuple[Bar, ...]
    section_names: tuple[str, ...]

    @property
    def beat_s(self) -> float:
        return 60.0 / self.tempo_bpm

    def time_s(self, bar: int, beat: float = 0.0) -> float:
        return self.offset_s + (bar * BEATS_PER_BAR + beat) * self.beat_s

    def beats_s(self) -> np.ndarray:
        """[n_bars * 4] float64, seconds."""
        return self.offset_s + np.arange(len(self.bars) * BEATS_PER_BAR) * self.beat_s

    def sections(self) -> list[Section]:
        """Sections in order, without gaps from 0 to the end of the song."""
        firsts = [
            next(i for i, bar in enumerate(self.bars) if bar.section == s) for s in range(len(self.section_names))
        ]
        edges = [0.0] + [self.time_s(first) for first in firsts[1:]] + [self.duration_s]
        return [Section(name, edges[i], edges[i + 1]) for i, name in enumerate(self.section_names)]

    def chords(self) -> list[Chord]:
        """Chords in order, without gaps from 0 to the end of the song; neighbours that agree are joined."""
        flat = [(self.time_s(b, beat), r, q) for b, bar in enumerate(self.bars) for beat, r, q in bar.chords]
        merged = [c for i, c in enumerate(flat) if i == 0 or c[1:] != flat[i - 1][1:]]
        edges = [0.0] + [c[0] for c in merged[1:]] + [self.duration_s]
        return [Chord(edges[i], edges[i + 1], r, q) for i, (_, r, q) in enumerate(merged)]


def pitch_name(midi: int) -> str:
    """Name of a MIDI pitch, such as `C4` for 60."""
    return f"{PITCH_NAMES[midi % 12]}{midi // 12 - 1}"


def _lay_out(n_bars: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Sections and their bars, summing to `n_bars`; small songs drop sections, long ones grow at random
    places."""
    if n_bars < 4:
        return [("verse", n_bars)]
    if n_bars < 8:
        return [("intro", 1), ("verse", n_bars - 1)]
    if n_bars < 11:
        return [("intro", 2), ("verse", 4), ("outro", n_bars - 6)]
    # a short song has one verse and one chorus, a longer one comes back to its chorus after the interlude
    short = n_bars < 18
    names = ["intro", "verse", *([] if short else ["chorus"]), "interlude", "chorus", "outro"]
    counts = [2, 4, 2, 2 if n_bars < 14 else 4, 1] if short else [2, 4, 4, 2, 4, 2]
    rest = n_bars - sum(counts)
    while rest >= 2:
        place = int(rng.integers(len(names)))
        if names[place] in ("verse", "chorus"):
            if rest < 4:
                counts[0] += 2
                rest -= 2
            else:
                counts[place] += 4
                rest -= 4
        elif counts[place] < 4:
            counts[place] += 2
            rest -= 2
        elif rest >= 4 and "verse" not in names[2:]:
            after = names.index("interlude") + 1
            names.insert(after, "verse")
            counts.insert(after, 4)
            rest -= 4
    counts[-1] += rest
    return list(zip(names, counts, strict=True))


def _bars_of(progression: str, key: Key, sevenths: bool) -> list[tuple[tuple[float, int, str], ...]]:
    bars = []
    for symbol in progression.split():
        parts = symbol.split(",")
        chords = []
        for i, numeral in enumerate(parts):
            step, triad, seventh = _NUMERALS[numeral]
            chords.append((BEATS_PER_BAR * i / len(parts), (key.tonic + step) % 12, seventh if sevenths else triad))
        bars.append(tuple(chords))
    return bars


def write_form(
    rng: np.random.Generator, tempo_bpm: float, duration_s: float, *, sevenths: bool, mode: str | None = None
) -> Form:
    """Draw key, progressions and sections that fill `duration_s`.

    Args:
        rng: the only source of chance.
        tempo_bpm: 70 to 150.
        duration_s: at least one bar and a half second; what the bars leave over is the ring-out.
        sevenths: seventh chords in place of triads.
        mode: "major", "minor", or None to draw it.

    Raises:
        ParamError: the duration holds no bar.
    """
    bar_s = BEATS_PER_BAR * 60.0 / tempo_bpm
    offset_s = float(rng.uniform(0.02, 0.3))
    n_bars = int((duration_s - offset_s - 0.2) / bar_s)
    if n_bars < 1:
        raise ParamError(f"a song of {tempo_bpm:.0f} bpm needs at least {bar_s + 0.5:.1f} s, got {duration_s:.2f}")
    key = Key(int(rng.integers(12)), mode or ("major" if rng.random() < 0.6 else "minor"))
    bank = PROGRESSIONS[key.mode]
    first, second = rng.choice(len(bank), size=2, replace=False)
    progressions = {
        "verse": _bars_of(bank[first], key, sevenths),
        "chorus": _bars_of(bank[second], key, sevenths),
    }
    progressions["intro"] = progressions["verse"]
    progressions["interlude"] = progressions["chorus" if rng.random() < 0.5 else "verse"]
    progressions["outro"] = progressions["chorus"]
    plan = _lay_out(n_bars, rng)
    bars = [Bar(section, i, progressions[name][i % 4]) for section, (name, n) in enumerate(plan) for i in range(n)]
    step, triad, seventh = _NUMERALS["I" if key.mode == "major" else "i"]
    if n_bars > 1:
        home = ((0.0, (key.tonic + step) % 12, seventh if sevenths else triad),)
        bars[-1] = Bar(bars[-1].section, bars[-1].index, home)
    return Form(key, float(tempo_bpm), offset_s, float(duration_s), tuple(bars), tuple(name for name, _ in plan))
