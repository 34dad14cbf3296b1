"""Look at the songs the demo model is trained on: spectrograms of vocal and accompaniment, chromagram, true
chords.

    python bench/plot_songs.py out.png --seed 3 --seconds 30

One row of panels per style; white lines are downbeats, letters the true chords. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from lada_rt_export.demo.songs.form import PITCH_NAMES
from lada_rt_export.demo.songs.song import Song, make_song
from lada_rt_export.demo.songs.styles import STYLES
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW, HOP = 8192, 1024


def spectrogram(x: np.ndarray) -> np.ndarray:
    """[bins, frames] magnitude of a mono signal [N]."""
    frames = np.lib.stride_tricks.sliding_window_view(x, WINDOW)[::HOP]
    return np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)).T


def chromagram(magnitude: np.ndarray, rate_hz: int) -> np.ndarray:
    """[12, frames] magnitude by pitch class between 110 and 2000 Hz, each frame scaled to a maximum of one."""
    freqs = np.arange(magnitude.shape[0]) * rate_hz / WINDOW
    used = (freqs > 110) & (freqs < 2000)
    classes = np.round(69 + 12 * np.log2(freqs[used] / 440)).astype(int) % 12
    chroma = np.stack([magnitude[used][classes == c].mean(axis=0) for c in range(12)])
    return chroma / np.maximum(chroma.max(axis=0), 1e-9)


def draw_song(axes: list[Axes], song: Song, seconds: float) -> None:
    """Three panels: vocal, accompaniment, chroma of the accompaniment."""
    n = int(seconds * song.rate_hz)
    for ax, name in zip(axes, ("vocal", "accompaniment"), strict=False):
        magnitude = spectrogram(getattr(song, name).mean(axis=0)[:n])
        extent = (0.0, magnitude.shape[1] * HOP / song.rate_hz, 0.0, song.rate_hz / 2000)
        level = 20 * np.log10(magnitude + 1e-4)
        ax.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=45, cmap="magma")
        ax.set_ylim(0, 12)
        ax.set_ylabel("kHz")
        ax.set_title(f"{song.style}, {song.tempo_bpm:.0f} bpm, {song.key}: {name}", fontsize=9)
    extent = (extent[0], extent[1], -0.5, 11.5)
    axes[2].imshow(chromagram(magnitude, song.rate_hz), origin="lower", aspect="auto", extent=extent, cmap="gray_r")
    axes[2].set_yticks(range(12), PITCH_NAMES, fontsize=6)
    for chord in song.chords:
        if chord.start_s < extent[1]:
            axes[2].text(chord.start_s, 11.7, f"{PITCH_NAMES[chord.root]} {chord.quality}", fontsize=6)
            for pitch_class in chord.pitch_classes:
                last = min(chord.end_s, extent[1])
                axes[2].plot([chord.start_s, last], [pitch_class] * 2, color="tab:red", lw=1.2, alpha=0.7)
    for section in song.sections:
        if section.start_s < extent[1]:
            axes[0].text(section.start_s, 11, section.name, color="white", fontsize=8)
    for downbeat in song.downbeats_s[song.downbeats_s < extent[1]]:
        axes[1].axvline(downbeat, color="white", lw=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("png", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first song")
    parser.add_argument("--seconds", type=float, default=30.0, help="how much of each song to show")
    parser.add_argument("--styles", default=",".join(STYLES), help="comma-separated")
    args = parser.parse_args()
    styles = args.styles.split(",")
    figure, axes = plt.subplots(3, len(styles), figsize=(9 * len(styles), 11), squeeze=False)
    for column, style in enumerate(styles):
        draw_song(list(axes[:, column]), make_song(args.seed + column, style=style), args.seconds)
    figure.tight_layout()
    figure.savefig(args.png, dpi=70)


if __name__ == "__main__":
    main()
