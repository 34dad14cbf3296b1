"""How musical a bundle is, on songs it was not trained on: `python -m lada_rt_export.demo.evaluate`.

Every figure of a generated accompaniment stands beside the same figure of the true accompaniment (`_truth`), of the
codec's reconstruction of it (`_codec`) and of the accompaniment generated for another song (`_shuffled`):

- chord_match: share of beats whose chroma is nearest the true chord among the 24 major and minor triads; 1 / 24 is
  chance. Sevenths count as their triads.
- onset_f1: onsets against the true accompaniment's, within 50 ms (mir_eval).
- style_accuracy: share of generations in which a classifier hears the style that the text asked for; the classifier, a
  linear discriminant on levels, spectra and rhythm, learned from other songs and their reconstructions.
- fullness: level and onset density of intro and interlude, where nobody sings, against the truth's.

Needs the runtime, mir_eval and, for the plot, matplotlib; no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lada_rt import GenerationParams, Pipeline
from lada_rt.bench.quality import chroma, chroma_similarity, onset_f1, onsets
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.decode import LatentStats, SeededNoise, decode_latents, render_windows
from lada_rt.encode import encode
from lada_rt.engines import load_engines
from lada_rt.errors import LadaError
from lada_rt.files import check_target

from lada_rt_export.demo.songs.song import Song, make_song
from lada_rt_export.demo.songs.styles import STYLES

__all__ = ["CHANCE", "Evaluator", "chord_match", "evaluate", "fullness", "level_db"]

RATE_HZ = 48_000
CHANCE = 1 / 24
CURVE_STEPS = (4, 8, 16, 20, 32, 60, 80)
#: of `chroma`
_CHROMA_HOP, _CHROMA_WINDOW = 2048, 8192
_SILENT_SECTIONS = ("intro", "interlude")
_CLASSIFIER_SEED = 1_000_000
_KINDS = ("", "_truth", "_codec", "_shuffled")
Floats = np.ndarray
Log = Callable[[str], None]


def chord_match(audio: Floats, song: Song) -> float | None:
    """Share of a song's beats at which `audio` sounds the true triad, silence being no triad; None if it has no beat.

    Args:
        audio: [C, N] at 48 kHz; beats past its end are left out.
        song: with beats and chords.
    """
    profile = chroma(audio, RATE_HZ)  # [n, 12]
    times = (np.arange(len(profile)) * _CHROMA_HOP + _CHROMA_WINDOW / 2) / RATE_HZ
    templates = np.zeros((24, 12))
    for root in range(12):
        for row, third in ((root, 4), (root + 12, 3)):
            templates[row, [root, (root + third) % 12, (root + 7) % 12]] = 1 / math.sqrt(3)
    starts = song.beats_s
    length = float(np.median(np.diff(starts))) if len(starts) > 1 else 0.5
    hits = []
    for start in starts:
        # a frame reaches 85 ms to each side: those near the edges hear the neighbouring chord too
        inside = (times >= start + 0.05) & (times < start + length - 0.05)
        mean = profile[inside].sum(axis=0)
        middle = start + length / 2
        chord = next((c for c in song.chords if c.start_s <= middle < c.end_s), None)
        if chord is None or middle * RATE_HZ > audio.shape[1] or not inside.any():
            continue
        hits.append(bool(mean.any()) and int(np.argmax(templates @ mean)) == chord.triad)
    return float(np.mean(hits)) if hits else None


def level_db(audio: Floats) -> float:
    """Mean square of a sound of any shape in dB of full scale, -120 for silence."""
    return 10 * math.log10(max(float(np.mean(np.square(audio, dtype=np.float64))), 1e-12))


def fullness(audio: Floats, truth: Floats, song: Song) -> dict[str, float]:
    """Level in dB over the truth's, and onsets per onset of the truth, for each of intro and interlude.

    Args:
        audio, truth: [C, N] at 48 kHz.
        song: with sections; those it lacks are left out.
    """
    found: dict[str, float] = {}
    for name in _SILENT_SECTIONS:
        spans = [(s.start_s, s.end_s) for s in song.sections if s.name == name]
        cuts = [slice(round(a * RATE_HZ), round(b * RATE_HZ)) for a, b in spans]
        pairs = [(audio[:, c], truth[:, c]) for c in cuts if audio[:, c].shape[1] > RATE_HZ // 10]
        if not pairs:
            continue
        ours, theirs = (np.concatenate([p[i] for p in pairs], axis=1) for i in (0, 1))
        found[f"{name}_level_db"] = level_db(ours) - level_db(theirs)
        found[f"{name}_onset_ratio"] = len(onsets(ours, RATE_HZ)) / max(1, len(onsets(theirs, RATE_HZ)))
    return found


def style_features(audio: Floats) -> Floats:
    """What the classifier hears: [n] float64 of mean spectrum, its spread over time, and the rhythm of four bands."""
    mono = audio.mean(axis=0, dtype=np.float64)
    size, hop = 2048, 960
    n = max(1, (len(mono) - size) // hop)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(mono, (0, size)), size)[::hop][:n] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    edges = np.unique(np.geomspace(3, 700, 25).astype(int))
    bands = np.log(np.add.reduceat(power[:, :700], edges[:-1], axis=1) + 1e-6)  # [n, bands]
    rise = np.maximum(np.diff(bands, axis=0), 0)
    groups = [g.mean(axis=1) for g in np.array_split(rise, 4, axis=1)]
    width = bands.std(axis=0)
    level = bands.mean(axis=0)
    return np.concatenate([level - level.mean(), width, [g.mean() for g in groups], [g.std() for g in groups]])


class StyleClassifier:
    """A linear discriminant with shared, shrunk covariance."""

    def __init__(self, features: Floats, labels: Sequence[str]) -> None:
        self.names = sorted(set(labels))
        rows = np.array([self.names.index(label) for label in labels])
        self.shift, self.scale = features.mean(axis=0), features.std(axis=0) + 1e-6
        x = (features - self.shift) / self.scale
        self.means = np.stack([x[rows == i].mean(axis=0) for i in range(len(self.names))])
        within = x - self.means[rows]
        covariance = within.T @ within / max(1, len(x))
        # few songs, many features: half the diagonal keeps the inverse tame
        self.inverse = np.linalg.inv(0.5 * covariance + 0.5 * np.eye(len(covariance)))

    def __call__(self, audio: Floats) -> str:
        x = (style_features(audio) - self.shift) / self.scale
        away = x - self.means
        return self.names[int(np.argmin(np.einsum("if,fg,ig->i", away, self.inverse, away)))]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to evaluate.

    Attributes:
        n_songs, seed: songs of seeds `seed` and up.
        steps, flow_steps: of the generation.
        song_s: length of each song; None draws 40 to 60 s.
        swapped_songs: songs that are also made in another style than their own.
        style_songs: songs of each style that the classifier learns from.
        curve_steps, curve_songs: of the curve; no steps draw none.
    """

    n_songs: int = 20
    seed: int = 90_000
    steps: int = 60
    flow_steps: int = 20
    song_s: float | None = None
    swapped_songs: int = 8
    style_songs: int = 6
    curve_steps: tuple[int, ...] = CURVE_STEPS
    curve_songs: int = 5


