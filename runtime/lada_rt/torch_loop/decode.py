"""Codes to sound on the device: windows, flow, mel, waveform. Only finished audio is copied to the host.

The counterpart of lada_rt/decode.py; source: spec/mucodec 5 to 7. Windows of a song follow one another, because each
starts from the end of the one before; mel and waveform of a window run on a second stream beside the next one's flow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lada_rt.decode import VOCODER_BLOCK_FRAMES, LatentStats, SeededNoise, window_codes, with_halo
from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop.device import DeviceEngine, engine_errors, on_device, to_device, to_host
from lada_rt.torch_loop.flow import FlowSolver
from lada_rt.torch_loop.noise import flow_noise

__all__ = ["DecodeLoop", "DeviceStats", "Renderer", "WindowLatents", "decode_songs"]


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """`LatentStats` on the device, [channels, 1, bins] float32 (spec/mucodec 3.3)."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, stats: LatentStats, device: torch.device) -> DeviceStats:
        return cls(to_device(stats.mean[:, None, :], device), to_device(stats.std[:, None, :], device))

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std.clamp(min=1e-12)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


@dataclass(frozen=True, slots=True)
class WindowLatents:
    """Latents [32, L, 32] float32 on the device, perhaps still being computed; `ready` tells when they are there."""

    latents: Tensor
    ready: Any

    @classmethod
    def queued(cls, latents: Tensor) -> WindowLatents:
        """Latents that the current stream will have made."""
        ready = None
        if latents.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(latents.device))
        return cls(latents, ready)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """A copy in host memory, so that numpy takes them where it takes arrays."""
        if self.ready is not None:
            torch.cuda.current_stream(self.latents.device).wait_event(self.ready)
        array = to_host(self.latents)
        return array if dtype is None else array.astype(dtype, copy=False)


def decode_songs(
    solver: FlowSolver,
    songs: Sequence[np.ndarray],
    stats: DeviceStats,
    geometry: CodecGeometry,
    device: torch.device,
    *,
    n_steps: int,
    guidance: float,
    noise: Callable[[int, int], Tensor],
    windows: range | None = None,
    before: Tensor | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, dict[int, WindowLatents]]]:
    """Decode several songs together: window i of all songs that have one is a single batch.

    Args:
        solver: of the flow.
        songs: codes [T] int64 of each song; lengths may differ.
        stats: of the latents.
        geometry: rates and window sizes.
        device: of the solver.
        n_steps, guidance: see `FlowSolver.solve`.
        noise: (song index, window index) to initial noise [32, window_latents, 32] float32 on the device.
        windows: the windows to decode, consecutive; None is all.
        before: [S, 32, window_latents, 32] latents of the window before the first of them, which continues it.
        on_step: called with (flow steps queued, flow steps in all), first with 0.

    Yields:
        (window index, {song index: its latents}), songs in ascending order.
    """
    n_windows = [geometry.n_windows(len(codes)) for codes in songs]
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
            to_device(np.stack([window_codes(songs[song], index, geometry) for song in active]), device),
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
        yield index, {song: WindowLatents.queued(row) for song, row in rows}


