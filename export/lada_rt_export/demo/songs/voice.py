"""A singing synthesiser: glottal pulses and breath through moving formants. Needs numpy alone.

The excitation is a train of band-limited pulses (one windowed sinc per glottal period, placed between
samples) and white noise. Both are cut into 20 ms Hann frames, multiplied in the frequency domain by the
glottal spectrum and by the vocal tract of that moment, and added up again: a time-varying filter without
recursion, hence all of it runs as array operations and nothing aliases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lada_rt.errors import ParamError

from lada_rt_export.demo.songs.effects import below_full_scale, small_room, smooth
from lada_rt_export.demo.songs.form import Chord, Form, Key, Note, write_form
from lada_rt_export.demo.songs.melody import draw_syllable, write_melody
from lada_rt_export.demo.songs.singer import VOWELS, Consonant, Singer, draw_singer, parse_syllable

__all__ = ["PhraseScore", "phrase_score", "render_voice", "sing", "sing_phrase"]

CONTROL_HZ = 500
TAIL_S = 0.5
NEUTRAL_HZ = (500.0, 1500.0, 2500.0, 3500.0, 4500.0)
BLOCK_FRAMES = 256
_PULSE_HALF = 16
_LEVEL_RMS = 0.11
# second words of the seeds: singer and performance, and the score of a phrase
_SING, _SCORE = 0x5E1, 0x5E2


def _curve(points: list[tuple[float, float]], times_s: np.ndarray) -> np.ndarray:
    t, v = np.array(sorted(points, key=lambda p: p[0]), float).T
    return np.interp(times_s, t, v)


def _wander(rng: np.random.Generator, n: int, rate_hz: float, seconds: float) -> np.ndarray:
    """[n] slow noise of unit deviation whose memory is about `seconds`."""
    knots = rng.standard_normal(max(4, int(n / rate_hz / seconds) + 3))
    x = np.interp(np.arange(n) / rate_hz, np.arange(len(knots)) * seconds, knots)
    return smooth(x, int(seconds * rate_hz)) * 1.4


@dataclass(slots=True)
class _Tracks:
    """Control curves gathered note by note as (seconds, value)."""

    voice: list[tuple[float, float]]
    breath: list[tuple[float, float]]
    noise: list[tuple[float, float]]
    formants: list[tuple[float, tuple[float, float, float]]]
    damp: list[tuple[float, float]]
    hiss: list[tuple[float, float, float]]


def _onset_s(notes: Sequence[Note], i: int, consonant: Consonant) -> float:
    """Length of the consonant before note i: never more than a share of the note it takes its time from."""
    duration = consonant.duration_s
    if i and notes[i].start_s - (notes[i - 1].start_s + notes[i - 1].duration_s) < duration:
        duration = min(duration, 0.4 * (notes[i].start_s - notes[i - 1].start_s))
    return min(duration, notes[i].start_s)


def _gather(notes: Sequence[Note], singer: Singer, rng: np.random.Generator) -> _Tracks:
    tracks = _Tracks([(0.0, 0.0)], [(0.0, 0.0)], [(0.0, 0.0)], [], [(0.0, 0.0)], [])
    sounds = [parse_syllable(n.syllable or draw_syllable(rng)) for n in notes]
    onsets = [_onset_s(notes, i, sounds[i][0]) for i in range(len(notes))]
    for i, (note, (consonant, vowels), onset_s) in enumerate(zip(notes, sounds, onsets, strict=True)):
        start, end = note.start_s, note.start_s + note.duration_s
        next_onset = notes[i + 1].start_s - onsets[i + 1] if i + 1 < len(notes) else np.inf
        legato = next_onset <= end + 0.02
        end = max(min(end, next_onset), start + 0.3 * note.duration_s)
        before = notes[i - 1].start_s + notes[i - 1].duration_s if i else -np.inf
        attached = before > start - onset_s - 0.03
        begin = start - onset_s
        level = note.level
        if not attached:
            tracks.voice.append((max(begin - 0.01, 0.0), 0.0))
            gap_s = begin - max(before, 0.0)
            if gap_s > 0.3:
                _breathe(tracks, rng, begin, min(gap_s - 0.1, float(rng.uniform(0.2, 0.42))))
        # consonant, then a vowel that swells and decays
        attack = float(rng.uniform(0.025, 0.06))
        shape = float(rng.uniform(0.75, 1.05))
        if onset_s > 0:
            voiced = consonant.voice * level
            tracks.voice += [(begin + 0.3 * onset_s, voiced), (start - 0.1 * onset_s, voiced)]
        tracks.voice += [
            (start + attack, 0.92 * level),
            (start + min(0.45 * note.duration_s, 0.25) + attack, level),
            (end - min(0.06, 0.2 * note.duration_s), shape * level),
        ]
        if not legato:
            tracks.voice.append((end + float(rng.uniform(0.03, 0.12)), 0.0))
        _articulate(tracks, consonant, level, begin, start)
        for k, vowel in enumerate(vowels):
            target = VOWELS[vowel]
            if k == 0:
                locus = tuple(a or b for a, b in zip(consonant.locus, target, strict=True))
                tracks.formants.append((begin, (locus[0], locus[1], locus[2])))
                tracks.formants.append((start - 0.2 * onset_s, (locus[0], locus[1], locus[2])))
                tracks.formants.append((start + 0.05, target))
            else:
                tracks.formants.append((start + 0.55 * note.duration_s, VOWELS[vowels[0]]))
                tracks.formants.append((start + 0.8 * note.duration_s, target))
        tracks.formants.append((max(end - 0.03, start + 0.05), VOWELS[vowels[-1]]))
        tracks.damp += [(begin - 0.01, 0.0), (begin + 0.01, consonant.damp)]
        tracks.damp += [(start - 0.01, consonant.damp), (start + 0.02, 0.0)]
    return tracks


def _breathe(tracks: _Tracks, rng: np.random.Generator, end_s: float, seconds: float) -> None:
    depth = float(np.exp(rng.uniform(np.log(0.008), np.log(0.05))))
    stop = end_s - float(rng.uniform(0.03, 0.07))
    begin = max(stop - seconds, 0.0)
    tracks.breath += [(begin, 0.0), (begin + 0.6 * (stop - begin), depth), (stop, 0.0)]
    tracks.formants += [(begin, VOWELS["uh"]), (stop, VOWELS["uh"])]


def _articulate(tracks: _Tracks, consonant: Consonant, level: float, begin: float, start: float) -> None:
    gain = consonant.noise * (0.5 + 0.5 * level)
    if gain > 0:
        if consonant.burst_s:
            burst = max(start - consonant.burst_s - (0.03 if consonant.breath else 0.0), begin)
            points = [
                (burst - 0.003, 0.0),
                (burst, gain),
                (burst + consonant.burst_s, 0.3 * gain),
                (start, 0.0),
            ]
        else:
            points = [
                (begin, 0.0),
                (begin + 0.4 * (start - begin), gain),
                (start - 0.012, gain),
                (start + 0.012, 0),
            ]
        tracks.noise += points
        tracks.hiss.append((begin - 0.02, consonant.noise_hz, consonant.noise_width_hz))
    if consonant.breath:
        first = start - 0.035 if consonant.burst_s else begin
        tracks.breath += [(first - 0.01, 0.0), (start - 0.02, consonant.breath * level), (start + 0.03, 0.0)]


def _pitch_curve(notes: Sequence[Note], singer: Singer, rng: np.random.Generator, n: int) -> np.ndarray:
    """[n] MIDI pitch at CONTROL_HZ: portamento, scoops, vibrato with a delayed onset, drift."""
    t = np.arange(n) / CONTROL_HZ
    ends = np.array([note.start_s + note.duration_s for note in notes])
    starts = np.array([note.start_s for note in notes])
    switches = np.maximum(starts[1:] - 0.25 * singer.portamento_s, 0.5 * (starts[1:] + ends[:-1]) - 0.1)
    switches = np.minimum(switches, starts[1:])
    which = np.searchsorted(switches, t, side="right")
    intonation = np.clip(rng.normal(0, 5, len(notes)), -10, 10) / 100
    midi = smooth(
        np.array([note.midi for note in notes])[which] + intonation[which],
        int(singer.portamento_s * CONTROL_HZ),
    )
    since = t - starts[which]
    left = ends[which] - t
    scooped = rng.random(len(notes)) < singer.scoop_share
    depth = singer.scoop_cents / 100 * scooped * rng.uniform(0.4, 1.0, len(notes))
    midi -= depth[which] * np.exp(-np.maximum(since, 0) / 0.045) * (since > -0.15)
    vibrato_hz = singer.vibrato_hz * (1 + 0.05 * _wander(rng, n, CONTROL_HZ, 0.4))
    ramp = np.clip((since - singer.vibrato_delay_s) / 0.3, 0, 1) * np.clip((left + 0.05) / 0.1, 0, 1)
    swing = ramp * (singer.vibrato_cents / 100) * (1 + 0.15 * _wander(rng, n, CONTROL_HZ, 0.5))
    midi += smooth(swing, 25) * np.sin(2 * np.pi * np.cumsum(vibrato_hz) / CONTROL_HZ + rng.uniform(0, 6.28))
    midi += 0.03 * _wander(rng, n, CONTROL_HZ, 0.15) + 0.02 * _wander(rng, n, CONTROL_HZ, 0.7)
    return midi


def _pulses(
    f0_hz: np.ndarray, gain: np.ndarray, singer: Singer, rng: np.random.Generator, rate_hz: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pulse train [n] of unit power at unit gain, and the phase [n] in periods."""
    n = len(f0_hz)
    phase = np.cumsum(f0_hz / rate_hz)
    marks = np.interp(np.arange(1, int(phase[-1])), phase, np.arange(n))
    at = marks.astype(np.int64)
    period = rate_hz / f0_hz[at]
    marks = marks + singer.jitter * period * rng.standard_normal(len(marks))
    strength = gain[at] * np.sqrt(period) * (1 + singer.shimmer * rng.standard_normal(len(marks)))
    keep = (gain[at] > 1e-4) & (marks > _PULSE_HALF) & (marks < n - _PULSE_HALF - 2)
    marks, strength = marks[keep], strength[keep]
    reach = np.arange(-_PULSE_HALF + 1, _PULSE_HALF + 1)
    base = np.floor(marks).astype(np.int64)
    offset = reach[None, :] - (marks - base)[:, None]  # [pulses, taps]
    taps = 0.9 * np.sinc(0.9 * offset) * np.cos(0.5 * np.pi * offset / (_PULSE_HALF + 1)) ** 2
    where = (base[:, None] + reach[None, :]).ravel()
    return np.bincount(where, (taps * strength[:, None]).ravel(), minlength=n)[:n], phase


