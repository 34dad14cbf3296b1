"""The sections of bench/gpu_check.py: what is right, and how long each part takes."""

from __future__ import annotations

import contextlib
import copy
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from gpu_models import OUTPUTS, PREFIX_SLOTS, Size, flops, make_stage
from lada_rt.engines.torch import TorchEngine
from lada_rt.params import GenerationParams
from lada_rt.torch_loop.denoise import DenoiseLoop
from lada_rt.torch_loop.device import exact_float32
from lada_rt.torch_loop.noise import flow_noise
from lada_rt_export.models.channels_last import ChannelsLastMelDecoder, ChannelsLastVocoder
from lada_rt_export.stages import CODE_MISMATCH_TOLERANCE, DTYPES
from lada_rt_export.torch_stages import StagePart, compile_blocks, part_engine, stage_parts
from lada_rt_kernels import remask, remask_ref, sample, sample_ref
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["State", "attention", "ceilings", "engines", "kernels", "sound", "stage_times", "timed"]

SETTINGS: dict[str, Any] = {"top_k": 100, "top_p": 0.9, "temperature": 1.0}
#: errors that half precision may show in denoiser and flow, ||found - expected|| / ||expected||
HALF_LIMIT = 4e-2
#: mel decoder and vocoder use half precision only where the error is below this
SOUND_LIMIT_DB = -60.0
#: what another form of a stage of sound may take, compilation included
SOUND_FORM_S = 15.0