class DecodeLoop:
    """`lada_rt.decode.decode_latents` around the engines of one flow."""

    def __init__(self, engines: Mapping[str, DeviceEngine], device: torch.device, *, capture: bool = True) -> None:
        """Args: engines: see `FlowSolver`; device: theirs; capture: use CUDA graphs."""
        self._solver = FlowSolver(engines, device, capture=capture)
        self._device = device

    def decode_latents(
        self,
        codes: np.ndarray,
        stats: LatentStats,
        geometry: CodecGeometry,
        *,
        n_steps: int,
        guidance: float,
        noise: Callable[[int], ArrayLike],
        windows: range | None = None,
        before: ArrayLike | None = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[WindowLatents]:
        """Latents of each window in turn; arguments as for `lada_rt.decode.decode_latents`.

        `SeededNoise` is drawn on the device, other noise is copied there. `on_step` counts steps queued.

        Raises:
            EngineError: the backend failed or ran out of memory.
        """

        def start(song: int, window: int) -> Tensor:
            if isinstance(noise, SeededNoise):
                return flow_noise(noise.seed, window, noise.shape, self._device)
            return to_device(np.asarray(noise(window)), self._device)

        with engine_errors("flow"):
            found = decode_songs(
                self._solver,
                [codes],
                DeviceStats.of(stats, self._device),
                geometry,
                self._device,
                n_steps=n_steps,
                guidance=guidance,
                noise=start,
                windows=windows,
                before=None if before is None else to_device(np.asarray(before)[None], self._device),
                on_step=on_step,
            )
            for _, latents in found:
                yield latents[0]


class Renderer:
    """`lada_rt.decode.render_pieces` around mel decoder and vocoder, on a stream of its own.

    The vocoder works on both channels at once, first on what one block of the host's would hold, then on all the rest:
    the first sound does not wait for a whole window of it.
    """

    def __init__(self, engines: Mapping[str, DeviceEngine], geometry: CodecGeometry, device: torch.device) -> None:
        """Args: engines: holds the `mel_decoder` and `vocoder` stages."""
        self._mel_decoder = engines["mel_decoder"]
        self._vocoder = engines["vocoder"]
        self._geometry = geometry
        self._device = device
        # Higher priority than the flow beside it: the chunk in hand goes out first.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def render(self, latents: ArrayLike, n_samples: int) -> Iterator[np.ndarray]:
        """Latents of one window to its first `n_samples` of audio; waits for them.

        Args:
            latents: from `DecodeLoop`, or an array; the first half of the channels is left, the second right
                (spec/mucodec 6).
            n_samples: 1..window_samples.

        Yields:
            [2, n] float32 in (-1, 1), one after the other.

        Raises:
            EngineError: the backend failed or ran out of memory.
        """
        per_frame = self._geometry.samples_per_mel_frame
        n_frames = math.ceil(n_samples / per_frame)
        with self._working():
            mel = self._mel(self._here(latents))
        # nothing is yielded inside `_working`: the consumer's own work does not belong on this stream
        for start, stop in ((0, VOCODER_BLOCK_FRAMES), (VOCODER_BLOCK_FRAMES, n_frames)):
            if start < n_frames:
                with self._working():
                    wave = self._wave(mel, start, min(stop, n_frames))
                    audio = to_host(wave[:, : n_samples - start * per_frame])
                yield audio

    @contextmanager
    def _working(self) -> Iterator[None]:
        on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with engine_errors("mel_decoder"), on_stream:
            yield

    def _here(self, latents: ArrayLike) -> Tensor:
        """[32, L, 32] float32 on the device, for the current stream."""
        if not isinstance(latents, WindowLatents):
            return to_device(np.asarray(latents, np.float32), self._device)
        if self._stream is not None:
            self._stream.wait_event(latents.ready)
            latents.latents.record_stream(self._stream)
        return latents.latents

    def _mel(self, latents: Tensor) -> Tensor:
        """[2, 256, 8 L], of both channels."""
        mels = []
        for half in latents.chunk(2):
            # One audio channel at a time: the mel decoder's largest maps would otherwise double.
            with on_device("mel_decoder", self._device):
                mels.append(self._mel_decoder.run_device(latents=half[None].contiguous())["mel"])
        return torch.cat(mels)

    def _wave(self, mel: Tensor, start: int, stop: int) -> Tensor:
        """The sound of the mel frames from `start` to `stop`, [2, n]."""
        span, per_frame = with_halo(start, stop, mel.shape[2]), self._geometry.samples_per_mel_frame
        with on_device("vocoder", self._device):
            wave = self._vocoder.run_device(mel=mel[:, :, span].contiguous())["waveform"]  # [2, 480 F + 16]
        return wave[:, (start - span.start) * per_frame : (stop - span.start) * per_frame]
