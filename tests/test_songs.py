"""The song generator: what it says about a song (pitch, chords, beats, sections, style) is heard in it."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from lada_rt.errors import ParamError
from lada_rt_export.demo.songs import augment, drums, instruments
from lada_rt_export.demo.songs.form import QUALITIES, Note, write_form
from lada_rt_export.demo.songs.singer import draw_singer
from lada_rt_export.demo.songs.song import Song, compose, make_song, render_accompaniment
from lada_rt_export.demo.songs.styles import STYLES
from lada_rt_export.demo.songs.voice import phrase_score, render_voice, sing, sing_phrase

RATE = 48000


@cache
def song_of(style: str, seed: int = 7, duration_s: float = 32.0) -> Song:
    return make_song(seed, style=style, duration_s=duration_s)


def rms_db(x: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(x, dtype=np.float64)) + 1e-20))


def frames_of(x: np.ndarray, window: int, hop: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, window)[::hop]


def f0_of(x: np.ndarray) -> np.ndarray:
    """Fundamental per 60 ms frame: the first peak of the autocorrelation close to the highest."""
    window = int(0.06 * RATE)
    taper = np.hanning(window)
    size = 4 * window
    ideal = np.fft.irfft(np.abs(np.fft.rfft(taper, size)) ** 2)
    out = []
    for frame in frames_of(x, window, RATE // 100):
        acf = np.fft.irfft(np.abs(np.fft.rfft((frame - frame.mean()) * taper, size)) ** 2) / ideal.clip(1e-3)
        low, high = RATE // 900, RATE // 70
        part = acf[low:high]
        peaks = np.flatnonzero((part[1:-1] > part[:-2]) & (part[1:-1] >= part[2:])) + 1
        lag = int(peaks[np.flatnonzero(part[peaks] > 0.85 * part[peaks].max())[0]]) + low
        a, b, c = acf[lag - 1 : lag + 2]
        out.append(RATE / (lag + 0.5 * (a - c) / (a - 2 * b + c)))
    return np.array(out)


def chroma_of(x: np.ndarray, hop_s: float = 0.1) -> np.ndarray:
    """[12, frames] of compressed energy per pitch class between 110 and 1800 Hz."""
    window = 16384
    magnitude = np.abs(np.fft.rfft(frames_of(x, window, int(hop_s * RATE)) * np.hanning(window)))
    freqs = np.arange(magnitude.shape[1]) * RATE / window
    midi = 69 + 12 * np.log2(np.maximum(freqs, 1) / 440)
    used = (freqs > 110) & (freqs < 1800) & (np.abs(midi - np.round(midi)) < 0.3)
    classes = np.round(midi[used]).astype(int) % 12
    loud = np.sqrt(magnitude[:, used])
    return np.stack([loud[:, classes == c].mean(axis=1) for c in range(12)])


def onsets_of(x: np.ndarray) -> np.ndarray:
    """Times of the clear peaks of spectral flux, in seconds."""
    hop, window = 240, 1024
    log = np.log1p(100 * np.abs(np.fft.rfft(frames_of(x, window, hop) * np.hanning(window))))
    flux = np.maximum(np.diff(log, axis=0), 0).sum(axis=1)
    wide = np.lib.stride_tricks.sliding_window_view(np.pad(flux, 20), 41)
    peak = (flux == wide[:, 13:28].max(axis=1)) & (flux > wide.mean(axis=1) + 0.6 * flux.std())
    return (np.flatnonzero(peak) * hop + window * 0.6) / RATE


def test_same_seed_same_bits_other_seed_other_song() -> None:
    one, again, other = (make_song(s, duration_s=12.0) for s in (3, 3, 4))
    assert np.array_equal(one.vocal, again.vocal)
    assert np.array_equal(one.accompaniment, again.accompaniment)
    assert (one.chords, one.texts, one.melody) == (again.chords, again.texts, again.melody)
    assert not np.array_equal(one.vocal, other.vocal)
    assert not np.array_equal(one.accompaniment, other.accompaniment)


def test_a_style_changes_the_band_and_not_the_singer() -> None:
    scores = [compose(11, style=style, tempo_bpm=100, duration_s=20) for style in ("ballad", "synthpop")]
    assert scores[0].singer == scores[1].singer
    assert [n.start_s for n in scores[0].melody] == [n.start_s for n in scores[1].melody]
    assert scores[0].arrangement.instruments != scores[1].arrangement.instruments


@pytest.mark.parametrize("style", STYLES)
def test_tracks_are_sane(style: str) -> None:
    song = song_of(style)
    for track, peak in ((song.vocal, 0.89), (song.accompaniment, 0.98)):
        assert track.dtype == np.float32
        assert track.shape == (2, 32 * RATE)
        assert np.isfinite(track).all()
        assert np.abs(track).max() <= peak + 1e-4
        assert np.abs(track.mean(axis=1)).max() < 1e-3
        assert np.abs(track[:, -1]).max() < 1e-3
    assert rms_db(song.accompaniment) == pytest.approx(-16.0, abs=0.5)
    # limiting is rare
    assert np.mean(np.abs(song.accompaniment) > 0.7) < 0.005
    # both sides are heard, and they differ
    left, right = song.accompaniment
    assert abs(rms_db(left) - rms_db(right)) < 3
    assert rms_db(left - right) > rms_db(left) - 30


@pytest.mark.parametrize("style", STYLES)
def test_annotations_cover_the_song(style: str) -> None:
    song = song_of(style, 7, 45.0)
    assert 70 <= song.tempo_bpm <= 150
    chords = [(c.start_s, c.end_s) for c in song.chords]
    sections = [(s.start_s, s.end_s) for s in song.sections]
    for spans in (chords, sections):
        assert spans[0][0] == 0
        assert spans[-1][1] == 45.0
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
        assert all(end > start for start, end in spans)
    assert all(0 <= c.root < 12 and c.quality in QUALITIES for c in song.chords)
    names = [s.name for s in song.sections]
    assert names[0] == "intro"
    assert names[-1] == "outro"
    assert {"verse", "chorus", "interlude"} <= set(names)
    assert np.allclose(np.diff(song.beats_s), 60 / song.tempo_bpm)
    assert np.array_equal(song.downbeats_s, song.beats_s[::4])
    assert 43 - 4 * 60 / song.tempo_bpm < song.beats_s[-1] < 45
    assert len(set(song.texts)) >= 4
    assert song.style == style


def test_tempi_keys_and_styles_spread() -> None:
    scores = [compose(seed) for seed in range(80)]
    tempi = [s.form.tempo_bpm for s in scores]
    assert min(tempi) < 80
    assert max(tempi) > 135
    assert {s.style.name for s in scores} == set(STYLES)
    assert {s.form.key.tonic for s in scores} == set(range(12))
    assert {s.form.key.mode for s in scores} == {"major", "minor"}
    assert all(40 <= s.form.duration_s <= 60 for s in scores)
    # chords outside the key (secondary dominants, borrowed ones) occur, and are the exception
    foreign = [not set(c.pitch_classes) <= set(s.form.key.pitch_classes) for s in scores for c in s.form.chords()]
    assert 0.02 < np.mean(foreign) < 0.4


@pytest.mark.parametrize("n_bars", [*range(1, 40), 180])
def test_every_number_of_bars_makes_a_form(n_bars: int) -> None:
    form = write_form(np.random.default_rng(n_bars), 120.0, n_bars * 2.0 + 0.6, sevenths=False)
    assert len(form.bars) == n_bars
    assert form.sections()[-1].end_s == form.duration_s
    assert any(section.has_vocal for section in form.sections())


@pytest.mark.parametrize("style", STYLES)
def test_nobody_sings_in_intro_and_interlude(style: str) -> None:
    song = song_of(style, 7, 45.0)
    sung = rms_db(song.vocal)
    for section in song.sections:
        # breath and onset of the next section come early, the room's tail ends late
        first, last = int((section.start_s + 1.5) * RATE), int((section.end_s - 0.7) * RATE)
        level = rms_db(song.vocal[:, first:last])
        if section.name in ("intro", "interlude"):
            assert level < sung - 40
            assert rms_db(song.accompaniment[:, first:last]) > -22
        elif section.has_vocal:
            assert level > sung - 8


@pytest.mark.parametrize("seed", [1, 2, 5, 8])
def test_sung_pitch_is_the_written_pitch(seed: int) -> None:
    """Before the room, whose tail mixes notes."""
    score = compose(seed, duration_s=32.0)
    voice = render_voice(score.melody, score.singer, np.random.default_rng(seed), RATE)
    checked = 0
    for note in score.melody:
        if note.duration_s < 0.35:
            continue
        first = int((note.start_s + 0.14) * RATE)
        cents = 1200 * np.log2(f0_of(voice[first : int((note.start_s + 0.75 * note.duration_s) * RATE)]) / 440)
        cents -= 100 * (note.midi - 69)
        assert abs(np.median(cents)) < 30, note
        assert np.abs(cents).max() < 30 + 1.6 * score.singer.vibrato_cents, note
        checked += 1
    assert checked >= 8


def test_melody_outlines_the_chords() -> None:
    """Root and third of nearly every bar that is sung with three notes or more are among its notes."""
    told = []
    for seed in range(20):
        score = compose(seed)
        for chord in score.form.chords():
            notes = [n for n in score.melody if chord.start_s - 0.05 <= n.start_s < chord.end_s - 0.05]
            if len(notes) >= 3:
                told.append(set(chord.pitch_classes[:2]) <= {int(n.midi) % 12 for n in notes})
    assert len(told) > 100
    assert np.mean(told) > 0.9


def test_voice_sounds_like_one() -> None:
    """Harmonics fall with frequency as glottal pulses do, little lies above 16 kHz, and nothing clicks."""
    for seed in range(6):
        x = sing_phrase(8.0, seed)
        assert x.shape == (8 * RATE,)
        power = np.mean(np.abs(np.fft.rfft(frames_of(x, 4096, 2048) * np.hanning(4096))) ** 2, axis=0)
        freqs = np.arange(len(power)) * RATE / 4096

        def band(low: float, high: float, power: np.ndarray = power, freqs: np.ndarray = freqs) -> float:
            return float(10 * np.log10(power[(freqs >= low) & (freqs < high)].sum()))

        assert band(80, 1000) > band(1000, 4000) + 2
        assert band(1000, 4000) > band(5000, 10000) + 6
        assert band(16000, 24000) < band(80, 4000) - 35
        assert band(0, 50) < band(80, 4000) - 25
        assert np.abs(np.diff(x)).max() < 0.4


@pytest.mark.parametrize("seed", range(4))
def test_legato_vowels_do_not_click(seed: int) -> None:
    """Above 14 kHz a click stands out of the breath; changes of pitch, vowel and level must not."""
    syllables = ["-a", "m-e", "-i", "l-o", "-ai", "w-u", "-er", "-ou", "n-a", "r-ei"]
    midis = [57, 59, 61, 62, 69, 57, 60, 64, 62, 57]
    notes = [
        Note(0.3 + 0.4 * i, 0.4, m, 0.7 + 0.3 * (i % 2), s)
        for i, (m, s) in enumerate(zip(midis, syllables, strict=True))
    ]
    voice = render_voice(notes, draw_singer(np.random.default_rng(seed)), np.random.default_rng(seed), RATE)

    def loudest(x: np.ndarray) -> float:
        spectrum = np.fft.rfft(x)
        spectrum[: int(14000 * len(x) / RATE)] = 0
        level = np.sqrt(np.mean(frames_of(np.fft.irfft(spectrum, len(x)), 240, 120) ** 2, axis=1))
        return float(level.max() / np.percentile(level, 90))

    assert loudest(voice) < 3
    # the same with a step of a fifth of the peak: the test sees a click
    clicked = voice.copy()
    clicked[2 * RATE :] += 0.2 * np.abs(voice).max()
    assert loudest(clicked) > 4


def test_phrase_fits_its_score_and_needs_numpy_alone() -> None:
    score = phrase_score(10.0, 4)
    assert np.array_equal(sing_phrase(10.0, 4)[: 2 * RATE], sing(score.notes, seed=4)[: 2 * RATE])
    assert score.chords[-1].end_s == 10.0
    assert score.notes[-1].start_s + score.notes[-1].duration_s < 10.0
    code = (
        "import sys; from lada_rt_export.demo.songs.voice import sing_phrase; sing_phrase(4.0, 1);"
        "from lada_rt_export.demo.songs.song import make_song; make_song(1, duration_s=4.0);"
        "from lada_rt_export.demo.songs import augment;"
        "print([m for m in ('torch', 'scipy', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_voice_at_another_rate_is_the_same_voice() -> None:
    notes = [Note(0.2, 1.0, 60, syllable="m-a"), Note(1.2, 1.0, 64, syllable="l-e")]
    levels = [rms_db(sing(notes, rate_hz=rate, seed=2)) for rate in (24000, 44100, 48000)]
    assert max(levels) - min(levels) < 1.5
    assert len(sing(notes, rate_hz=44100, seed=2)) == round(2.7 * 44100)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sing([], seed=1),
        lambda: sing([Note(0, 1, 60)], seed=-1),
        lambda: sing([Note(0, 1, 60)], seed=1, rate_hz=8000),
        lambda: sing([Note(0, 1, 60), Note(0.5, 1, 62)], seed=1),
        lambda: sing([Note(0, 1, 12)], seed=1),
        lambda: sing([Note(0, 1, 60, syllable="x-q")], seed=1),
        lambda: sing_phrase(1.0, 1),
        lambda: make_song(1, style="polka"),
        lambda: make_song(1, duration_s=1.0),
        lambda: make_song(-1),
        lambda: compose(1, tempo_bpm=300),
        lambda: augment.augment_vocal(np.zeros(9000, np.float32), 1),
        lambda: augment.augment_vocal(np.zeros((1, 9000), np.float32), 1, strength=2),
        lambda: augment.shift_pitch(np.zeros((1, 9000), np.float32), 12),
        lambda: augment.shift_formants(np.zeros((1, 9000), np.float32), 3),
    ],
)
def test_bad_arguments_are_refused_in_one_line(call: object) -> None:
    assert callable(call)
    with pytest.raises(ParamError, match="expected") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("style", STYLES)
def test_accompaniment_plays_the_chords(style: str) -> None:
    """Chroma per chord agrees with its own tones and not with those of the song's other chords."""
    song = song_of(style)
    chroma = chroma_of(song.accompaniment.mean(axis=0))
    heard, tones = [], []
    for chord in song.chords:
        first, last = int(chord.start_s * 10) + 1, int(chord.end_s * 10) - 4
        if last > first:
            heard.append(chroma[:, first:last].mean(axis=1))
            tones.append(np.isin(np.arange(12), chord.pitch_classes).astype(float))
    table = np.array([[np.corrcoef(h, t)[0, 1] for t in tones] for h in heard])
    own = np.diag(table).mean()
    shuffled = table[~np.eye(len(table), dtype=bool)].mean()
    assert own > 0.7
    assert own > shuffled + 0.4