def _resonators(centres_hz: np.ndarray, widths_hz: np.ndarray, z1: np.ndarray, rate_hz: int) -> np.ndarray:
    """[frames, bins] complex64 response of a cascade of two-pole resonators of unit gain at 0 Hz."""
    out = np.ones((len(centres_hz), len(z1)), np.complex64)
    z2 = z1 * z1
    radius = np.exp(-np.pi * widths_hz / rate_hz)
    b1 = -2 * radius * np.cos(2 * np.pi * centres_hz / rate_hz)
    b2 = radius * radius
    for k in range(centres_hz.shape[1]):
        gain = (1 + b1[:, k] + b2[:, k])[:, None]
        p, q = (b1[:, k] / gain[:, 0])[:, None], (b2[:, k] / gain[:, 0])[:, None]
        out *= p.astype(np.float32) * z1 + q.astype(np.float32) * z2 + (1 / gain).astype(np.float32)
    return 1 / out


def _tract_shape(freqs_hz: np.ndarray, singer: Singer, rate_hz: int) -> np.ndarray:
    """[bins] what the five moving formants leave out: the poles above them, and the singer's colour."""
    z1 = np.exp(-2j * np.pi * freqs_hz / rate_hz).astype(np.complex64)
    neutral = np.array([NEUTRAL_HZ]) * singer.formant_scale
    flat = np.abs(_resonators(neutral, np.full((1, 5), 1300.0), z1, rate_hz))[0]
    colour = singer.brightness_db * np.exp(-0.5 * (np.log2(np.maximum(freqs_hz, 1) / 3000) / 0.7) ** 2)
    ripple = sum(
        2.5 * np.exp(-0.5 * ((freqs_hz - hz * singer.formant_scale) / 250) ** 2) for hz in (5600, 6700, 7900, 9200)
    )
    ripple = ripple + 11 / (1 + np.exp(-(freqs_hz - 4900 * singer.formant_scale) / 350))
    top = 1 / (1 + (freqs_hz / 13000) ** 6)
    return (10 ** ((colour + ripple) / 20) / np.maximum(flat, 1e-9) * top).astype(np.float32)


