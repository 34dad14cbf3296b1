"""Whole songs for bench/gpu_check.py: ours, the public way, and a package as a bundle would hold it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import gpu_sections
import numpy as np
import torch
from gpu_baseline import PublicSong
from gpu_models import PREFIX_SLOTS, flops, make_stage, stage_sizes
from gpu_sections import State, relative_error, timed
from lada_rt.decode import LatentStats, SeededNoise, decode_latents, render_pieces, render_windows
from lada_rt.denoise import denoise
from lada_rt.encode import encode
from lada_rt.params import GenerationParams
from lada_rt.progress import Reporter
from lada_rt.schedule import mask_counts
from lada_rt.stream import Cancel, run_ahead
from lada_rt.torch_loop.memory import memory_plan
from lada_rt.torch_loop.path import engines_on_device

__all__ = ["SECTIONS", "Section"]


@dataclass(frozen=True)
class Section:
    """A part of the check: its name, rough seconds at full size on an H200, what it does."""

    name: str
    estimate_s: float
    run: Callable[[State], dict[str, Any]]
    essential: bool = True


def _stats(state: State) -> LatentStats:
    shape = (state.size.geometry.latent_channels, state.size.geometry.latent_bins)
    return LatentStats(np.zeros(shape, np.float32), np.ones(shape, np.float32))


def _sync(state: State) -> None:
    if state.device.type == "cuda":
        torch.cuda.synchronize()


def generate(state: State, path: dict[str, Any], seconds: float, params: GenerationParams) -> dict[str, Any]:
    """One song as Pipeline makes it, from samples in memory to samples in memory; text and reference left out.

    Returns:
        Seconds of each part, RTF, time to first audio; times of the denoising steps and of the flow's.
    """
    g = state.size.geometry
    rng = np.random.default_rng(0)
    vocal = rng.uniform(-0.5, 0.5, (2, round(seconds * g.sample_rate_hz))).astype(np.float32)
    prefix = rng.standard_normal((PREFIX_SLOTS, state.size.denoiser.condition_size)).astype(np.float32)
    marks: dict[str, list[Any]] = {"denoise": [], "flow": []}

    def mark(stage: str) -> Callable[[int, int], None]:
        def on_step(done: int, total: int) -> None:
            if state.device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks[stage].append(event)
            else:
                marks[stage].append(time.perf_counter())

        return on_step

    _sync(state)
    start = time.perf_counter()
    vocal_codes = encode(path["encoder"], vocal, g)
    encoded_s = time.perf_counter() - start
    codes = denoise(path["denoiser"], vocal_codes, prefix, params, state.size.denoiser.mask_id, on_step=mark("denoise"))
    denoised_s = time.perf_counter() - start
    n_windows, n_samples = g.n_windows(len(codes)), g.n_samples(len(codes))
    report = Reporter(None, Cancel())

    def latents() -> Iterator[Any]:
        for index, window in enumerate(_latents(state, path, codes, params, on_step=mark("flow"))):
            yield window
            if index == 0:
                report.wait_first_audio()  # nothing competes with it

    pieces, first_audio_s = [], 0.0
    with closing(run_ahead(latents(), report.cancel)) as ahead:
        for piece in render_windows(path, ahead, g, windows=range(n_windows), stop_sample=n_samples):
            report.mark_first_audio()
            first_audio_s = first_audio_s or time.perf_counter() - start
            pieces.append(piece)
    total_s = time.perf_counter() - start
    audio = np.concatenate(pieces, axis=1)
    assert audio.shape == (2, n_samples)
    assert np.isfinite(audio).all()
    audio_s = n_samples / g.sample_rate_hz
    _sync(state)
    return {
        "audio_s": audio_s,
        "steps": params.steps,
        "flow_steps": params.flow_steps,
        "windows": n_windows,
        "encode_s": encoded_s,
        "denoise_s": denoised_s - encoded_s,
        "decode_s": total_s - denoised_s,
        "total_s": total_s,
        "first_audio_s": first_audio_s,
        "rtf": total_s / audio_s,
        "denoise_step_s": _gaps(marks["denoise"]),
        "flow_step_s": _gaps(marks["flow"]),
    }


def _latents(
    state: State, path: dict[str, Any], codes: np.ndarray, params: GenerationParams, **options: Any
) -> Iterator[Any]:
    return decode_latents(
        path["flow"],
        codes,
        _stats(state),
        state.size.geometry,
        n_steps=params.flow_steps,
        guidance=params.guidance,
        noise=SeededNoise(params.seed, state.size.geometry),
        **options,
    )


def _warm(state: State, path: dict[str, Any], seconds: float, params: GenerationParams) -> float:
    """Seconds of the first denoising at a length and the first window, which load kernels and capture graphs."""
    g = state.size.geometry
    n_codes = g.n_codes(round(seconds * g.sample_rate_hz))
    slots = np.zeros((PREFIX_SLOTS, state.size.denoiser.condition_size), np.float32)
    begin = time.perf_counter()
    codes = denoise(path["denoiser"], np.zeros(n_codes, np.int64), slots, params, state.size.denoiser.mask_id)
    (window,) = _latents(state, path, codes, params, windows=range(1))
    for _ in render_pieces(path, window, min(g.window_samples, g.n_samples(n_codes)), g):
        pass
    _sync(state)
    return time.perf_counter() - begin


def _gaps(marks: list[Any]) -> list[float]:
    if marks and isinstance(marks[0], float):
        return [after - before for before, after in pairwise(marks)]
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def denoise_work(state: State, n_codes: int, params: GenerationParams) -> float:
    """Floating-point operations of a song's denoising."""
    size = state.size
    rows = [n_codes, *mask_counts(n_codes, params.steps)[:-1]]
    one, every = (flops("denoiser", size, n_frames=n_codes, n_rows=n) for n in (1, n_codes))
    slope = (every - one) / max(1, n_codes - 1)
    return sum(one + slope * (n - 1) for n in rows)