@pytest.mark.parametrize("style", STYLES)
def test_onsets_lie_on_the_grid(style: str) -> None:
    song = song_of(style)
    onsets = onsets_of(song.accompaniment.mean(axis=0))
    onsets = onsets[onsets < song.beats_s[-4]]
    assert len(onsets) > len(song.beats_s)
    position = (onsets - song.beats_s[0]) * song.tempo_bpm / 60  # beats
    sixteenth_s = 15 / song.tempo_bpm
    off_s = np.abs(position * 4 - np.round(position * 4)) * sixteenth_s
    # by chance, half would
    assert np.mean(off_s < 0.03) > 0.85
    on_beat = np.abs(onsets[None, :] - song.downbeats_s[1:-1, None]).min(axis=1)
    assert np.mean(on_beat < 0.03) > 0.8


def test_vocal_onsets_lie_on_the_grid() -> None:
    score = compose(21, duration_s=40.0)
    starts = np.array([n.start_s for n in score.melody])
    position = (starts - score.form.offset_s) / score.form.beat_s * 4
    assert np.abs((position - np.round(position)) * score.form.beat_s / 4).max() < 0.035


def style_features(x: np.ndarray) -> np.ndarray:
    """Mean and movement of the log energy in ten bands."""
    power = np.abs(np.fft.rfft(frames_of(x, 2048, 1024) * np.hanning(2048))) ** 2
    freqs = np.arange(power.shape[1]) * RATE / 2048
    edges = np.geomspace(40, 20000, 11)
    bands = np.stack([power[:, (freqs >= a) & (freqs < b)].sum(axis=1) for a, b in pairwise(edges)])
    log = np.log(bands + 1e-4)
    return np.concatenate([log.mean(axis=1), log.std(axis=1), np.abs(np.diff(log, axis=1)).mean(axis=1)])


