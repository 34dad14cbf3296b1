"""From a form and a style to events: who plays what, when and how loud. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lada_rt_export.demo.songs.form import QUALITIES, Form
from lada_rt_export.demo.songs.styles import Style

__all__ = ["Arrangement", "Event", "Hit", "arrange", "describe", "voicing"]

STEPS = 16
_VELOCITY = {"X": 1.0, "x": 0.78, "o": 0.42}


@dataclass(frozen=True, slots=True)
class Event:
    """One note of a pitched part (`part` is bass, comp, arp, pad or lead)."""

    part: str
    start_s: float
    duration_s: float
    midi: int
    velocity: float


@dataclass(frozen=True, slots=True)
class Hit:
    """One stroke on a drum."""

    drum: str
    start_s: float
    velocity: float


@dataclass(slots=True)
class Arrangement:
    """All events, the instrument of each part, and where the pump of the bass drum ducks the pads."""

    instruments: dict[str, str]
    events: list[Event] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)


def voicing(root: int, quality: str, centre: int) -> list[int]:
    """Close voicing: every chord tone in the octave around `centre`, so that neighbours lead smoothly."""
    low = centre - 6
    return sorted(low + (root + step - low) % 12 for step in QUALITIES[quality])


def _near(pitch_class: int, low: int) -> int:
    return low + (pitch_class - low) % 12


class _Writer:
    """Writes bars into an arrangement, with swing and the small errors of hands."""

    def __init__(self, form: Form, style: Style, rng: np.random.Generator) -> None:
        self.form, self.style, self.rng = form, style, rng
        self.swing = style.swing * float(rng.uniform(0.5, 1.3))
        self.loose_s = float(rng.uniform(0.0015, 0.005))
        pick = {part: getattr(style, part).instruments for part in ("bass", "comp", "arp", "pad", "lead")}
        self.out = Arrangement({part: names[rng.integers(len(names))] for part, names in pick.items()})

    def time_s(self, bar: int, step: float) -> float:
        late = self.swing if int(step) % 2 else 0.0
        slip = float(np.clip(self.rng.normal(0, self.loose_s), -0.012, 0.012))
        return max(self.form.time_s(bar, (step + late) / 4) + slip, 0.0)

    def velocity(self, base: float) -> float:
        return base * float(self.rng.uniform(0.9, 1.08))

    def drums(self, bar: int, patterns: dict[str, str], gain: float) -> None:
        for drum, pattern in patterns.items():
            shift = STEPS * (self.form.bars[bar].index % 2) if len(pattern) == 2 * STEPS else 0
            for step in range(STEPS):
                stroke = pattern[step + shift]
                if stroke != ".":
                    self.hit(bar, step, drum, gain * _VELOCITY[stroke])

    def hit(self, bar: int, step: int, drum: str, velocity: float) -> None:
        self.out.hits.append(Hit(drum, self.time_s(bar, step), self.velocity(velocity)))

    def note(self, part: str, bar: int, step: float, steps: float, midi: int, velocity: float) -> None:
        duration_s = steps * self.form.beat_s / 4
        self.out.events.append(Event(part, self.time_s(bar, step), duration_s, midi, self.velocity(velocity)))

    def bass(self, bar: int, line: str, gain: float) -> None:
        tokens = [token.split(":") for token in line.split()]
        for first, steps, tone in tokens:
            step = int(first)
            root, quality = self.form.bars[bar].chord_at(step / 4)
            low = _near(root, 28)
            third = QUALITIES[quality][1]
            midi = {"R": low, "3": low + third, "5": low + 7, "8": low + 12}.get(tone, low)
            if tone == "a" and bar + 1 < len(self.form.bars):
                target = _near(self.form.bars[bar + 1].chord_at(0)[0], 28)
                scale = self.form.key.pitch_classes
                below = next(d for d in (1, 2, 3) if (target - d) % 12 in scale)
                midi = target - below if target - below >= 28 else low + 7
            self.note("bass", bar, step, int(steps) * 0.92, midi, gain * (1.0 if step % 4 == 0 else 0.88))

    def chords(self, bar: int, pattern: str, gain: float) -> None:
        shift = STEPS * (self.form.bars[bar].index % 2) if len(pattern) == 2 * STEPS else 0
        strum_s = 0.012 if "guitar" in self.out.instruments["comp"] else 0.003
        for step in range(STEPS):
            stroke = pattern[step + shift]
            if stroke == ".":
                continue
            root, quality = self.form.bars[bar].chord_at(step / 4)
            if self.out.instruments["comp"] == "power_chord":
                notes = [_near(root, self.style.comp_centre - 5)]
            else:
                notes = voicing(root, quality, self.style.comp_centre)
            after = next((s for s in range(step + 1, STEPS) if pattern[s + shift] != "."), STEPS)
            steps = min(after - step, self.style.comp_steps) * 0.95
            start = self.time_s(bar, step)
            velocity = self.velocity(gain * _VELOCITY[stroke] / np.sqrt(len(notes)) * 1.4)
            for i, midi in enumerate(notes):
                duration = steps * self.form.beat_s / 4
                self.out.events.append(Event("comp", start + i * strum_s, duration, midi, velocity))

    def arpeggio(self, bar: int, pattern: str, gain: float) -> None:
        for step in range(STEPS):
            voice = pattern[step % len(pattern)]
            if voice == ".":
                continue
            root, quality = self.form.bars[bar].chord_at(step / 4)
            notes = voicing(root, quality, self.style.arp_centre)
            notes = [*notes, notes[0] + 12][:4]
            midi = notes[min(int(voice), len(notes) - 1)]
            if voice == "0" and self.style.name == "ballad":
                midi = _near(root, 43)  # the thumb plays the root below
            self.note("arp", bar, step, self.style.arp_steps, midi, gain * (1.0 if step % 4 == 0 else 0.8))

    def scratch(self, bar: int, gain: float) -> None:
        """Short muted sixteenths, as a rhythm guitar does between the beats."""
        root, quality = self.form.bars[bar].chord_at(0)
        for step in (2, 3, 6, 7, 10, 11, 14):
            root, quality = self.form.bars[bar].chord_at(step / 4)
            for midi in voicing(root, quality, self.style.arp_centre)[-3:]:
                self.note("arp", bar, step, 0.5 if step % 2 else 0.8, midi, 0.55 * gain)

    def pad(self, bar: int, gain: float) -> None:
        chords = self.form.bars[bar].chords
        for i, (first, root, quality) in enumerate(chords):
            last = chords[i + 1][0] if i + 1 < len(chords) else 4.0
            notes = voicing(root, quality, 62)
            for midi in notes:
                self.note("pad", bar, 4 * first, 4 * (last - first), midi, gain / np.sqrt(len(notes)) * 1.6)

    def lead(self, bar: int, motif: list[tuple[int, int]], gain: float) -> None:
        """Answer the missing voice: a rhythm that repeats, on chord tones."""
        for i, (step, steps) in enumerate(motif):
            root, quality = self.form.bars[bar].chord_at(step / 4)
            notes = voicing(root, quality, 76 if self.out.instruments["lead"] != "organ" else 72)
            midi = notes[(i + self.form.bars[bar].index) % len(notes)]
            self.note("lead", bar, step, steps * 0.95, midi, gain)


_MOTIFS = (
    [(0, 3), (3, 3), (6, 2), (8, 6)],
    [(0, 4), (4, 2), (6, 2), (8, 4), (12, 4)],
    [(2, 2), (4, 4), (8, 2), (10, 6)],
    [(0, 6), (6, 2), (8, 8)],
)


def arrange(rng: np.random.Generator, form: Form, style: Style) -> Arrangement:
    """Write the accompaniment.

    Verse and outro are calm, chorus full; the lead plays in intro and interlude, where nobody sings; a fill
    ends a section, and the last bar is one held chord.
    """
    w = _Writer(form, style, rng)
    calm = style.calm[rng.integers(len(style.calm))]
    full = style.full[rng.integers(len(style.full))]
    line = style.bass_lines[rng.integers(len(style.bass_lines))]
    comp = style.comp_patterns[rng.integers(len(style.comp_patterns))]
    arp = style.arp_patterns[rng.integers(len(style.arp_patterns))]
    motif = _MOTIFS[rng.integers(len(_MOTIFS))]
    for b, bar in enumerate(form.bars):
        name = form.section_names[bar.section]
        busy = name in ("chorus", "interlude")
        last_of_section = b + 1 < len(form.bars) and form.bars[b + 1].section != bar.section
        gain = 1.0 if busy else 0.85
        if b == len(form.bars) - 1 and b:
            _end(w, b)
            continue
        if last_of_section and bar.index and (busy or calm):
            kept = {k: v for k, v in (full if busy else calm).items() if k not in style.fill}
            w.drums(b, kept | style.fill, gain)
        else:
            w.drums(b, full if busy else calm, gain)
        if bar.index == 0 and busy:
            w.hit(b, 0, "crash" if style.name in ("rock", "synthpop", "funk") else "ride", 0.9)
        w.bass(b, line, gain)
        w.chords(b, comp, gain if busy else 0.8 * gain)
        if style.name == "funk":
            w.scratch(b, gain if busy else 0.7 * gain)
        elif arp != "." and (busy or style.name in ("ballad", "synthpop")):
            w.arpeggio(b, arp, gain)
        if busy or style.pad_calm:
            w.pad(b, gain if busy else 0.8 * gain)
        if name in ("intro", "interlude"):
            w.lead(b, motif, gain)
    return w.out


def _end(w: _Writer, bar: int) -> None:
    root, quality = w.form.bars[bar].chord_at(0)
    left = max((w.form.duration_s - w.form.time_s(bar)) / (w.form.beat_s / 4) - 2, 4.0)
    w.note("bass", bar, 0, left, _near(root, 28), 0.9)
    power = w.out.instruments["comp"] == "power_chord"
    notes = [_near(root, w.style.comp_centre - 5)] if power else voicing(root, quality, w.style.comp_centre)
    for midi in notes:
        w.note("comp", bar, 0, left, midi, 1.3 / np.sqrt(len(notes)))
    for midi in voicing(root, quality, 62):
        w.note("pad", bar, 0, left, midi, 0.7)
    if w.style.name == "ballad":
        for i, midi in enumerate(voicing(root, quality, w.style.arp_centre)):
            w.note("arp", bar, i, left - i, midi, 0.8)
    elif w.style.name in ("synthpop", "rock", "funk"):
        w.hit(bar, 0, "kick", 0.9)
        w.hit(bar, 0, "crash", 0.8)
    else:
        w.hit(bar, 0, "rim", 0.7)


_MOODS = {
    ("major", True): ("uplifting", "bright", "joyful", "energetic"),
    ("major", False): ("warm", "tender", "hopeful", "relaxed"),
    ("minor", True): ("dark", "tense", "driving", "restless"),
    ("minor", False): ("melancholic", "wistful", "sad", "moody"),
}


def describe(rng: np.random.Generator, form: Form, style: Style) -> list[str]:
    """Five descriptions: style and mood, instruments alone, a full sentence, tags, and tempo with style."""
    moods = _MOODS[form.key.mode, form.tempo_bpm > 105]
    mood, other = (str(m) for m in rng.choice(moods, 2, replace=False))
    name, second = (str(n) for n in rng.choice(style.names, 2, replace=False))
    one, two, three = (str(f) for f in rng.choice(style.features, 3, replace=False))
    pace = "slow" if form.tempo_bpm < 88 else "mid-tempo" if form.tempo_bpm < 118 else "fast"
    return [
        f"{mood} {name}",
        f"{one}, {two}",
        f"{pace} {name} song, {mood}, with {one} and {three}",
        f"{second}, {other}, {two}, {three}, {form.key.mode} key",
        f"{pace} {second}, {form.tempo_bpm:.0f} bpm",
    ]