def render_voice(notes: Sequence[Note], singer: Singer, rng: np.random.Generator, rate_hz: int) -> np.ndarray:
    """Sing without a room.

    Args:
        notes: in order, not overlapping.
        singer: traits of the voice.
        rng: the only source of chance.
        rate_hz: sample rate.

    Returns:
        [n] float32, n = (end of the last note + 0.5 s) * rate_hz; about -19 dBFS while singing.
    """
    end_s = notes[-1].start_s + notes[-1].duration_s + TAIL_S
    n = round(end_s * rate_hz)
    hop = rate_hz // 100
    n_fft = 6 * hop
    n_frames = n // hop + 2
    tracks = _gather(notes, singer, rng)

    control_t = np.arange(int(end_s * CONTROL_HZ) + 2) / CONTROL_HZ
    sample_t = np.arange(n_frames * hop + hop) / rate_hz
    midi = _pitch_curve(notes, singer, rng, len(control_t))
    f0_hz = np.interp(sample_t, control_t, 440.0 * 2 ** ((midi - 69) / 12))
    loud = smooth(_curve(tracks.voice, control_t), 9)
    sway = 10 ** (0.6 * _wander(rng, len(control_t), CONTROL_HZ, 0.25) / 20)
    gain = np.interp(sample_t, control_t, loud * sway)
    pulses, phase = _pulses(f0_hz, gain, singer, rng, rate_hz)
    air = singer.breathiness * gain * (0.6 + 0.4 * np.cos(2 * np.pi * phase))
    air += np.interp(sample_t, control_t, smooth(_curve(tracks.breath, control_t), 7))
    white = rng.standard_normal(len(sample_t), dtype=np.float32)
    hiss = white * _curve(tracks.noise, sample_t)

    frame_t = np.arange(n_frames) / 100.0
    freqs = np.arange(n_fft // 2 + 1) * (rate_hz / n_fft)
    z1 = np.exp(-2j * np.pi * freqs / rate_hz).astype(np.complex64)
    centres = np.stack(
        [smooth(_curve([(t, f[k]) for t, f in tracks.formants], frame_t), 5) for k in range(3)]
        + [np.full(n_frames, 3450.0), np.full(n_frames, 4400.0)],
        axis=1,
    )  # [frames, 5]
    centres = centres * singer.formant_scale * (1 + 0.01 * np.stack([_wander(rng, n_frames, 100, 0.3)] * 5, axis=1))
    f0_frames = np.interp(frame_t, sample_t, f0_hz)
    # a singer opens the mouth rather than let the first formant fall below the fundamental
    centres[:, 0] = np.maximum(centres[:, 0], 1.05 * f0_frames)
    widths = np.array([80.0, 95.0, 130.0, 170.0, 260.0]) * singer.bandwidth_scale * np.ones_like(centres)
    tract_shape = _tract_shape(freqs, singer, rate_hz)
    effort = np.clip(np.interp(frame_t, control_t, loud), 0.05, 1.3)
    damp_db = np.maximum(_curve(tracks.damp, frame_t), 0)
    hiss_shape = _hiss_shapes(tracks.hiss, frame_t, freqs)

    window = np.hanning(2 * hop + 1)[:-1].astype(np.float32)
    out = np.zeros((n_frames + 6) * hop, np.float32)
    for first in range(0, n_frames - 1, BLOCK_FRAMES):
        rows = np.arange(first, min(first + BLOCK_FRAMES, n_frames - 1))
        frames = rows[:, None] * hop + np.arange(2 * hop)[None, :]
        source = np.fft.rfft(pulses[frames].astype(np.float32) * window, n_fft)
        source *= _glottis(freqs, f0_frames[rows], effort[rows], damp_db[rows], singer)
        breath = np.fft.rfft((white * air)[frames].astype(np.float32) * window, n_fft)
        source += breath * (freqs / (freqs + 900.0)).astype(np.float32)
        source *= _resonators(centres[rows], widths[rows], z1, rate_hz) * tract_shape
        used = np.flatnonzero(np.abs(hiss[frames]).max(axis=1) > 0)
        if len(used):
            spectrum = np.fft.rfft(hiss[frames[used]].astype(np.float32) * window, n_fft)
            source[used] += spectrum * hiss_shape[rows[used]]
        y = np.fft.irfft(source, n_fft).reshape(len(rows), 6, hop)
        for j in range(6):
            out[(first + j) * hop : (first + j + len(rows)) * hop] += y[:, j].ravel().astype(np.float32)
    out = out[:n]
    singing = gain[:n] > 0.3
    rms = np.sqrt(np.mean(out[singing] ** 2)) if singing.any() else 1.0
    return out * np.float32(_LEVEL_RMS / max(float(rms), 1e-9))


def _glottis(
    freqs_hz: np.ndarray, f0_hz: np.ndarray, effort: np.ndarray, damp_db: np.ndarray, singer: Singer
) -> np.ndarray:
    """[frames, bins] float32 magnitude of the radiated glottal pulse: rises to the glottal formant, falls by
    6 dB per octave above it and faster above `tilt_hz`, which moves up with effort."""
    f = freqs_hz.astype(np.float32)[None, :]
    peak = (f0_hz * (0.75 / singer.open_quotient)).astype(np.float32)[:, None]
    tilt = (singer.tilt_hz * (0.35 + 0.65 * effort)).astype(np.float32)[:, None]
    damp = (10 ** (-damp_db / 20)).astype(np.float32)[:, None]
    x = f / peak
    body = 2 * x / (1 + x * x) / np.sqrt(1 + (f / tilt) ** 2)
    over = 1 / (1 + (f / 700.0) ** 2)
    return body * (damp + (1 - damp) * over)


def _hiss_shapes(hiss: list[tuple[float, float, float]], frame_t: np.ndarray, freqs_hz: np.ndarray) -> np.ndarray:
    """[frames, bins] float32 colour of consonant noise: that of the latest consonant."""
    if not hiss:
        return np.zeros((len(frame_t), 1), np.float32)
    begin, centre, width = np.array(hiss).T
    bank = np.exp(-0.5 * ((freqs_hz[None, :] - centre[:, None]) / width[:, None]) ** 2) + 0.03
    bank *= (freqs_hz / (freqs_hz + 300.0))[None, :] / (1 + (freqs_hz / 14000.0) ** 8)[None, :]
    latest = np.maximum(np.searchsorted(begin, frame_t, side="right") - 1, 0)
    return bank.astype(np.float32)[latest]


def _check(notes: Sequence[Note], rate_hz: int, seed: int) -> None:
    if not notes:
        raise ParamError("expected at least one note to sing, got none; pass a melody")
    if not 16000 <= rate_hz <= 96000:
        raise ParamError(f"expected rate_hz from 16000 to 96000, got {rate_hz}; resample afterwards")
    if seed < 0:
        raise ParamError(f"expected seed >= 0, got {seed}; seeds are non-negative integers")
    end_s = 0.0
    for i, note in enumerate(notes):
        if note.start_s < end_s - 1e-6 or note.duration_s <= 0:
            raise ParamError(f"expected notes in order without overlap, got a clash at note {i}; sort and shorten them")
        if not 30 <= note.midi <= 96:
            raise ParamError(f"expected pitches from MIDI 30 to 96, got {note.midi} at note {i}; transpose it")
        try:
            parse_syllable(note.syllable or "-a")
        except KeyError:
            raise ParamError(f"expected onset-vowel, got {note.syllable!r}; see CONSONANTS and VOWELS") from None
        end_s = note.start_s + note.duration_s


def sing(notes: Sequence[Note], *, rate_hz: int = 48000, seed: int) -> np.ndarray:
    """Sing a melody with the singer of this seed.

    Args:
        notes: in order, not overlapping; empty syllables are drawn.
        rate_hz: 16000 to 96000.
        seed: chooses the singer and every imperfection; the same seed gives the same samples.

    Returns:
        [n] float32 below 1, n = (end of the last note + 0.5 s) * rate_hz.

    Raises:
        ParamError: no notes, overlapping notes, a pitch or syllable out of range, a bad rate or seed.
    """
    _check(notes, rate_hz, seed)
    rng = np.random.default_rng([seed, _SING])
    singer = draw_singer(rng)
    dry = render_voice(notes, singer, rng, rate_hz)
    wet = small_room(dry, rate_hz, singer.room, rng)
    return below_full_scale(wet)


@dataclass(frozen=True, slots=True)
class PhraseScore:
    """What `sing_phrase` sings: form (key, tempo, beats), chords and notes."""

    form: Form
    key: Key
    tempo_bpm: float
    chords: list[Chord]
    notes: list[Note]


def phrase_score(duration_s: float, seed: int) -> PhraseScore:
    """Write a phrase of `duration_s` seconds in the range of the singer of this seed.

    Raises:
        ParamError: shorter than four seconds, or a negative seed.
    """
    if duration_s < 4 or seed < 0:
        raise ParamError(f"expected duration_s >= 4 and seed >= 0, got {duration_s} and {seed}; sing longer")
    singer = draw_singer(np.random.default_rng([seed, _SING]))
    rng = np.random.default_rng([seed, _SCORE])
    tempo = float(np.round(rng.uniform(84, 124)))
    form = write_form(rng, tempo, duration_s, sevenths=False)
    bars = tuple(type(bar)(0, i, bar.chords) for i, bar in enumerate(form.bars))
    form = Form(form.key, tempo, form.offset_s, duration_s, bars, ("verse",))
    notes = write_melody(rng, form, singer.low_midi, singer.high_midi)
    return PhraseScore(form, form.key, tempo, form.chords(), notes)


def sing_phrase(duration_s: float, seed: int) -> np.ndarray:
    """Sing a phrase made up from the seed: melody, syllables and singer.

    Returns:
        [duration_s * 48000] float32 at 48 kHz.

    Raises:
        ParamError: shorter than four seconds, or a negative seed.
    """
    audio = sing(phrase_score(duration_s, seed).notes, seed=seed)
    out = np.zeros(round(duration_s * 48000), np.float32)
    n = min(len(out), len(audio))
    out[:n] = audio[:n]
    return out