class Evaluator:
    """A bundle, and the codec's reconstructions with it."""

    def __init__(self, bundle: Bundle, *, backend: str = "auto", device: str = "auto") -> None:
        self.engines, backend, device = load_engines(bundle, backend=backend, device=device)
        self.pipeline = Pipeline(bundle, self.engines, backend=backend, device=device)
        self.geometry = bundle.geometry
        constants = bundle.constants()
        self.stats = LatentStats(constants["latent_mean"], constants["latent_std"])

    def reconstruct(self, audio: Floats, flow_steps: int) -> Floats:
        """[2, N] through the codec and back, of the same length."""
        codes = encode(self.engines["encoder"], audio, self.geometry)
        noise = SeededNoise(0, self.geometry)
        latents = decode_latents(
            self.engines["flow"], codes, self.stats, self.geometry, n_steps=flow_steps, guidance=1.5, noise=noise
        )
        windows = range(self.geometry.n_windows(len(codes)))
        stop = self.geometry.n_samples(len(codes))
        pieces = render_windows(self.engines, latents, self.geometry, windows=windows, stop_sample=stop)
        return np.concatenate(list(pieces), axis=1)[:, : audio.shape[1]]

    def generate(self, song: Song, text: str, steps: int, flow_steps: int) -> tuple[Floats, float]:
        """The accompaniment of a song's vocal, and its RTF."""
        params = GenerationParams(steps=steps, flow_steps=flow_steps)
        result = self.pipeline.generate((song.vocal, song.rate_hz), text=text, params=params)
        return result.audio[:, : song.vocal.shape[1]], result.timings.rtf

    def classifier(self, settings: Settings) -> StyleClassifier:
        """Learned from songs and reconstructions of its own seeds."""
        features, labels = [], []
        window_s = self.geometry.window_samples / RATE_HZ
        for i, style in enumerate(STYLES):
            for j in range(settings.style_songs):
                number = _CLASSIFIER_SEED + i * 1000 + j
                song = make_song(number, style=style, duration_s=min(window_s, settings.song_s or window_s))
                for audio in (song.accompaniment, self.reconstruct(song.accompaniment, settings.flow_steps)):
                    features.append(style_features(audio))
                    labels.append(style)
        return StyleClassifier(np.stack(features), labels)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return round(float(np.mean(numbers)), 4) if numbers else None


