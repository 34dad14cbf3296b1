"""How much device memory a song needs, from sizes alone: what `inspect --device cuda` prints. Needs no torch.

An estimate of what the loops hold, meant to be right within a third; bench/gpu_check.py prints the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from lada_rt.bench.graph_sizes import bundle_sizes
from lada_rt.bench.roofline import DenoiserSizes, FlowSizes, MelDecoderSizes, ModelSizes, VocoderSizes
from lada_rt.bundle import Bundle
from lada_rt.engines.cache import list_engines
from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop.buckets import row_bucket

__all__ = ["MemoryPlan", "bundle_plans", "memory_plan"]

FLOAT32_BYTES = 4
#: lengths a bundle's plan is made for, as far as it takes them
PLAN_SECONDS = (30.0, 163.84, 240.0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of device memory for songs of one length.

    Attributes:
        weights: of all engines.
        denoise, flow, mel_decoder, vocoder: activations and fixed tensors of each part.
        peak: weights and the parts that are live together: the denoiser's graphs stay, and the next window's flow
            runs beside mel decoder and vocoder.
    """

    weights: int
    denoise: int
    flow: int
    mel_decoder: int
    vocoder: int
    peak: int


def memory_plan(
    weight_bytes: int,
    geometry: CodecGeometry,
    seconds: float,
    sizes: ModelSizes | None = None,
    *,
    half_bytes: int = 2,
    sound_bytes: int = 4,
    n_songs: int = 1,
) -> MemoryPlan:
    """Estimate the memory of `n_songs` songs of `seconds`, decoded together.

    Args:
        weight_bytes: of all engines (their packages' bytes).
        geometry: rates and window sizes.
        seconds: length of the longest song.
        sizes: of the networks; one that is not known counts as the released one.
        half_bytes: bytes of an activation in denoiser and flow.
        sound_bytes: bytes of an activation in mel decoder and vocoder.
        n_songs: windows in one batch.
    """
    sizes = sizes or ModelSizes()
    denoiser_sizes, flow_sizes = sizes.denoiser or DenoiserSizes(), sizes.flow or FlowSizes()
    widths, vocoder_sizes = (sizes.mel_decoder or MelDecoderSizes()).widths, sizes.vocoder or VocoderSizes()
    n_frames = geometry.n_codes(round(seconds * geometry.sample_rate_hz))
    # residual, norm, q, k, v, attention and three feed-forward maps are alive at once at worst
    token_bytes = (6 * denoiser_sizes.hidden + 3 * denoiser_sizes.intermediate) * half_bytes
    buckets = sorted({row_bucket(n, n_frames) for n in range(1, n_frames + 1)})
    # once in the graphs' memory, once in the allocator's from the run before the first capture
    denoise = 2 * n_frames * token_bytes + sum(buckets) * denoiser_sizes.vocab * FLOAT32_BYTES

    tokens = geometry.window_latents * geometry.latent_bins // flow_sizes.patch_area
    per_token = flow_sizes.dim * (3 * FLOAT32_BYTES + 4 * half_bytes) + flow_sizes.ffn * half_bytes
    flow = 2 * 2 * n_songs * tokens * per_token

    mel_frames = geometry.window_latents * geometry.mel_frames_per_latent
    # the last level takes the maps of the one before at full resolution
    mel_map = mel_frames * geometry.mel_bins * widths[min(1, len(widths) - 1)]
    # group norm works in float32 on a map it may have to widen: input, centred, scaled and output
    mel_decoder = mel_map * (2 * sound_bytes + 2 * FLOAT32_BYTES)

    largest, channels, frames = 0, vocoder_sizes.initial, mel_frames
    for rate in vocoder_sizes.rates:
        channels, frames = channels // 2, frames * rate
        largest = max(largest, channels * frames)
    vocoder = 2 * 6 * largest * sound_bytes  # two audio channels; stage input, sum, and four maps of a block
    return MemoryPlan(
        weights=weight_bytes,
        denoise=denoise,
        flow=flow,
        mel_decoder=mel_decoder,
        vocoder=vocoder,
        peak=weight_bytes + denoise + flow + max(mel_decoder, vocoder),
    )


def bundle_plans(bundle: Bundle) -> dict[float, MemoryPlan]:
    """The plan of a bundle's engines on a GPU for some lengths in seconds, the longest one last.

    A stage that has no engine for a GPU yet counts with its graph's bytes.
    """
    weights = {name: stage.bytes for name, stage in bundle.stages.items()}
    for entry in list_engines(bundle):
        if entry.key.arch.startswith("sm_") and entry.key.stage in weights:
            weights[entry.key.stage] = sum(file.bytes for file in entry.files)
    precisions = {name: stage.precision for name, stage in bundle.stages.items()}
    sizes = bundle_sizes(bundle)
    seconds = sorted({*(s for s in PLAN_SECONDS if s < bundle.max_seconds), bundle.max_seconds})
    return {
        s: memory_plan(
            sum(weights.values()),
            bundle.geometry,
            s,
            sizes,
            half_bytes=FLOAT32_BYTES if "fp32" in (precisions["denoiser"], precisions["flow"]) else 2,
            sound_bytes=FLOAT32_BYTES if "fp32" in (precisions["mel_decoder"], precisions["vocoder"]) else 2,
        )
        for s in seconds
    }