def songs(state: State) -> dict[str, Any]:
    """Whole songs at every length and number of steps, graphs captured before; the middle length first."""
    size, g = state.size, state.size.geometry
    path: dict[str, Any] = dict(engines_on_device(state.engines, g))
    weights = sum(engine.n_bytes for engine in state.engines.values())
    found: dict[str, Any] = {"weights_gb": weights / 1e9, "runs": [], "left_out": []}
    lengths = [size.seconds[1], *(s for s in size.seconds if s != size.seconds[1])]
    warmed: set[float] = set()
    for seconds, steps in product(lengths, sorted(size.steps, reverse=True)):
        if state.time_left() < 0:
            found["left_out"].append(f"{seconds:g} s, {steps} steps")
            continue
        if state.device.type == "cuda":
            # Reserved, not allocated, is counted below: what is free inside a graph's memory is of no use to others.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        params = GenerationParams(steps=steps, flow_steps=size.flow_steps)
        # a service does this before the first song (Pipeline.warmup)
        warm_s = 0.0 if seconds in warmed else _warm(state, path, seconds, params)
        warmed.add(seconds)
        run = generate(state, path, seconds, params)
        run["warm_up_s"] = warm_s
        run["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9 if state.device.type == "cuda" else 0.0
        run["planned_gb"] = memory_plan(weights, g, seconds).peak / 1e9
        work = denoise_work(state, g.n_codes(round(seconds * g.sample_rate_hz)), params)
        run["denoiser"] = state.fraction(int(work), run["denoise_s"])
        # a step beside which a window is rendered counts in full
        run["flow"] = state.fraction(flops("flow", size, batch=2), float(np.median(run["flow_step_s"])))
        found["runs"].append(run)
        if seconds == size.seconds[1] and steps == max(size.steps):
            state.song = run
        state.partial(found)
        state.say(
            f"{run['audio_s']:.2f} s, {steps} steps: {run['total_s']:.3f} s, RTF {run['rtf']:.4f}, denoise "
            f"{run['denoise_s']:.3f}, decode {run['decode_s']:.3f}, peak {run['peak_gb']:.1f} GB"
        )
    return found


def quiet_loop(state: State) -> dict[str, Any]:
    """The loops without a single wait for the device, and with graphs as without."""
    size, g = state.size, state.size.geometry
    params = GenerationParams(steps=size.steps[0], flow_steps=2)
    n_codes = g.n_codes(round(size.seconds[0] * g.sample_rate_hz))
    rng = np.random.default_rng(1)
    vocal = rng.integers(0, size.denoiser.n_codes, n_codes)
    prefix = rng.standard_normal((PREFIX_SLOTS, size.denoiser.condition_size)).astype(np.float32)
    codes: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    for capture in (False, True):
        path: dict[str, Any] = dict(engines_on_device(state.engines, g, capture=capture))

        def run(path: dict[str, Any] = path) -> tuple[np.ndarray, np.ndarray]:
            drawn = denoise(path["denoiser"], vocal, prefix, params, size.denoiser.mask_id)
            (window,) = _latents(state, path, codes[0] if codes else drawn, params, windows=range(1))
            return drawn, np.asarray(window)

        drawn, window = run()
        if state.device.type == "cuda" and capture:
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        codes.append(drawn)
        latents.append(window)
    differing = float((codes[0] != codes[1]).sum())
    error = relative_error(torch.from_numpy(latents[1]), torch.from_numpy(latents[0]))
    return {
        "codes": state.check("codes with graphs and without, differing", differing, 0),
        "latents": state.check("latents with graphs and without", error, 1e-6),
    }


def baseline(state: State) -> dict[str, Any]:
    """The same song the public way: each part timed alone, and then, if there is time, the whole song."""
    found: dict[str, Any] = {"steps": state.size.steps[-1]}
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        public = PublicSong(state)
        found["same_logits"] = state.check("public denoiser against ours, float32", public.denoiser_error(), 1e-4)
        found["parts"] = parts = {name: timed(run, state.device, 3, 1) for name, run in public.parts.items()}
        # encoding is ours: it is one pass through the same network
        seconds = {name: public.counts[name] * part["median_s"] for name, part in parts.items()}
        found["parts_s"] = {"encode": state.song.get("encode_s", 0.0), **seconds}
        found["extrapolated_s"] = found["total_s"] = sum(found["parts_s"].values())
        found["extrapolated"] = True
        state.partial(found)
        if found["extrapolated_s"] < state.time_left():
            _sync(state)
            begin = time.perf_counter()
            public.whole_song()
            _sync(state)
            found["whole_s"] = found["total_s"] = found["parts_s"]["encode"] + time.perf_counter() - begin
            found["extrapolated"] = False
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    found["audio_s"] = state.size.geometry.n_samples(state.size.n_frames) / state.size.geometry.sample_rate_hz
    found["rtf"] = found["total_s"] / found["audio_s"]
    if state.song:
        found["speedup"] = found["total_s"] / state.song["total_s"]
    state.say(", ".join(f"{name} {part:.2f} s" for name, part in found["parts_s"].items()))
    state.say(f"in all {found['total_s']:.2f} s{' (extrapolated)' if found['extrapolated'] else ''}")
    return found


def package(name: str) -> Callable[[State], dict[str, Any]]:
    """The section for one stage as AOTInductor packages of the precision that `build-engine` gives it: built, compared
    with the float32 module; those of the flow are timed beside the module."""

    def section(state: State) -> dict[str, Any]:
        from lada_rt.engines.torch import load_package
        from lada_rt_export.stages import stage_precisions, stage_spec
        from lada_rt_export.to_aoti import build_engine

        size = state.size
        precision = stage_precisions("bf16")[name]
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            spec = stage_spec(name, make_stage(name, size, state.device), stage_sizes(size))
            description = build_engine(spec, Path(folder), precision=precision, device=state.device.type)
            n_bytes = sum(part["bytes"] for part in description["parts"])
            found = {"build_s": time.monotonic() - begin, "precision": precision, "bytes": n_bytes}
            found["proof"] = proof = description["proof"]
            state.say(
                f"{name} package: {precision}, {n_bytes / 1e6:.0f} MB, built in {found['build_s']:.0f} s, error "
                f"{proof['max_rel_error']:.1e} of {proof['tolerance']:.0e}"
            )
            if name != "flow":
                return found
            inputs = gpu_sections.flow_inputs(state)
            parts = {part["name"]: load_package(Path(folder), part, state.device) for part in description["parts"]}
            held, state.engines = state.engines, parts
            try:
                seconds = timed(lambda: gpu_sections.run_stage(state, inputs), state.device, size.repeat)
            finally:
                state.engines = held
        rate = state.fraction(flops("flow", size, batch=2), seconds["median_s"])
        state.say(f"flow package: one guided step {seconds['median_s'] * 1e3:.2f} ms")
        return found | {"step": seconds | rate}

    return section


#: In order of running. What is essential keeps its time when something before it is slow (gpu_check._limit).
SECTIONS = [
    Section("ceilings", 10, gpu_sections.ceilings),
    Section("kernels", 30, gpu_sections.kernels),
    Section("attention", 10, gpu_sections.attention, essential=False),
    Section("engines", 90, gpu_sections.engines),
    Section("sound", 45, gpu_sections.sound),
    Section("songs", 90, songs),
    Section("baseline", 60, baseline),
    Section("stage_times", 35, gpu_sections.stage_times, essential=False),
    Section("quiet_loop", 15, quiet_loop, essential=False),
    Section("flow_package", 110, package("flow"), essential=False),
    Section("denoiser_package", 90, package("denoiser"), essential=False),
    Section("mel_decoder_package", 90, package("mel_decoder"), essential=False),
    Section("vocoder_package", 60, package("vocoder"), essential=False),
]
