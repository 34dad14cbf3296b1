"""Whole songs for bench/gpu_check.py: ours, the public way, and a package as a bundle would hold it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_sections
import numpy as np
import torch
from gpu_baseline import n_vocoder_chunks, public_denoiser, public_flow, public_sample
from gpu_models import OUTPUTS, PREFIX_SLOTS, flops, make_stage
from gpu_sections import State, relative_error, timed
from lada_rt.decode import Crossfade, LatentStats, rendered_samples
from lada_rt.encode import encode
from lada_rt.params import GenerationParams
from lada_rt.schedule import mask_counts
from lada_rt.stream import Cancel, run_ahead
from lada_rt.torch_loop.memory import memory_plan
from lada_rt.torch_loop.path import engines_on_device, warm_up
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import FlowStage, VocoderStage

__all__ = ["SECTIONS"]


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
    codes = path["denoiser"].denoise(vocal_codes, prefix, params, state.size.denoiser.mask_id, on_step=mark("denoise"))
    denoised_s = time.perf_counter() - start
    n_samples = g.n_samples(len(codes))
    crossfade, pieces, first_audio_s = Crossfade(g, n_samples), [], 0.0
    latents = path["flow"].decode_latents(
        codes,
        _stats(state),
        g,
        n_steps=params.flow_steps,
        guidance=params.guidance,
        noise=path["flow"].seeded_noise(params.seed, g),
        on_step=mark("flow"),
    )
    n_windows = g.n_windows(len(codes))
    for index, window in enumerate(run_ahead(latents, Cancel())):
        audio = window.render(rendered_samples(index, n_samples, g))
        pieces.append(crossfade.push(audio, last=index + 1 == n_windows))
        first_audio_s = first_audio_s or time.perf_counter() - start
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
    """Whole songs at every length and number of steps, graphs captured before."""
    size, g = state.size, state.size.geometry
    path: dict[str, Any] = dict(engines_on_device(state.engines, g, state.device))
    weights = sum(engine.n_bytes for engine in state.engines.values())
    runs = []
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for seconds in size.seconds:
        for steps in size.steps:
            params = GenerationParams(steps=steps, flow_steps=size.flow_steps)
            # the first run of a length captures its graphs; a service does that in warm_up
            begin = time.perf_counter()
            warm_up(
                path,
                _stats(state),
                g,
                size.denoiser.mask_id,
                size.denoiser.condition_size,
                seconds=seconds,
                params=params,
            )
            _sync(state)
            warm_s = time.perf_counter() - begin
            run = generate(state, path, seconds, params)
            run["warm_up_s"] = warm_s
            # Reserved, not allocated: what is free inside a graph's memory is of no use to anyone else. It holds the
            # graphs of the shorter songs before too.
            run["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9 if state.device.type == "cuda" else 0.0
            run["planned_gb"] = memory_plan(weights, g, seconds).peak / 1e9
            work = denoise_work(state, g.n_codes(round(seconds * g.sample_rate_hz)), params)
            run["denoiser"] = state.fraction(int(work), run["denoise_s"])
            # a step beside which a window is rendered counts in full
            run["flow"] = state.fraction(flops("flow", size, batch=2), float(np.median(run["flow_step_s"])))
            runs.append(run)
            state.say(
                f"{run['audio_s']:.2f} s, {steps} steps: {run['total_s']:.3f} s, RTF {run['rtf']:.4f}, denoise "
                f"{run['denoise_s']:.3f}, decode {run['decode_s']:.3f}, peak {run['peak_gb']:.1f} GB"
            )
    state.song = max((r for r in runs if r["audio_s"] < size.seconds[1] + 1), key=lambda r: (r["audio_s"], r["steps"]))
    return {"weights_gb": weights / 1e9, "runs": runs}


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
        path: dict[str, Any] = dict(engines_on_device(state.engines, g, state.device, capture=capture))

        def run(path: dict[str, Any] = path) -> tuple[np.ndarray, np.ndarray]:
            drawn = path["denoiser"].denoise(vocal, prefix, params, size.denoiser.mask_id)
            noise = path["flow"].seeded_noise(1, g)
            windows = path["flow"].decode_latents(
                codes[0] if codes else drawn, _stats(state), g, n_steps=2, guidance=1.5, noise=noise, windows=range(1)
            )
            return drawn, np.asarray(next(windows))

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
    """The same song the public way. One step, one window, one chunk are measured; the whole is their sum."""
    size, g, device = state.size, state.size.geometry, state.device
    n_codes = size.n_frames
    n_windows, steps = g.n_windows(n_codes), size.steps[-1]
    found: dict[str, Any] = {"extrapolated": True, "audio_s": g.n_samples(n_codes) / g.sample_rate_hz, "steps": steps}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        stage: Any = make_stage("denoiser", size, device)
        assert isinstance(stage, DenoiserStage)
        given = gpu_sections.denoiser_inputs(state, n_codes, n_codes)
        with gpu_sections.exact_float32():
            ours = stage(**given)
            theirs = public_denoiser(stage.mask_predictor, given["vocal_codes"], given["codes"], given["prefix"])
        found["same_logits"] = state.check(
            "public denoiser against ours, float32", relative_error(theirs[0], ours), 1e-4
        )
        masked = given["codes"][0] == size.denoiser.mask_id
        inputs = (given["vocal_codes"], given["codes"], given["prefix"])
        found["denoiser"] = timed(partial(public_denoiser, stage.mask_predictor, *inputs), device, 3, 1)
        found["sampler"] = timed(partial(public_sample, theirs, masked, 10, 4.0, 100, 0.9), device, 3, 1)
        del ours, theirs

        stage = make_stage("flow", size, device)
        assert isinstance(stage, FlowStage)
        window = gpu_sections.flow_inputs(state)
        found["flow"] = timed(lambda: public_flow(stage, **window), device, 3, 1)
        rng = state.rng(9)
        latents = torch.randn(1, g.latent_channels // 2, g.window_latents, g.latent_bins, device=device, generator=rng)
        stage = make_stage("mel_decoder", size, device)
        with torch.no_grad():
            found["mel_decoder"] = timed(lambda: stage(latents=latents), device, 3, 1)
        stage = make_stage("vocoder", size, device)
        assert isinstance(stage, VocoderStage)
        chunk = torch.randn(1, g.mel_bins, size.vocoder_frames, device=device, generator=rng) - 5
        with torch.no_grad():
            found["vocoder_chunk"] = timed(lambda: stage(mel=chunk), device, 3, 1)
    finally:
        torch.set_float32_matmul_precision(before)
    mel_frames = g.window_latents * g.mel_frames_per_latent
    n_chunks = n_vocoder_chunks(mel_frames, size.vocoder_frames, max(1, size.vocoder_frames // 4))
    parts = {
        "encode": state.song.get("encode_s", 0.0),
        "denoise": steps * (found["denoiser"]["median_s"] + found["sampler"]["median_s"]),
        "flow": n_windows * size.flow_steps * found["flow"]["median_s"],
        "mel_decoder": n_windows * 2 * found["mel_decoder"]["median_s"],
        "vocoder": n_windows * 2 * n_chunks * found["vocoder_chunk"]["median_s"],
    }
    total = sum(parts.values())
    found |= {"parts_s": parts, "total_s": total, "rtf": total / found["audio_s"]}
    if state.song:
        found["speedup"] = total / state.song["total_s"]
    state.say(", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items()) + f"; in all {total:.2f} s")
    return found


def package(state: State) -> dict[str, Any]:
    """The flow as AOTInductor packages: built, compared, timed beside the module."""
    from lada_rt.engines.torch import load_package
    from lada_rt_export.stages import StageSizes, stage_spec
    from lada_rt_export.to_aoti import build_engine

    size = state.size
    sizes = StageSizes(
        size.geometry,
        vocab_size=size.quantiser.codebook_size,
        mask_id=size.denoiser.mask_id,
        feature_size=size.denoiser.condition_size,
        ref_hidden_size=768,
        ref_chunk_samples=1_440_000,
        text_vocab_size=250_002,
        max_frames=9001,
    )
    begin = time.monotonic()
    inputs = gpu_sections.flow_inputs(state)
    with tempfile.TemporaryDirectory() as folder:
        spec = stage_spec("flow", make_stage("flow", size, state.device), sizes)
        description = build_engine(spec, Path(folder), precision="bf16", device=state.device.type)
        built_s = time.monotonic() - begin
        held = state.engines
        state.engines = {part["name"]: load_package(Path(folder), part, state.device) for part in description["parts"]}
        try:
            seconds = timed(lambda: gpu_sections.run_stage(state, inputs), state.device, size.repeat)
        finally:
            state.engines = held
    rate = state.fraction(flops("flow", size, batch=2), seconds["median_s"])
    state.say(f"flow package: built in {built_s:.0f} s, one guided step {seconds['median_s'] * 1e3:.2f} ms")
    return {"build_s": built_s, "proof": description["proof"], "step": seconds | rate, "outputs": list(OUTPUTS["flow"])}


#: name, rough seconds at full size on an H200, function. What matters most comes first.
SECTIONS: list[tuple[str, float, Callable[[State], dict[str, Any]]]] = [
    ("ceilings", 10, gpu_sections.ceilings),
    ("kernels", 30, gpu_sections.kernels),
    ("attention", 10, gpu_sections.attention),
    ("engines", 90, gpu_sections.engines),
    ("sound", 45, gpu_sections.sound),
    ("stage_times", 15, gpu_sections.stage_times),
    ("songs", 90, songs),
    ("baseline", 40, baseline),
    ("quiet_loop", 15, quiet_loop),
    ("package", 150, package),
]
