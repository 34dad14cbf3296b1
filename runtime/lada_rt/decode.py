"""Codes to sound: windows, the flow solver, mel and waveform, crossfade.

Source: spec/mucodec 3.4 (solver), 5 (windows), 6 (mel), 7 (vocoder). A window depends on the one before it only
through the last `context_latents` frames of its latents, so rendering window i (mel and vocoder) can run beside the
flow of window i+1. Engines on a GPU bring these loops along (torch_loop/decode.py): latents then stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lada_rt.engines.base import Engine, loop_of
from lada_rt.euler import EulerTable
from lada_rt.geometry import CodecGeometry
from lada_rt.noise import flow_noise

__all__ = [
    "Crossfade",
    "LatentStats",
    "SeededNoise",
    "decode_latents",
    "render_pieces",
    "render_windows",
    "rendered_samples",
    "solve_flow",
    "window_codes",
    "with_halo",
]

#: mel frames on either side that influence a waveform sample (spec/mucodec 7)
VOCODER_HALO_FRAMES = 23
#: mel frames vocoded at once. The halo makes the result that of one pass; the block bounds the memory.
VOCODER_BLOCK_FRAMES = 512


@dataclass(frozen=True, slots=True)
class LatentStats:
    """Mean and deviation of the latents, [channels, bins] float32 (spec/mucodec 3.3)."""

    mean: np.ndarray
    std: np.ndarray

    def normalise(self, latents: np.ndarray) -> np.ndarray:
        """[..., channels, frames, bins] to zero mean and unit deviation."""
        return (latents - self.mean[:, None, :]) / np.maximum(self.std, np.float32(1e-12))[:, None, :]

    def denormalise(self, latents: np.ndarray) -> np.ndarray:
        return latents * self.std[:, None, :] + self.mean[:, None, :]


def window_codes(codes: np.ndarray, index: int, geometry: CodecGeometry) -> np.ndarray:
    """Codes of decoder window `index`, [window_codes] int64: the song repeats without end (spec/mucodec 5.2-5.4)."""
    return codes[(index * geometry.hop_codes + np.arange(geometry.window_codes)) % len(codes)]


def solve_flow(
    engine: Engine,
    codes: np.ndarray,
    noise: np.ndarray,
    context: np.ndarray,
    *,
    n_steps: int,
    guidance: float,
    on_step: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Integrate the flow of one window from noise to normalised latents by Euler steps (spec/mucodec 3.4).

    Args:
        engine: the `flow` stage.
        codes: [2 L] int64.
        noise: [32, L, 32] float32, standard normal.
        context: [32, K, 32] float32, normalised latents that the window starts with; K = 0 for the first window.
        n_steps: Euler steps; the engine is called once for each, with both halves of the guidance in one batch.
        guidance: velocity is u + guidance * (c - u); at 1 only the conditioned half is evaluated.
        on_step: called with the steps done.

    Returns:
        [32, L, 32] float32, the first K frames equal to `context`.
    """
    n_context = context.shape[1]
    conditional = np.array([1.0] if guidance == 1.0 else [0.0, 1.0], np.float32)
    batch = len(conditional)
    padded = np.zeros_like(noise)
    padded[:, :n_context] = context
    context_rows = np.repeat(padded[None], batch, axis=0)  # [B, 32, L, 32]
    codes_rows = np.repeat(codes[None], batch, axis=0)  # [B, 2 L]
    x = noise.copy()
    table = EulerTable.of(n_steps)
    for step, (t, dt, fade) in enumerate(zip(table.t, table.dt, table.fade, strict=True)):
        x[:, :n_context] = fade * noise[:, :n_context] + t * context
        velocity = engine.run(
            x=np.repeat(x[None], batch, axis=0),
            context=context_rows,
            codes=codes_rows,
            conditional=conditional,
            t=np.full(batch, t, np.float32),
        )["velocity"]  # [B, 32, L, 32]
        guided = velocity[0] if batch == 1 else velocity[0] + np.float32(guidance) * (velocity[1] - velocity[0])
        x += dt * guided
        on_step(step + 1)
    x[:, :n_context] = context
    return x