def test_styles_can_be_told_apart() -> None:
    """A nearest-centroid rule over band energies, from four songs a style, names unheard songs."""

    def features(style: str, seed: int) -> np.ndarray:
        score = compose(seed, style=style, duration_s=10.0)
        return style_features(render_accompaniment(score).mean(axis=0))

    names = list(STYLES)
    known = np.stack([[features(s, 100 + i) for i in range(4)] for s in names])  # [styles, songs, features]
    spread = (known - known.mean(axis=1, keepdims=True)).std(axis=(0, 1))
    centres = known.mean(axis=1) / spread
    right = [
        int(np.argmin(np.square(features(s, 200 + i) / spread - centres).sum(axis=1))) == names.index(s)
        for s in names
        for i in range(2)
    ]
    assert np.mean(right) >= 0.85  # chance: 0.2


def test_texts_name_their_style_only() -> None:
    for style in STYLES.values():
        for other in STYLES.values():
            if other is not style:
                assert not set(style.names) & set(other.names)
                assert not set(style.features) & set(other.features)
        for seed in range(5):
            texts = compose(seed, style=style.name, duration_s=20).texts
            assert all(any(word in text for word in style.names + style.features) for text in texts)


@pytest.mark.parametrize("name", instruments.INSTRUMENTS)
def test_notes_are_in_tune_and_end_in_silence(name: str) -> None:
    midi = 40 if "bass" in name or name == "power_chord" else 64
    x = instruments.play(name, midi, 0.6, instruments.Tone())
    assert x.shape[0] in (1, 2)
    assert np.isfinite(x).all()
    assert np.abs(x[:, :2]).max() < 0.02
    assert np.abs(x[:, -2:]).max() < 1e-4
    assert np.abs(x.mean(axis=1)).max() < 2e-3
    hz = 440 * 2 ** ((midi - 69) / 12)
    f0 = np.median(f0_of(x[0, int(0.1 * RATE) : int(0.5 * RATE)]))
    octaves = np.log2(f0 / hz)
    # the organ's lowest drawbar sounds an octave below
    assert abs(1200 * (octaves - np.round(octaves))) < 20
    assert round(octaves) in ((-1, 0) if name == "organ" else (0,))