def _ratio(a: float | None, b: float | None, chance: float) -> float | None:
    if a is None or b is None or b <= chance:
        return None
    return round((a - chance) / (b - chance), 4)


def _noise(values: Sequence[float | None]) -> float:
    """Twice the standard error of a mean over songs: what is no more than this is nothing."""
    numbers = [v for v in values if v is not None]
    return 2 * float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over songs, and the ratios that the goals are stated in."""
    names = sorted({name for row in rows for name, value in row.items() if isinstance(value, float)})
    out: dict[str, Any] = {name: _mean([row.get(name) for row in rows]) for name in names}
    for name, chance in (("chord_match", CHANCE), ("onset_f1", 0.0)):
        out[f"{name}_of_codec"] = _ratio(out[name], out[f"{name}_codec"], chance)
        # how many times nothing is: no number
        left = (out[f"{name}_shuffled"] or 0.0) - chance > _noise([row.get(f"{name}_shuffled") for row in rows])
        out[f"{name}_of_shuffled"] = _ratio(out[name], out[f"{name}_shuffled"], chance) if left else None
    return out


def evaluate(
    evaluator: Evaluator, settings: Settings, log: Log = lambda line: None
) -> tuple[dict[str, Any], list[Floats]]:
    """Generate for unseen songs and measure.

    Returns:
        `songs`: one row each; `summary`: their means and ratios; `curve`: means for each number of steps. And the
        accompaniments, [2, N] each.

    Raises:
        EngineError: the backend failed, or mir_eval is missing.
    """
    hear = evaluator.classifier(settings)
    log(f"classifier learned from {2 * settings.style_songs * len(STYLES)} recordings")
    songs, made, rows = [], [], []
    styles = list(STYLES)
    for i in range(settings.n_songs):
        song = make_song(settings.seed + i, duration_s=settings.song_s)
        audio, rtf = evaluator.generate(song, song.texts[0], settings.steps, settings.flow_steps)
        heard = hear(audio)
        row: dict[str, Any] = {"seed": settings.seed + i, "rtf": float(rtf), "asked": song.style, "heard": heard}
        row["style_accuracy"] = float(heard == song.style)
        row["style_accuracy_truth"] = float(hear(song.accompaniment) == song.style)
        if i < settings.swapped_songs:
            other = styles[(styles.index(song.style) + 1 + i % (len(styles) - 1)) % len(styles)]
            swapped, _ = evaluator.generate(song, STYLES[other].names[0], settings.steps, settings.flow_steps)
            row |= {"asked_swapped": other, "heard_swapped": hear(swapped)}
            row["style_accuracy_swapped"] = float(row["heard_swapped"] == other)
        rows.append(row)
        songs.append(song)
        made.append(audio)
        log(f"song {i + 1} of {settings.n_songs}: RTF {rtf:.3f}, {song.style} heard as {heard}")
    for i, (song, row) in enumerate(zip(songs, rows, strict=True)):
        codec = evaluator.reconstruct(song.accompaniment, settings.flow_steps)
        shuffled = made[(i + 1) % len(made)] if len(made) > 1 else made[0][:, ::-1]
        row["style_accuracy_codec"] = float(hear(codec) == song.style)
        true_onsets = onsets(song.accompaniment, RATE_HZ)
        for kind, audio in zip(_KINDS, (made[i], song.accompaniment, codec, shuffled), strict=True):
            row[f"chord_match{kind}"] = chord_match(audio, song)
            # the other song may be longer or shorter: as much is compared as both have
            n = min(audio.shape[1], song.accompaniment.shape[1]) if kind == "_shuffled" else audio.shape[1]
            found = onsets(audio[:, :n], RATE_HZ)
            row[f"onset_f1{kind}"] = onset_f1(found, true_onsets[true_onsets * RATE_HZ < n])
        row |= fullness(made[i], song.accompaniment, song)
    log("measured")
    curve = [_curve_point(evaluator, settings, songs[: settings.curve_songs], n, log) for n in settings.curve_steps]
    return {"songs": rows, "summary": _summary(rows), "curve": curve}, made


def _curve_point(
    evaluator: Evaluator, settings: Settings, songs: Sequence[Song], steps: int, log: Log
) -> dict[str, Any]:
    points = []
    for song in songs:
        audio, rtf = evaluator.generate(song, song.texts[0], steps, settings.flow_steps)
        f1 = onset_f1(onsets(audio, RATE_HZ), onsets(song.accompaniment, RATE_HZ))
        points.append((chord_match(audio, song), f1, rtf))
    log(f"{steps} steps")
    names = ("chord_match", "onset_f1", "rtf")
    return {"steps": steps} | {name: _mean([p[k] for p in points]) for k, name in enumerate(names)}


def hear_recording(evaluator: Evaluator, path: Path, settings: Settings, others: Sequence[Floats]) -> dict[str, Any]:
    """Accompany a real recording: level, peak, how many pitch classes sound at a time beside white noise, and chroma
    similarity with the vocal beside that of other songs' accompaniments."""
    params = GenerationParams(steps=settings.steps, flow_steps=settings.flow_steps)
    result = evaluator.pipeline.generate(path, text=None, params=params)
    similar = [chroma_similarity(audio, result.vocal, RATE_HZ) for audio in others]
    return {
        "level_db": round(level_db(result.audio), 2),
        "peak": round(float(np.abs(result.audio).max()), 4),
        "chroma_width": _chroma_width(result.audio),
        "chroma_width_noise": _chroma_width(np.random.default_rng(0).standard_normal(result.audio.shape)),
        "chroma_similarity": chroma_similarity(result.audio, result.vocal, RATE_HZ),
        "chroma_similarity_shuffled": similar,
    }


