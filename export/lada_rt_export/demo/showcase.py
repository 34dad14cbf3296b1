"""Sing a song of the generator, accompany it with the embedded demo bundle, show and measure both: what `make demo`
runs.

The song is one that no network was trained on. Its vocal and a description of its style are all that the runtime gets;
its true accompaniment is for comparison. Needs the runtime, mir_eval and matplotlib, not torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from lada_rt import GenerationParams, Pipeline
from lada_rt.audio import mix_vocal, write_audio
from lada_rt.bench.quality import chroma, onset_f1, onsets
from lada_rt.terminal import ProgressBars

from lada_rt_export.demo.evaluate import CHANCE, chord_match, level_db
from lada_rt_export.demo.songs.form import PITCH_NAMES
from lada_rt_export.demo.songs.song import Song, make_song

RATE_HZ = 48_000
#: window and hop of the spectrograms
N_FFT, HOP = 2048, 512


def spectrogram_db(audio: np.ndarray) -> np.ndarray:
    """Power spectrogram in dB relative to its maximum, [bins, frames], of the channel mean of [C, N]."""
    mono = audio.mean(axis=0)
    mono = np.pad(mono, (0, max(0, N_FFT - len(mono))))
    frames = np.lib.stride_tricks.sliding_window_view(mono, N_FFT)[::HOP] * np.hanning(N_FFT)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    return 10 * np.log10(np.maximum(power / max(power.max(), 1e-20), 1e-10))


def draw(path: Path, tracks: dict[str, np.ndarray], song: Song) -> None:
    """Spectrogram and chromagram of several tracks of a song, one above the other, as a PNG.

    Lines in the chromagrams are the tones of the true chords.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(tracks), 2, figsize=(14, 2.6 * len(tracks)), sharex=True, squeeze=False, layout="constrained"
    )
    for (left, right), (title, audio) in zip(axes, tracks.items(), strict=True):
        seconds = audio.shape[1] / RATE_HZ
        left.imshow(
            spectrogram_db(audio),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, RATE_HZ / 2000),
            vmin=-80,
            vmax=0,
            cmap="magma",
        )
        left.set(title=title, ylabel="kHz", ylim=(0, 12))
        profile = chroma(audio, RATE_HZ).T
        profile = profile / np.maximum(profile.max(axis=0), 1e-9)
        right.imshow(profile, origin="lower", aspect="auto", extent=(0, seconds, -0.5, 11.5), cmap="gray_r")
        right.set_yticks(range(12), PITCH_NAMES, fontsize=7)
        right.set_title(f"{title}: chroma", loc="left")
        for chord in song.chords:
            if chord.start_s < seconds:
                for pitch_class in chord.pitch_classes:
                    right.hlines(pitch_class, chord.start_s, min(chord.end_s, seconds), colors="C3", linewidth=1)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def print_figures(song: Song, audio: np.ndarray) -> None:
    """Chords, onsets and level of an accompaniment beside those of the true one."""
    true_onsets = onsets(song.accompaniment, RATE_HZ)
    found = chord_match(audio, song)
    truth = chord_match(song.accompaniment, song)
    if found is not None and truth is not None:
        print(f"chords    {found:.2f} of the beats sound the song's chord (true band {truth:.2f}, chance {CHANCE:.2f})")
    print(f"onsets    F1 {onset_f1(onsets(audio, RATE_HZ), true_onsets):.2f} against the true band's, within 50 ms")
    print(f"level     {level_db(audio) - level_db(song.accompaniment):+.1f} dB over the true band's")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="lada_rt_export.demo.showcase"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (default: out/demo)")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the song (default: 40)")
    parser.add_argument(
        "--seed", type=int, default=90_100, help="of the song; training stays below 90000 (default: 90100)"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    song = make_song(args.seed, duration_s=args.seconds)
    write_audio(args.out / "vocal.wav", song.vocal, RATE_HZ)
    pipeline = Pipeline.load()
    text = song.texts[0]
    with ProgressBars(enabled=sys.stderr.isatty()) as bars:
        result = pipeline.generate(
            args.out / "vocal.wav", text=text, params=GenerationParams(), on_progress=bars.update
        )
    band = result.audio[:, : song.vocal.shape[1]]
    write_audio(args.out / "accompaniment.wav", band, result.sample_rate)
    write_audio(args.out / "mix.wav", mix_vocal(band, result.vocal[:, : band.shape[1]]), result.sample_rate)
    write_audio(args.out / "true_accompaniment.wav", song.accompaniment, RATE_HZ)
    draw(
        args.out / "song.png",
        {"vocal": song.vocal, "true accompaniment": song.accompaniment, "generated accompaniment": band},
        song,
    )
    timings = result.timings
    print(f"bundle    {pipeline.bundle.name}")
    print(f"song      seed {args.seed}, {song.key}, {song.tempo_bpm:.0f} bpm, {song.style}; text: {text}")
    print(f"audio     {timings.audio_s:.2f} s, 48 kHz stereo")
    print(f"RTF       {timings.rtf:.3f} ({timings.total_s:.2f} s of computing)")
    print(f"TTFA      {timings.first_audio_s:.2f} s")
    print_figures(song, band)
    for name in ("vocal.wav", "accompaniment.wav", "mix.wav", "true_accompaniment.wav", "song.png"):
        print(f"wrote     {args.out / name}")


if __name__ == "__main__":
    main()