def test_drums_start_at_once_and_end_in_silence() -> None:
    for name, takes in drums.draw_kit(5).items():
        assert len(takes) == drums.N_TAKES
        assert not np.array_equal(takes[0], takes[1])
        for x in takes:
            assert abs(x.mean()) < 1e-3, name
            assert abs(x[0]) < 1e-3, name
            assert abs(x[-1]) < 1e-3, name
            assert np.argmax(np.abs(x) > 0.1 * np.abs(x).max()) < 0.01 * RATE, name


def test_augmentation_keeps_time_pitch_and_bounds() -> None:
    vocal = np.stack([sing_phrase(5.0, 6)] * 2)
    assert np.array_equal(augment.augment_vocal(vocal, 3), augment.augment_vocal(vocal, 3))
    outcomes = [augment.augment_vocal(vocal, seed) for seed in range(8)]
    assert all(y.shape == vocal.shape and y.dtype == np.float32 for y in outcomes)
    assert all(np.isfinite(y).all() and np.abs(y).max() <= 0.9801 for y in outcomes)
    assert len({round(rms_db(y), 3) for y in outcomes}) == 8
    only_level = augment.augment_vocal(vocal, 3, strength=0.0)
    assert np.allclose(only_level, vocal * (only_level.std() / vocal.std()), atol=1e-5)

    def envelope(y: np.ndarray) -> np.ndarray:
        return np.sqrt(np.mean(frames_of(y[0], 2400, 480) ** 2, axis=1))

    for y in (augment.shift_pitch(vocal, 0.3), augment.shift_formants(vocal, 1.12)):
        one, two = envelope(vocal), envelope(y)
        lags = [np.corrcoef(one[10:-10], np.roll(two, lag)[10:-10])[0, 1] for lag in range(-5, 6)]
        assert int(np.argmax(lags)) in (4, 5, 6)
        assert max(lags) > 0.9