def decode_latents(
    engine: Engine,
    codes: np.ndarray,
    stats: LatentStats,
    geometry: CodecGeometry,
    *,
    n_steps: int,
    guidance: float,
    noise: Callable[[int], np.ndarray],
    windows: range | None = None,
    before: ArrayLike | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[ArrayLike]:
    """Yield the latents of each decoder window in turn, [32, window_latents, 32] float32.

    They are arrays, or, from an engine on a GPU, whatever stands for one there and `numpy.asarray` fetches.

    Args:
        engine: the `flow` stage.
        codes: [T] int64, the whole song.
        stats: of the latents.
        geometry: rates and window sizes.
        n_steps: Euler steps in each window.
        guidance: see `solve_flow`.
        noise: window index to initial noise [32, window_latents, 32] float32.
        windows: the windows to decode, consecutive; None is all.
        before: [32, window_latents, 32] latents of the window before the first of them, which continues it.
        on_step: called with (flow steps done, flow steps in all), first with 0.
    """
    windows = range(geometry.n_windows(len(codes))) if windows is None else windows
    loop = loop_of(engine)
    if loop is not None:
        yield from loop(
            codes,
            stats,
            geometry,
            n_steps=n_steps,
            guidance=guidance,
            noise=noise,
            windows=windows,
            before=before,
            on_step=on_step,
        )
        return
    total = len(windows) * n_steps
    context = np.zeros((geometry.latent_channels, 0, geometry.latent_bins), np.float32)
    if before is not None:
        context = stats.normalise(np.asarray(before)[:, -geometry.context_latents :])
    on_step(0, total)
    for index in windows:

        def on_window_step(done: int, base: int = (index - windows.start) * n_steps) -> None:
            on_step(base + done, total)

        latents = stats.denormalise(
            solve_flow(
                engine,
                window_codes(codes, index, geometry),
                noise(index),
                context,
                n_steps=n_steps,
                guidance=guidance,
                on_step=on_window_step,
            )
        )
        yield latents
        context = stats.normalise(latents[:, -geometry.context_latents :])


@dataclass(frozen=True, slots=True)
class SeededNoise:
    """Window index to initial flow noise [32, window_latents, 32] float32, from the seed alone.

    A loop on a device reads the seed off and draws there: the same bits.
    """

    seed: int
    geometry: CodecGeometry

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.geometry.latent_channels, self.geometry.window_latents, self.geometry.latent_bins

    def __call__(self, window: int) -> np.ndarray:
        return flow_noise(self.seed, window, self.shape)


def rendered_samples(index: int, n_samples: int, geometry: CodecGeometry) -> int:
    """Samples of decoder window `index` that a song of `n_samples` needs."""
    return min(geometry.window_samples, n_samples - index * geometry.hop_samples)


def with_halo(start: int, stop: int, n_frames: int) -> slice:
    """The mel frames, of `n_frames`, that the waveform of those from `start` to `stop` is made of."""
    return slice(max(start - VOCODER_HALO_FRAMES, 0), min(stop + VOCODER_HALO_FRAMES, n_frames))


def render_pieces(
    engines: Mapping[str, Engine],
    latents: ArrayLike,
    n_samples: int,
    geometry: CodecGeometry,
    *,
    block_frames: int = VOCODER_BLOCK_FRAMES,
) -> Iterator[np.ndarray]:
    """Latents of one window to its first `n_samples` of audio, given out as the vocoder makes them.

    Args:
        engines: holds the `mel_decoder` and `vocoder` stages.
        latents: [32, L, 32] float32; the first half of the channels is left, the second right (spec/mucodec 6).
        n_samples: 1..window_samples.
        geometry: rates and window sizes.
        block_frames: mel frames vocoded at once.

    Yields:
        [2, n] float32 in (-1, 1), one after the other.
    """
    loop = loop_of(engines["mel_decoder"])
    if loop is not None:
        yield from loop(latents, n_samples)
        return
    per_frame = geometry.samples_per_mel_frame
    n_frames = math.ceil(n_samples / per_frame)
    # One audio channel at a time: the mel decoder's largest maps would otherwise double. It is not blocked in time, as
    # its GroupNorms and its attention span the window: blocks would change the result. At full size the process takes
    # 4.6 GB beside the mapped weights (bench/results/2026-11-25-cpu-loaded-full-size.json).
    mels = [engines["mel_decoder"].run(latents=half[None])["mel"] for half in np.split(np.asarray(latents), 2)]
    for start in range(0, n_frames, block_frames):
        stop = min(start + block_frames, n_frames)
        span = with_halo(start, stop, mels[0].shape[2])
        wanted = slice((start - span.start) * per_frame, min(stop * per_frame, n_samples) - span.start * per_frame)
        waves = [engines["vocoder"].run(mel=np.ascontiguousarray(mel[:, :, span]))["waveform"] for mel in mels]
        yield np.concatenate([wave[:, wanted] for wave in waves])


def render_windows(
    engines: Mapping[str, Engine],
    latents: Iterable[ArrayLike],
    geometry: CodecGeometry,
    *,
    windows: range,
    stop_sample: int,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[np.ndarray]:
    """Render windows as their latents arrive and yield what is final, [2, n] float32.

    Args:
        engines: holds the `mel_decoder` and `vocoder` stages.
        latents: of each window in turn, [32, L, 32] float32.
        geometry: rates and window sizes.
        windows: their indices, consecutive; the audio begins where the first of them does.
        stop_sample: of the song, where the audio ends; more than the overlap past the last window's start, if there is
            another before it.
        on_window: called with (windows done, windows in all).
    """
    crossfade = Crossfade(geometry, stop_sample - windows.start * geometry.hop_samples)
    for index, window in zip(windows, latents, strict=True):
        last = index + 1 == windows.stop
        n_samples = to_come = rendered_samples(index, stop_sample, geometry)
        for piece in render_pieces(engines, window, n_samples, geometry):
            final = crossfade.push(piece, last=last)
            to_come -= piece.shape[1]
            if to_come == 0:
                on_window(index + 1 - windows.start, len(windows))
            if final.shape[1]:
                yield final


class Crossfade:
    """Joins decoded windows; gives out each sample as soon as no later window can change it (spec/mucodec 5.6).

    The window before fades out over `overlap_samples` while the next fades in, linearly, both ends of the ramp
    included.
    """

    def __init__(self, geometry: CodecGeometry, n_samples: int) -> None:
        self._overlap = geometry.overlap_samples
        self._window = geometry.window_samples
        self._remaining = n_samples
        self._ramp = np.linspace(0.0, 1.0, self._overlap)
        # of the window before, and what has come of the window in hand: its length so far and its end
        self._tail: np.ndarray | None = None
        self._position = 0
        self._end: list[np.ndarray] = []

    def push(self, piece: np.ndarray, *, last: bool) -> np.ndarray:
        """Add the next piece [2, n] of the window in hand and return the samples that are now final, [2, m] float32.

        Every window but the last is whole. The last may be shorter, as nothing past the song's end is rendered; it
        always holds more than the overlap, because a window is only there for codes beyond it.

        Args:
            piece: never across the end of a window.
            last: whether the window in hand is the last one.
        """
        start, stop = self._position, self._position + piece.shape[1]
        if self._tail is not None and start < self._overlap:
            head, rest = np.split(piece, [self._overlap - start], axis=1)
            here = slice(start, start + head.shape[1])
            ramp = self._ramp[here]
            faded = self._tail[:, here] * (1.0 - ramp) + head * ramp  # float64, as the released program mixes
            piece = np.concatenate([faded.astype(np.float32), rest], axis=1)
        self._position = stop
        final = piece
        if not last:
            final, end = np.split(piece, [max(0, self._window - self._overlap - start)], axis=1)
            self._end.append(end)
            if stop == self._window:
                self._tail, self._position, self._end = np.concatenate(self._end, axis=1), 0, []
        final = final[:, : self._remaining]
        self._remaining -= final.shape[1]
        return np.ascontiguousarray(final)
