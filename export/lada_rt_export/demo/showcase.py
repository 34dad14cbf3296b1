"""Sing a phrase, generate its accompaniment with the embedded demo bundle, and show both: what `make demo` runs.

Needs the runtime and matplotlib, not torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from lada_rt import GenerationParams, Pipeline
from lada_rt.audio import mix_vocal, write_audio
from lada_rt.terminal import ProgressBars

from lada_rt_export.demo.songs.voice import sing_phrase

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


def draw(path: Path, tracks: dict[str, np.ndarray], rate_hz: int) -> None:
    """Spectrograms of several tracks, one above the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(tracks), 1, figsize=(11, 3.2 * len(tracks)), sharex=True, squeeze=False)
    for axis, (title, audio) in zip(axes[:, 0], tracks.items(), strict=True):
        seconds = audio.shape[1] / rate_hz
        image = axis.imshow(
            spectrogram_db(audio),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, rate_hz / 2000),
            vmin=-80,
            vmax=0,
            cmap="magma",
        )
        axis.set(title=title, ylabel="kHz", ylim=(0, 16))
        figure.colorbar(image, ax=axis, label="dB", pad=0.01)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the files (default: out/demo)")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the phrase (default: 12)")
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    vocal = np.atleast_2d(sing_phrase(args.seconds, args.seed))
    write_audio(args.out / "vocal.wav", vocal, RATE_HZ)
    pipeline = Pipeline.load()
    with ProgressBars(enabled=sys.stderr.isatty()) as bars:
        result = pipeline.generate(
            args.out / "vocal.wav", text="", params=GenerationParams(seed=args.seed), on_progress=bars.update
        )
    write_audio(args.out / "accompaniment.wav", result.audio, result.sample_rate)
    write_audio(args.out / "mix.wav", mix_vocal(result.audio, result.vocal), result.sample_rate)
    label = "accompaniment" if pipeline.bundle.trained else "accompaniment (untrained bundle: noise, not music)"
    draw(args.out / "spectrograms.png", {"vocal": result.vocal, label: result.audio}, result.sample_rate)

    timings = result.timings
    print(f"bundle    {pipeline.bundle.name}" + ("" if pipeline.bundle.trained else ", UNTRAINED: noise, not music"))
    print(f"audio     {timings.audio_s:.2f} s, 48 kHz stereo")
    print(f"RTF       {timings.rtf:.3f} ({timings.total_s:.2f} s of computing)")
    print(f"TTFA      {timings.first_audio_s:.2f} s")
    for name in ("vocal.wav", "accompaniment.wav", "mix.wav", "spectrograms.png"):
        print(f"wrote     {args.out / name}")


if __name__ == "__main__":
    main()