def test_shifts_move_what_they_say() -> None:
    tone = sing([Note(0.1, 2.0, 57, syllable="-a")], seed=1)[None]
    middle = slice(int(0.6 * RATE), int(1.6 * RATE))

    def centroid(x: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(x[0, middle] * np.hanning(RATE))) ** 2
        freqs = np.arange(len(power), dtype=float)
        used = (freqs > 200) & (freqs < 5000)
        return float((power * freqs)[used].sum() / power[used].sum())

    before = np.median(f0_of(tone[0, middle]))
    other = augment.shift_formants(tone, 1.2)
    assert 1200 * np.log2(np.median(f0_of(other[0, middle])) / before) == pytest.approx(0, abs=10)
    assert centroid(other) > 1.05 * centroid(tone)


@pytest.mark.parametrize("semitones", [-3.0, -0.3, 0.0, 0.3, 2.0])
def test_pitch_shift_is_exact_on_a_steady_tone(semitones: float) -> None:
    k = np.arange(1.0, 20.0)
    tone = instruments.partials(220 * k, 0.2 / k, np.full(19, 1e3), 2 * RATE, np.zeros(19))[None]
    f0 = f0_of(augment.shift_pitch(tone, semitones)[0, RATE // 2 : RATE])
    assert np.abs(1200 * np.log2(f0 / 220) - 100 * semitones).max() < 3


def test_noise_is_as_loud_as_asked() -> None:
    vocal = sing_phrase(4.0, 2)[None]
    noisy = augment.add_noise(vocal, np.random.default_rng(1), 20.0)
    assert rms_db(vocal) - rms_db(noisy - vocal) == pytest.approx(20, abs=1.5)


def test_singers_differ() -> None:
    singers = [draw_singer(np.random.default_rng(seed)) for seed in range(40)]
    assert {s.low_midi < 52 for s in singers} == {True, False}
    assert np.std([s.formant_scale for s in singers]) > 0.05
    assert all(s.high_midi - s.low_midi >= 16 for s in singers)
