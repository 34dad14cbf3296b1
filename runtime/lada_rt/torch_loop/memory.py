"""How much device memory a song needs, from the sizes alone: what `inspect --device cuda` prints.

An estimate of what the loops hold, meant to be right within a third; bench/gpu_check.py prints the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop.denoise import row_bucket

__all__ = ["MemoryPlan", "ModelSizes", "memory_plan"]

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes that activations depend on; the defaults are the released ones.

    Attributes:
        hidden, intermediate, vocab: of the denoiser.
        flow_dim, flow_patch, flow_ffn: token width, patch edge and feed-forward multiple of the flow.
        mel_channels: channels of the mel decoder's largest map, which has its full resolution.
        vocoder_channels: channels of the vocoder's first map.
        vocoder_rates: its upsampling factors.
        half_bytes: bytes of an activation in denoiser and flow.
        sound_bytes: bytes of an activation in mel decoder and vocoder.
    """

    hidden: int = 2048
    intermediate: int = 8192
    vocab: int = 16384
    flow_dim: int = 1584
    flow_patch: int = 2
    flow_ffn: int = 4
    mel_channels: int = 256
    vocoder_channels: int = 1536
    vocoder_rates: tuple[int, ...] = (6, 5, 4, 2, 2)
    half_bytes: int = 2
    sound_bytes: int = 4


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
    n_songs: int = 1,
) -> MemoryPlan:
    """Estimate the memory of `n_songs` songs of `seconds`, decoded together.

    Args:
        weight_bytes: of all engines (their packages' bytes).
        geometry: rates and window sizes.
        seconds: length of the longest song.
        sizes: of the networks.
        n_songs: windows in one batch.
    """
    s = sizes or ModelSizes()
    n_frames = geometry.n_codes(round(seconds * geometry.sample_rate_hz))
    # residual, norm, q, k, v, attention and three feed-forward maps are alive at once at worst
    token_bytes = (6 * s.hidden + 3 * s.intermediate) * s.half_bytes
    buckets = sorted({row_bucket(n, n_frames) for n in range(1, n_frames + 1)})
    # once in the graphs' memory, once in the allocator's from the run before the first capture
    denoise = 2 * n_frames * token_bytes + sum(buckets) * s.vocab * FLOAT32_BYTES

    tokens = geometry.window_latents * geometry.latent_bins // s.flow_patch**2
    per_token = s.flow_dim * (3 * FLOAT32_BYTES + (4 + s.flow_ffn) * s.half_bytes)
    flow = 2 * 2 * n_songs * tokens * per_token

    mel_frames = geometry.window_latents * geometry.mel_frames_per_latent
    mel_map = mel_frames * geometry.mel_bins * s.mel_channels
    # group norm works in float32 on a map it may have to widen: input, centred, scaled and output
    mel_decoder = mel_map * (2 * s.sound_bytes + 2 * FLOAT32_BYTES)

    largest, channels, frames = 0, s.vocoder_channels, mel_frames
    for rate in s.vocoder_rates:
        channels, frames = channels // 2, frames * rate
        largest = max(largest, channels * frames)
    vocoder = 2 * 6 * largest * s.sound_bytes  # two audio channels; stage input, sum, and four maps of a block
    return MemoryPlan(
        weights=weight_bytes,
        denoise=denoise,
        flow=flow,
        mel_decoder=mel_decoder,
        vocoder=vocoder,
        peak=weight_bytes + denoise + flow + max(mel_decoder, vocoder),
    )