def _chroma_width(audio: Floats) -> float | None:
    """Mean of the chroma over pitch classes and sounding frames, the strongest class of each frame taken as one; None
    for silence."""
    profile = chroma(audio, RATE_HZ)
    sounding = profile[profile.any(axis=1)]
    return round(float(sounding.mean()), 4) if len(sounding) else None


def draw_curve(path: Path, report: Mapping[str, Any]) -> None:
    """Chord match, onset F1 and RTF over steps, the codec's figures dotted: the paper's figure 7 for this bundle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    curve, summary = report["curve"], report["summary"]
    steps = [point["steps"] for point in curve]
    for name, colour in (("chord_match", "C0"), ("onset_f1", "C1")):
        axis.plot(steps, [point[name] for point in curve], "o-", color=colour, label=name)
        if summary.get(f"{name}_codec") is not None:
            axis.axhline(summary[f"{name}_codec"], color=colour, linestyle=":", linewidth=1)
    axis.set(xlabel="denoising steps", ylabel="share", ylim=(0, 1))
    beside = axis.twinx()
    beside.plot(steps, [point["rtf"] for point in curve], "s--", color="C3", label="RTF")
    beside.set(ylabel="RTF")
    beside.set_ylim(bottom=0)
    lines = [line for line in (*axis.get_lines(), *beside.get_lines()) if not str(line.get_label()).startswith("_")]
    axis.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lada_rt_export.demo.evaluate", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--songs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=90_000, help="of the first song; training stays below 90000")
    parser.add_argument("--seconds", type=float, help="length of the songs; default: drawn, 40 to 60")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--swapped-songs", type=int, default=8, help="made in another style too (default: 8)")
    parser.add_argument("--style-songs", type=int, default=6, help="of each style, for the classifier")
    parser.add_argument("--curve", default=",".join(map(str, CURVE_STEPS)), help="steps of the curve; empty for none")
    parser.add_argument("--curve-songs", type=int, default=5, help="of --songs, the first ones (default: 5)")
    parser.add_argument("--recording", type=Path, help="a real vocal to accompany as well")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG of the curve; default: beside the JSON")
    args = parser.parse_args(argv)
    settings = Settings(
        n_songs=args.songs,
        seed=args.seed,
        steps=args.steps,
        flow_steps=args.flow_steps,
        song_s=args.seconds,
        swapped_songs=args.swapped_songs,
        style_songs=args.style_songs,
        curve_steps=tuple(int(n) for n in args.curve.split(",") if n),
        curve_songs=min(args.curve_songs, args.songs),
    )
    began = time.monotonic()
    try:
        check_target(args.json, "--json")
        bundle = Bundle.open(args.bundle or demo_bundle_path())
        evaluator = Evaluator(bundle)
        report, made = evaluate(evaluator, settings, lambda line: print(line, file=sys.stderr, flush=True))
        if args.recording is not None:
            report["recording"] = hear_recording(evaluator, args.recording, settings, made[:10])
    except LadaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    head = {"bundle": bundle.name, "trained": bundle.trained, "chord_chance": round(CHANCE, 4)}
    chosen = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    report = {**head, "settings": chosen, "seconds": round(time.monotonic() - began, 1), **report}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["curve"]:
        draw_curve(args.plot or args.json.with_suffix(".png"), report)
    for name, value in report["summary"].items():
        print(f"{name:28} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
