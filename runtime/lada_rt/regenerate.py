"""Drawing a region of a song anew, which masked diffusion gives for free: mask it, denoise, decode what it touches.

What stays and what changes, for a region of codes [a, b):

- Codes outside are kept as they are. Inside, all are masked and drawn again, seeing the kept ones; the schedule runs
  over b - a positions. The region of the whole song is `generate`.
- The windows that reach into the region, or into the seams beside it, are decoded anew: each continues the latents of
  the one before, the first of them those of its untouched neighbour, all from the start noise of the first run. The
  windows after them are left alone, although a full run would carry the change on through their first frames.
- The new audio replaces the old in the region and is crossfaded with it over `SEAM_S` on either side, where both
  render the same codes. Beyond the seams every sample is the old one, bit for bit. Within a seam two renderings are
  mixed that agree in content but not in every phase, so a steady tone may dip there for an instant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lada_rt.audio import AudioInput, load_audio
from lada_rt.decode import SeededNoise, decode_latents, render_windows
from lada_rt.engines.base import Engine, released
from lada_rt.errors import ParamError
from lada_rt.geometry import CodecGeometry
from lada_rt.long_song import denoise_spans
from lada_rt.params import GenerationParams, check_seconds
from lada_rt.progress import OnProgress, Reporter
from lada_rt.results import Layer, Origin, Result
from lada_rt.run import Loaded
from lada_rt.saved_run import SavedRun, vocal_sha256
from lada_rt.stream import Cancel, run_ahead

__all__ = ["SEAM_S", "redo", "restore"]

#: crossfade between old and new audio on either side of a region
SEAM_S = 0.5


def redo(
    loaded: Loaded,
    result: Result,
    start_s: float,
    end_s: float,
    params: GenerationParams,
    on_progress: OnProgress | None,
) -> Result:
    """See `Pipeline.regenerate`."""
    loaded.check_process()
    geometry, mask_id = loaded.bundle.geometry, loaded.bundle.mask_id
    origin = _checked_origin(loaded, result)
    first, last = _region_codes(start_s, end_s, len(result.codes), geometry)
    known = result.codes.astype(np.int64)
    known[first:last] = mask_id
    n_samples = result.audio.shape[1]
    start_sample, stop_sample = first * geometry.samples_per_code, min(n_samples, last * geometry.samples_per_code)
    windows = _touched_windows(start_sample, stop_sample, n_samples, len(known), geometry)
    report = Reporter(on_progress, Cancel())
    engines = report.timed_engines(loaded.engines)
    codes = known
    kept: list[ArrayLike] = []

    def latents() -> Iterator[ArrayLike]:
        nonlocal codes
        with report.timed("denoise"), released(loaded.engines["denoiser"]):
            codes = denoise_spans(
                engines["denoiser"],
                origin.vocal_codes,
                origin.prefix,
                params,
                mask_id,
                max_codes=loaded.max_codes,
                known=known,
                on_step=report.steps_of("denoise"),
                n_threads=loaded.n_threads,
            )
        report.mark_denoised()
        for window in decode_latents(
            engines["flow"],
            codes,
            loaded.stats,
            geometry,
            n_steps=params.flow_steps,
            guidance=params.guidance,
            noise=SeededNoise(origin.flow_seed, geometry),
            windows=windows,
            before=None if windows.start == 0 else _latents_of(windows.start - 1, origin.layers),
            on_step=report.steps_of("flow"),
        ):
            kept.append(window)
            yield window

    audio = result.audio.copy()
    with report.holding(loaded.slots), closing(run_ahead(latents(), report.cancel)) as ahead:
        report.step("render", 0, len(windows))
        span = (start_sample, stop_sample)
        _lay_over(audio, engines, ahead, windows, *span, geometry, report, done=0, total=len(windows))
        timings = report.timings((stop_sample - start_sample) / geometry.sample_rate_hz)
    layer = Layer(windows.start, np.stack(kept), start_sample, stop_sample)
    return replace(
        result,
        audio=audio,
        codes=codes.astype(np.int32),
        params=params,
        timings=timings,
        origin=replace(origin, layers=(*origin.layers, layer)),
    )


def restore(loaded: Loaded, saved: SavedRun, vocal: AudioInput, on_progress: OnProgress | None) -> Result:
    """See `Pipeline.restore`."""
    loaded.check_process()
    if not isinstance(saved, SavedRun):
        raise ParamError(f"saved: expected what load_codes returns, got {type(saved).__name__}")
    geometry, origin = loaded.bundle.geometry, saved.origin
    _check_bundle(loaded, origin)
    report = Reporter(on_progress, Cancel())
    engines = report.timed_engines(loaded.engines)
    with report.holding(loaded.slots):
        with report.timed("encode"):
            read = load_audio(
                vocal,
                geometry.sample_rate_hz,
                start_s=origin.start_s,
                end_s=origin.end_s,
                max_seconds=math.inf if origin.long else loaded.bundle.max_seconds,
            )
        if geometry.n_codes(read.samples.shape[1]) != len(saved.codes) or vocal_sha256(read.samples) != saved.vocal:
            raise ParamError("vocal: expected the one the codes were made for, got another; give that file")
        saved.check_against(loaded.bundle)
        report.mark_denoised()
        n_samples = geometry.n_samples(len(saved.codes))
        audio = np.zeros((2, n_samples), np.float32)
        n_windows, done = sum(len(layer.latents) for layer in origin.layers), 0
        report.step("render", 0, n_windows)
        for layer in origin.layers:
            windows = range(layer.first_window, layer.first_window + len(layer.latents))
            span = (layer.start_sample, layer.stop_sample)
            _lay_over(audio, engines, layer.latents, windows, *span, geometry, report, done=done, total=n_windows)
            done += len(layer.latents)
        timings = report.timings(n_samples / geometry.sample_rate_hz)
    return Result(
        audio=audio,
        sample_rate=geometry.sample_rate_hz,
        codes=saved.codes,
        vocal=read.samples,
        timings=timings,
        params=saved.params,
        warnings=read.warnings,
        origin=origin,
    )


def _checked_origin(loaded: Loaded, result: Result) -> Origin:
    geometry = loaded.bundle.geometry
    if result.origin is None:
        raise ParamError("result: expected one that kept its latents, got none; stream with keep_latents=True")
    _check_bundle(loaded, result.origin)
    n_samples = geometry.n_samples(len(result.codes))
    if result.audio.shape != (2, n_samples):
        raise ParamError(f"result: expected audio of shape [2, {n_samples}], got {list(result.audio.shape)}")
    return result.origin


def _check_bundle(loaded: Loaded, origin: Origin) -> None:
    if origin.bundle_sha256 != loaded.bundle.sha256:
        raise ParamError(
            f"expected a result of bundle {loaded.bundle.sha256[:12]}, got one of {origin.bundle_sha256[:12]}; "
            "load the bundle it was made with"
        )


def _region_codes(start_s: Any, end_s: Any, n_codes: int, geometry: CodecGeometry) -> tuple[int, int]:
    for name, value in (("start_s", start_s), ("end_s", end_s)):
        check_seconds(name, value)
    duration_s = n_codes / geometry.code_rate_hz
    if not start_s < end_s or start_s >= duration_s:
        raise ParamError(f"region: expected a stretch of the {duration_s:g} s, got {start_s:g} to {end_s:g} s")
    return int(start_s * geometry.code_rate_hz), min(n_codes, math.ceil(end_s * geometry.code_rate_hz))


def _seams(start_sample: int, stop_sample: int, n_samples: int, geometry: CodecGeometry) -> tuple[int, int]:
    seam = int(SEAM_S * geometry.sample_rate_hz)
    return max(0, start_sample - seam), min(n_samples, stop_sample + seam)


def _touched_windows(
    start_sample: int, stop_sample: int, n_samples: int, n_codes: int, geometry: CodecGeometry
) -> range:
    """The windows that sound between the outer ends of the seams."""
    start, stop = _seams(start_sample, stop_sample, n_samples, geometry)
    touched = [
        index
        for index in range(geometry.n_windows(n_codes))
        if index * geometry.hop_samples < stop and index * geometry.hop_samples + geometry.window_samples > start
    ]
    return range(touched[0], touched[-1] + 1)


def _latents_of(index: int, layers: tuple[Layer, ...]) -> np.ndarray:
    """Latents of a window as last decoded."""
    for layer in reversed(layers):
        if 0 <= index - layer.first_window < len(layer.latents):
            return layer.latents[index - layer.first_window]
    raise AssertionError(f"window {index} is in no layer")


def _lay_over(
    audio: np.ndarray,
    engines: Mapping[str, Engine],
    latents: Iterable[ArrayLike],
    windows: range,
    start_sample: int,
    stop_sample: int,
    geometry: CodecGeometry,
    report: Reporter,
    *,
    done: int,
    total: int,
) -> None:
    """Render windows and fade them into `audio` [2, N], in place, around [start_sample, stop_sample).

    `done` of `total` windows were rendered before these; progress counts on.
    """
    n_samples = audio.shape[1]
    low, high = _seams(start_sample, stop_sample, n_samples, geometry)
    # The crossfade between windows needs more of the last one than its overlap; what lies past the seam is dropped.
    rendered_to = (windows.stop - 1) * geometry.hop_samples + geometry.overlap_samples + 1
    position = windows.start * geometry.hop_samples
    for piece in render_windows(
        engines,
        latents,
        geometry,
        windows=windows,
        stop_sample=min(n_samples, max(high, rendered_to)),
        on_window=lambda n, _: report.step("render", done + n, total),
    ):
        report.mark_first_audio()
        begin, end = max(position, low), min(position + piece.shape[1], high)
        if begin < end:
            new = piece[:, begin - position : end - position]
            at = np.arange(begin, end)
            weight = np.ones(end - begin, np.float32)
            before, after = at < start_sample, at >= stop_sample
            weight[before] = (at[before] - low + 1) / (start_sample - low + 1)
            weight[after] = (high - at[after]) / (high - stop_sample + 1)
            old = audio[:, begin:end]
            audio[:, begin:end] = np.where(weight == 1, new, old + weight * (new - old))
        position += piece.shape[1]
