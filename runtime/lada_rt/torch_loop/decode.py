"""Codes to sound on the device: windows, flow, mel, waveform. Only finished audio is copied to the host.

The counterpart of lada_rt/decode.py; source: spec/mucodec 5 to 7. Windows of a song follow one another, because each
starts from the end of the one before; mel and waveform of a window run on a second stream beside the next one's flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop.device import DeviceEngine, marked, to_device, to_host
from lada_rt.torch_loop.flow import FlowSolver

__all__ = ["DeviceStats", "Renderer", "WindowLatents", "decode_latents", "decode_songs", "window_codes"]

#: mel frames on either side that influence a waveform sample (spec/mucodec 7)
VOCODER_HALO_FRAMES = 23


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """Mean and deviation of the latents on the device, [channels, 1, bins] float32 (spec/mucodec 3.3)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, mean: np.ndarray, std: np.ndarray, device: torch.device) -> DeviceStats:
        """Args: mean, std: [channels, bins] float32, as a bundle's constants hold them."""
        return cls(to_device(mean[:, None, :], device), to_device(std[:, None, :], device))

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std.clamp(min=1e-12)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


@dataclass(frozen=True, slots=True)
class WindowLatents:
    """Latents [32, L, 32] float32 on the device, perhaps still being computed; `ready` tells when they are there."""

    latents: Tensor
    ready: Any
    renderer: Renderer | None = None

    @classmethod
    def queued(cls, latents: Tensor, renderer: Renderer | None = None) -> WindowLatents:
        """Latents that the current stream will have made."""
        ready = None
        if latents.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        return cls(latents, ready, renderer)

    def render(self, n_samples: int) -> np.ndarray:
        """The window's first `n_samples` of audio, [2, n_samples] float32, by the renderer it came with."""
        assert self.renderer is not None
        return self.renderer.render(self, n_samples)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """A copy in host memory, so that numpy takes them where it takes arrays."""
        if self.ready is not None:
            torch.cuda.current_stream(self.latents.device).wait_event(self.ready)
        array = to_host(self.latents)
        return array if dtype is None else array.astype(dtype, copy=False)


def window_codes(codes: Tensor, index: int, geometry: CodecGeometry) -> Tensor:
    """Codes of decoder window `index`, [window_codes] int64: the song repeats without end (spec/mucodec 5.2-5.4)."""
    positions = torch.arange(geometry.window_codes, device=codes.device) + index * geometry.hop_codes
    return codes[positions % codes.shape[0]]


def decode_songs(
    solver: FlowSolver,
    songs: Sequence[Tensor],
    stats: DeviceStats,
    geometry: CodecGeometry,
    *,
    n_steps: int,
    guidance: float,
    noise: Callable[[int, int], Tensor],
    windows: range | None = None,
    before: Tensor | None = None,
    renderer: Renderer | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, dict[int, WindowLatents]]]:
    """Decode several songs together: window i of all songs that have one is a single batch.

    Args:
        solver: of the flow.
        songs: codes [T] int64 of each song, on the device; lengths may differ.
        stats: of the latents.
        geometry: rates and window sizes.
        n_steps, guidance: see `FlowSolver.solve`.
        noise: (song index, window index) to initial noise [32, window_latents, 32] float32 on the device.
        windows: the windows to decode, consecutive; None is all.
        before: [S, 32, window_latents, 32] latents of the window before the first of them, which continues it.
        renderer: for the latents' `render`.
        on_step: called with (flow steps queued, flow steps in all), first with 0.

    Yields:
        (window index, {song index: its latents}), songs in ascending order.
    """
    n_windows = [geometry.n_windows(codes.shape[0]) for codes in songs]
    windows = range(max(n_windows)) if windows is None else windows
    total = len(windows) * n_steps
    contexts: dict[int, Tensor] = {}
    if before is not None:
        contexts = dict(enumerate(stats.normalise(before[:, :, -geometry.context_latents :]).unbind()))
    on_step(0, total)
    for index in windows:
        active = [song for song, n in enumerate(n_windows) if index < n]
        starts = torch.stack([noise(song, index) for song in active])  # [S, 32, L, 32]

        def on_window_step(done: int, base: int = (index - windows.start) * n_steps) -> None:
            on_step(base + done, total)

        solved = solver.solve(
            torch.stack([window_codes(songs[song], index, geometry) for song in active]),
            starts,
            torch.stack([contexts[song] for song in active]) if contexts else starts[:, :, :0],
            n_steps=n_steps,
            guidance=guidance,
            on_step=on_window_step,
        )
        latents = stats.denormalise(solved)
        ends = stats.normalise(latents[:, :, -geometry.context_latents :])
        contexts = dict(zip(active, ends.unbind(), strict=True))
        rows = zip(active, latents.unbind(), strict=True)
        yield index, {song: WindowLatents.queued(row, renderer) for song, row in rows}


def decode_latents(
    solver: FlowSolver,
    codes: Tensor,
    stats: DeviceStats,
    geometry: CodecGeometry,
    *,
    n_steps: int,
    guidance: float,
    noise: Callable[[int], Tensor],
    windows: range | None = None,
    before: Tensor | None = None,
    renderer: Renderer | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[WindowLatents]:
    """Yield the latents of each decoder window of one song in turn.

    Args: as for `decode_songs`, codes [T], noise a function of the window alone, before [32, window_latents, 32].
    """
    songs = decode_songs(
        solver,
        [codes],
        stats,
        geometry,
        n_steps=n_steps,
        guidance=guidance,
        noise=lambda song, window: noise(window),
        windows=windows,
        before=None if before is None else before[None],
        renderer=renderer,
        on_step=on_step,
    )
    for _, latents in songs:
        yield latents[0]


class Renderer:
    """Latents of a window to audio, on a stream of its own."""

    def __init__(self, engines: Mapping[str, DeviceEngine], geometry: CodecGeometry, device: torch.device) -> None:
        """Args: engines: holds the `mel_decoder` and `vocoder` stages."""
        self._mel_decoder = engines["mel_decoder"]
        self._vocoder = engines["vocoder"]
        self._geometry = geometry
        self._device = device
        # Higher priority than the flow beside it: the chunk in hand goes out first.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def render(self, window: WindowLatents, n_samples: int) -> np.ndarray:
        """Latents of one window to its first `n_samples` of audio; waits for them.

        Args:
            window: the first half of the channels is left, the second right (spec/mucodec 6).
            n_samples: 1..window_samples.

        Returns:
            [2, n_samples] float32 in (-1, 1).
        """
        if self._stream is None:
            return to_host(self._audio(window.latents, n_samples))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(window.ready)
            window.latents.record_stream(self._stream)
            return to_host(self._audio(window.latents, n_samples))

    def _audio(self, latents: Tensor, n_samples: int) -> Tensor:
        n_frames = math.ceil(n_samples / self._geometry.samples_per_mel_frame)
        mels = []
        for half in latents.chunk(2):
            # One audio channel at a time: the mel decoder's largest maps would otherwise double.
            with marked("mel_decoder", self._device):
                mel = self._mel_decoder.run_device(latents=half[None].contiguous())["mel"]  # [1, 256, 8 L]
            mels.append(mel[:, :, : n_frames + VOCODER_HALO_FRAMES])
        with marked("vocoder", self._device):
            wave = self._vocoder.run_device(mel=torch.cat(mels))["waveform"]  # [2, 480 F + 16]
        return wave[:, :n_samples]