class State:
    """What sections hand to later ones."""

    def __init__(self, size: Size, device: torch.device, *, compile_blocks: bool) -> None:
        self.size = size
        self.device = device
        self.compiles = compile_blocks
        self.right = True
        self.engines: dict[str, TorchEngine] = {}
        self.peak_tflops: float | None = None
        self.song: dict[str, Any] = {}
        #: when the section that runs should be done, as time.monotonic counts; set, as `partial` is, by gpu_check
        self.deadline = float("inf")
        #: keeps what a section has found so far, should it not come to its end
        self.partial: Callable[[dict[str, Any]], None] = lambda found: None
        self._attention = contextlib.ExitStack()
        self._lines: list[str] = []

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def check(self, what: str, error: float, limit: float) -> dict[str, float | bool]:
        """Note an error and whether it is within its limit."""
        right = bool(error <= limit)
        self.right &= right
        self.say(f"{what}: {error:.3g} (limit {limit:g}) {'ok' if right else 'WRONG'}")
        return {"error": error, "limit": limit, "right": right}

    def prefer(self, backend: SDPBackend) -> None:
        """Use this attention kernel first from here on."""
        self._attention.close()
        order = [backend, *(b for b in BACKENDS.values() if b != backend)]
        self._attention.enter_context(sdpa_kernel(order, set_priority=True))

    def fraction(self, work: int, seconds: float) -> dict[str, float | None]:
        """TFLOP/s of some work, and as a fraction of the measured ceiling."""
        rate = work / seconds / 1e12
        return {"tflops": rate, "of_ceiling": rate / self.peak_tflops if self.peak_tflops else None}

    def rng(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def machine(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "cpu",
            "driver": _nvidia_smi("driver_version") if self.device.type == "cuda" else None,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if self.device.type == "cuda" else None,
            "python": platform.python_version(),
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _nvidia_smi(field: str) -> str | None:
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    where = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=where)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def timed(function: Callable[[], Any], device: torch.device, repeat: int, warmup: int = 2) -> dict[str, float]:
    """Seconds of one call on the device: median, 20th and 80th percentile."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeat):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            _occupy(device)
            start.record()
            function()
            stop.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - begin)
    low, median, high = np.percentile(seconds, [20, 50, 80])
    return {"median_s": float(median), "p20_s": float(low), "p80_s": float(high)}


def _occupy(device: torch.device) -> None:
    """Give the device work for most of a millisecond, so that the host has queued what is timed before it begins: as in
    the loops, where the host runs ahead."""
    buffer = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    for _ in range(2):
        buffer.zero_()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite for anything that is no number."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def ceilings(state: State) -> dict[str, Any]:
    """Rates that nothing here can pass: a large product of random matrices, a large copy."""
    n, device = state.size.matmul, state.device
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        factors = [torch.randn(n, n, device=device, generator=state.rng(s)).to(dtype) for s in (1, 2)]
        repeat = 3 if name == "fp32" else 4 * state.size.repeat
        seconds = timed(partial(torch.matmul, *factors), device, repeat)["median_s"]
        found[f"matmul_{name}_tflops"] = 2 * n**3 / seconds / 1e12
    source = torch.randn(state.size.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, state.size.repeat)["median_s"]
    found["copy_gb_s"] = 2 * source.numel() * 4 / seconds / 1e9
    state.peak_tflops = found["matmul_bf16_tflops"]
    state.say(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def exact_logits(vocal_codes: Tensor, codes: Tensor, prefix: Tensor, rows: Tensor) -> Tensor:
    """Logits made of small integers: the same bits on every device."""
    ids = torch.arange(300, device=rows.device)
    known = (codes * (codes < 300)).sum() % 9973
    base = (vocal_codes[0][rows] * 31 + rows * 17 + known * 5 + prefix.sum().to(torch.int64))[:, None]
    return ((base + ids * (rows[:, None] * 7 + 13) + ids * ids) % 97).to(torch.float32) / 8


def kernels(state: State) -> dict[str, Any]:
    """Sampler, remask, noise and the whole loop against torch; time of the sampler beside a sort."""
    device, vocab, n_rows = state.device, state.size.denoiser.n_codes, state.size.n_frames
    found: dict[str, Any] = {"check": {}, "sample": []}
    logits = torch.randn(n_rows, vocab, device=device, generator=state.rng(3)) * 3
    rows = torch.arange(n_rows, device=device)
    some = slice(0, min(n_rows, 512))
    for name in ("fp32", "bf16"):
        x = logits[some].to(DTYPES[name])
        drawn = sample(x, rows[some], seed=7, step=3, **SETTINGS)
        wanted = sample_ref(x, rows[some], seed=7, step=3, **SETTINGS)
        few = sample_ref(x[:32].cpu(), rows[:32].cpu(), seed=7, step=3, **SETTINGS)
        for index, what in enumerate(("tokens", "confidence")):
            wrong = float((drawn[index] != wanted[index]).sum() + (drawn[index][:32].cpu() != few[index]).sum())
            found["check"][f"sample_{name}_{what}"] = state.check(f"sampler, {name}, differing {what}", wrong, 0)
    tokens, confidence = sample(logits, rows, seed=7, step=3, **SETTINGS)
    choice: dict[str, Any] = {"strategy": "low_confidence", "mask_id": vocab, "seed": 7, "step": 3, "tau": 4.2}
    wrong = 0.0
    for n_masked in (0, 1, n_rows // 3, n_rows):
        codes, codes_ref = (torch.full((n_rows,), vocab, device=device) for _ in range(2))
        left = remask(codes, rows, tokens, confidence, n_masked=n_masked, **choice)
        left_ref = remask_ref(codes_ref, rows, tokens, confidence, n_masked=n_masked, **choice)
        wrong += float((codes != codes_ref).sum() + (left != left_ref).sum())
    found["check"]["remask"] = state.check("remask, differing positions", wrong, 0)
    noise = flow_noise(13, 5, (32, 64, 32), device).cpu()
    same = float((noise != flow_noise(13, 5, (32, 64, 32), torch.device("cpu"))).sum())
    found["check"]["noise"] = state.check("flow noise, differing bits", same, 0)
    rng = np.random.default_rng(0)
    vocal, prefix = rng.integers(0, 300, 200), np.zeros((2, 8), np.float32)
    loops = (DenoiseLoop(TorchEngine(exact_logits, ["logits"], d), d, impl=i) for d, i in _loop_places(device))
    drawn_codes = [loop.denoise(vocal, prefix, GenerationParams(steps=12), 300) for loop in loops]
    differing = float((drawn_codes[0] != drawn_codes[1]).sum())
    found["check"]["loop"] = state.check("codes of the loop against the CPU's, differing", differing, 0)

    for count in sorted({n_rows, n_rows // 2, n_rows // 8, min(64, n_rows)}, reverse=True):
        given, positions = logits[:count], rows[:count]
        entry: dict[str, Any] = {"rows": count}
        draw = partial(sample, given, positions, seed=7, step=3, check_values=False, **SETTINGS)
        entry |= timed(draw, device, state.size.repeat)
        entry["gb_s"] = given.numel() * 4 / entry["median_s"] / 1e9
        entry["sort_s"] = timed(partial(torch.sort, given, dim=-1, descending=True), device, 3, 1)["median_s"]
        found["sample"].append(entry)
        state.say(f"sample {count} rows: {entry['median_s'] * 1e3:.3f} ms, {entry['gb_s']:.0f} GB/s")
    codes = torch.full((n_rows,), vocab, device=device)
    found["remask"] = timed(
        lambda: remask(codes, rows, tokens, confidence, n_masked=n_rows // 2, **choice), device, state.size.repeat
    )
    state.say(f"remask {n_rows} rows: {found['remask']['median_s'] * 1e3:.3f} ms")
    return found


def _loop_places(device: torch.device) -> tuple[tuple[torch.device, str | None], ...]:
    return (device, None), (torch.device("cpu"), "torch")


def attention(state: State) -> dict[str, Any]:
    """Which attention kernel is fastest at the flow's shape, and which at the denoiser's."""
    size, device = state.size, state.device
    rows, cols = size.flow.grid
    shapes = {
        "flow": (2, size.flow.n_heads, size.flow.n_heads, rows * cols, size.flow.head_dim),
        "denoiser": (
            1,
            size.denoiser.n_heads,
            size.denoiser.n_kv_heads,
            size.n_frames + PREFIX_SLOTS,
            size.denoiser.head_dim,
        ),
    }
    found: dict[str, Any] = {}
    for where, (batch, heads, kv_heads, n, width) in shapes.items():
        q, k, v = (
            torch.randn(batch, h, n, width, device=device, generator=state.rng(h)).bfloat16()
            for h in (heads, kv_heads, kv_heads)
        )
        work = 4 * batch * heads * n * n * width
        found[where] = {}
        for name, backend in BACKENDS.items():
            if name == "math" and device.type == "cuda":
                continue  # holds every score
            try:
                with sdpa_kernel([backend]):
                    attend = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=heads != kv_heads)
                    entry: dict[str, Any] = timed(attend, device, state.size.repeat)
            except RuntimeError as error:
                found[where][name] = {"refused": " ".join(str(error).split())[:200]}
                continue
            found[where][name] = entry | state.fraction(work, entry["median_s"])
            rate = found[where][name]["tflops"]
            state.say(f"attention of {where}, {name}: {entry['median_s'] * 1e3:.3f} ms, {rate:.1f} TFLOP/s")
    usable = {n: e["median_s"] for n, e in found["flow"].items() if "median_s" in e}
    found["chosen"] = min(usable, key=lambda name: usable[name])
    state.prefer(BACKENDS[found["chosen"]])
    state.say(f"chosen: {found['chosen']}")
    return found


def denoiser_inputs(state: State, n_frames: int, n_rows: int) -> dict[str, Tensor]:
    config, device = state.size.denoiser, state.device
    rng = state.rng(5)
    vocal, codes = torch.randint(0, config.n_codes, (2, 1, n_frames), device=device, generator=rng)
    codes[:, ::2] = config.mask_id
    prefix = torch.randn(1, PREFIX_SLOTS, config.condition_size, device=device, generator=rng)
    # evenly spread over the song
    rows = torch.arange(n_rows, device=device) * n_frames // n_rows
    return {"vocal_codes": vocal, "codes": codes, "prefix": prefix, "rows": rows}


def flow_inputs(state: State, n_songs: int = 1) -> dict[str, Tensor]:
    """Both halves of the guidance for a window of each song, unconditioned rows first."""
    g, device, rng = state.size.geometry, state.device, state.rng(6)
    shape = (2 * n_songs, g.latent_channels, g.window_latents, g.latent_bins)
    x, context = torch.randn(2, *shape, device=device, generator=rng)
    context[:, :, g.context_latents :] = 0
    codes = torch.randint(0, state.size.quantiser.codebook_size, (1, g.window_codes), device=device, generator=rng)
    times = torch.full((2 * n_songs,), 0.35, device=device)
    conditional = torch.tensor([0.0, 1.0], device=device).repeat_interleave(n_songs)
    return {
        "x": x,
        "context": context,
        "codes": codes.expand(2 * n_songs, -1).contiguous(),
        "conditional": conditional,
        "t": times,
    }


def engines(state: State) -> dict[str, Any]:
    """Make the engines, denoiser and flow in bf16, and compare each at full size with its float32 module."""
    found: dict[str, Any] = {}
    for name in ("encoder", "denoiser", "flow"):
        stage = make_stage(name, state.size, state.device)
        begin = time.monotonic()
        try:
            found[name] = _engine_checks(state, name, stage)
        except Exception as error:
            if not state.compiles:
                raise
            state.compiles = False
            found["not_compiled"] = " ".join(str(error).split())[:500]
            state.say(f"blocks are left eager: {found['not_compiled']}")
            found[name] = _engine_checks(state, name, stage)
        found[f"{name}_first_runs_s"] = round(time.monotonic() - begin, 1)
        del stage
    return found | {"compiled": state.compiles}


def _engine_checks(state: State, name: str, stage: nn.Module) -> dict[str, Any]:
    precision = "fp32" if name == "encoder" else "bf16"
    for part in stage_parts(name, stage, OUTPUTS[name], precision=precision, device=state.device):
        if state.compiles:
            compile_blocks(part.module)
        state.engines[part.name] = part_engine(part, state.device)
    if name == "denoiser":
        lengths = sorted({min(751, state.size.n_frames), state.size.n_frames})
        cases = {n: denoiser_inputs(state, n, max(1, n // 4)) for n in lengths}
        return {f"T{n}": _compare(state, stage, inputs, f"denoiser, bf16, T = {n}") for n, inputs in cases.items()}
    if name == "flow":
        return _compare(state, stage, flow_inputs(state), "flow, bf16")
    rng = torch.Generator(state.device).manual_seed(3)
    shape = (1, 2, state.size.geometry.encode_window_samples)
    audio = 0.1 * torch.randn(shape, device=state.device, generator=rng)
    with exact_float32, torch.no_grad():
        expected = stage(audio=audio)
    codes = state.engines["encoder"].run_device(audio=audio)["codes"]
    differing = (codes != expected).float().mean().item()
    return state.check("encoder, fp32, share of differing codes", differing, CODE_MISMATCH_TOLERANCE)


def _compare(state: State, stage: nn.Module, inputs: dict[str, Tensor], what: str) -> dict[str, float | bool]:
    with exact_float32, torch.no_grad():
        expected = stage(**inputs)
    return state.check(what, relative_error(run_stage(state, inputs), expected), HALF_LIMIT)


def run_stage(state: State, inputs: dict[str, Tensor]) -> Tensor:
    """One evaluation of denoiser or flow by its engines."""
    if "rows" in inputs:
        return state.engines["denoiser"].run_device(**inputs)["logits"]
    tables = state.engines["flow_prepare"].run_device(
        context=inputs["context"], codes=inputs["codes"], conditional=inputs["conditional"], times=inputs["t"][:1]
    )
    return state.engines["flow_step"].run_device(
        x=inputs["x"],
        condition=tables["condition"],
        modulation=tables["modulation"][0],
        closing=tables["closing"][0],
    )["velocity"]


def sound(state: State) -> dict[str, Any]:
    """Mel decoder and vocoder in every layout and precision: error in dB and time; the fastest good one is kept."""
    size, device = state.size, state.device
    g = size.geometry
    window_frames = g.window_latents * g.mel_frames_per_latent
    found: dict[str, Any] = {}
    rng = state.rng(8)
    latents = torch.randn(1, g.latent_channels // 2, g.window_latents, g.latent_bins, device=device, generator=rng)
    mel = torch.randn(2, g.mel_bins, window_frames, device=device, generator=rng) - 5
    for name, wrap, given, work in (
        ("mel_decoder", ChannelsLastMelDecoder, {"latents": latents}, flops("mel_decoder", size)),
        ("vocoder", ChannelsLastVocoder, {"mel": mel}, flops("vocoder", size, batch=2, mel_frames=window_frames)),
    ):
        stage: Any = make_stage(name, size, device)
        small = {key: value[..., : size.vocoder_frames] if key == "mel" else value for key, value in given.items()}
        with exact_float32, torch.no_grad():
            expected = stage(**small)
        vocoder_s = state.time_left() / 2 if name == "mel_decoder" else 0.0
        best: tuple[float, str] | None = None
        found[name] = {}
        for layout in ("plain", "channels_last"):
            for precision in ("fp32", "tf32", "fp16", "bf16"):
                if best is not None and state.time_left() < vocoder_s + SOUND_FORM_S:
                    found[name]["left_out"] = "time was short"
                    continue
                module: nn.Module = wrap(stage) if layout == "channels_last" else copy.deepcopy(stage)
                module = module.to(DTYPES.get(precision, torch.float32))
                label = f"{precision}, {layout}"
                with exact_float32 if precision == "fp32" else contextlib.nullcontext(), torch.no_grad():
                    error_db = 20 * float(np.log10(max(relative_error(module(**small), expected), 1e-12)))
                    entry: dict[str, Any] = timed(partial(module, **given), device, 3, 1)
                entry |= {"error_db": error_db, **state.fraction(work, entry["median_s"])}
                found[name][label] = entry
                state.say(f"{name}, {label}: {entry['median_s'] * 1e3:.1f} ms, {error_db:.1f} dB")
                # TF32, which the release runs, is for comparison: packages do without
                good = error_db < SOUND_LIMIT_DB and precision != "tf32"
                if good and (best is None or entry["median_s"] < best[0]):
                    best = (entry["median_s"], label)
                    found[name]["chosen"] = label
                    # at once: a form that takes too long ends this section, and songs need what was found before
                    state.engines[name] = part_engine(StagePart(name, module, OUTPUTS[name]), device)
                state.partial(found)
        assert best is not None
        state.say(f"{name}: chosen {best[1]}")
    return found


def stage_times(state: State) -> dict[str, Any]:
    """Time and rate of one evaluation of denoiser and flow, at several lengths and row counts."""
    size, device, found = state.size, state.device, dict[str, Any]()
    for seconds in size.seconds:
        n_frames = size.geometry.n_codes(round(seconds * size.geometry.sample_rate_hz))
        for n_rows in (n_frames, max(1, n_frames // 4), 1):
            inputs = denoiser_inputs(state, n_frames, n_rows)
            entry: dict[str, Any] = timed(partial(run_stage, state, inputs), device, size.repeat)
            work = flops("denoiser", size, n_frames=n_frames, n_rows=n_rows)
            found[f"denoiser_T{n_frames}_R{n_rows}"] = entry | state.fraction(work, entry["median_s"])
    for name, n_songs in (("flow_guided_step", 1), ("flow_guided_step_of_4_songs", 4)):
        entry = timed(partial(run_stage, state, flow_inputs(state, n_songs)), device, size.repeat)
        found[name] = entry | state.fraction(flops("flow", size, batch=2 * n_songs), entry["median_s"])
    for name, value in found.items():
        share = f", {value['of_ceiling']:.0%} of the ceiling" if value["of_ceiling"] else ""
        state.say(f"{name}: {value['median_s'] * 1e3:.2f} ms, {value['tflops']:.3g} TFLOP/s{share}")
    return found
