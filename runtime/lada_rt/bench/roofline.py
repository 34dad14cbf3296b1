"""Floating-point operations and bytes of each stage, and the least time they take on a device.

Counts are of matrix products and convolutions, a multiply-add as 2; bytes are those no implementation avoids: weights
once per evaluation, the stage's inputs and outputs. The floor of a stage is the longer of the two at the device's
peaks. Source: spec/lada_band g, spec/mucodec 10, spec/clamp3 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lada_rt.errors import ParamError
from lada_rt.geometry import CodecGeometry
from lada_rt.schedule import mask_counts

__all__ = [
    "DenoiserSizes",
    "EncoderSizes",
    "FlowSizes",
    "MelDecoderSizes",
    "ModelSizes",
    "Peaks",
    "RefEncoderSizes",
    "TextEncoderSizes",
    "VocoderSizes",
    "Work",
    "floor_seconds",
    "song_work",
]

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and bytes; works add up and scale."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What a device can do: matrix operations per second, and bytes per second between memory and cores."""

    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.flops_per_s > 0 and self.bytes_per_s > 0):
            raise ParamError(f"peaks: expected two positive rates, got {self.flops_per_s!r} and {self.bytes_per_s!r}")


def floor_seconds(work: Work, peaks: Peaks) -> float:
    """Least time of `work`: arithmetic and traffic overlap perfectly, the slower of them decides."""
    return max(work.flops / peaks.flops_per_s, work.bytes / peaks.bytes_per_s)


@dataclass(frozen=True, slots=True)
class DenoiserSizes:
    """Defaults: the released 1B model (spec/lada_band a.4, g)."""

    hidden: int = 2048
    n_layers: int = 16
    kv_width: int = 512
    intermediate: int = 8192
    vocab: int = 16384
    prefix: int = 2

    @property
    def layer_params(self) -> int:
        """Linear parameters of one layer: q and o, k and v, the three of the MLP."""
        return self.hidden * (2 * self.hidden + 2 * self.kv_width + 3 * self.intermediate)

    def step_parts(self, n_frames: int) -> dict[str, float]:
        """FLOP of one evaluation with every row computed, by part: linear, attention, logits."""
        n = n_frames + self.prefix
        return {
            "linear": 2.0 * self.n_layers * self.layer_params * n,
            "attention": 4.0 * n * n * self.hidden * self.n_layers,
            "logits": 2.0 * self.hidden * self.vocab * n,
        }

    def step(self, n_frames: int, n_rows: int | None = None, value_bytes: int = FLOAT_BYTES) -> Work:
        """One evaluation that needs the logits of `n_rows` frames; None: of all, prefix included.

        The last layer's query, output and MLP are then needed for these rows only (spec/lada_band h.1).
        """
        parts = self.step_parts(n_frames)
        flops = sum(parts.values())
        rows = n_frames + self.prefix if n_rows is None else n_rows
        if n_rows is not None:
            n = n_frames + self.prefix
            row_params = self.layer_params - 2 * self.hidden * self.kv_width
            flops -= (n - rows) * (2.0 * row_params + 4.0 * n * self.hidden + 2.0 * self.hidden * self.vocab)
        params = self.n_layers * self.layer_params + self.hidden * self.vocab
        return Work(flops, value_bytes * (params + n_frames * self.hidden + rows * self.vocab))

    def run(self, n_frames: int, n_steps: int, value_bytes: int = FLOAT_BYTES) -> Work:
        """A whole run on the cosine schedule, masked rows only."""
        rows = [n_frames, *mask_counts(n_frames, n_steps)[:-1]]
        return sum((self.step(n_frames, n, value_bytes) for n in rows), Work())


@dataclass(frozen=True, slots=True)
class FlowSizes:
    """Defaults: the released estimator (spec/mucodec 4)."""

    dim: int = 1584
    n_layers: int = 24
    ffn: int = 6336
    in_channels: int = 96
    out_features: int = 128
    patch_area: int = 4
    time_features: int = 512

    def row_parts(self, n_tokens: int) -> dict[str, float]:
        """FLOP of one row of the batch (two rows with guidance), by part."""
        d = self.dim
        return {
            "linear": 2.0 * n_tokens * self.n_layers * (4 * d * d + 2 * d * self.ffn),
            "attention": 4.0 * n_tokens * n_tokens * d * self.n_layers,
            "patches": 2.0 * n_tokens * d * (self.in_channels * self.patch_area + self.out_features),
            "time": 2.0 * (self.time_features * d + 7 * d * d),
        }

    def step(self, n_tokens: int, batch: int, value_bytes: int = FLOAT_BYTES) -> Work:
        """One evaluation; its state goes in and out as float32 whatever the weights are."""
        d = self.dim
        params = self.n_layers * (4 * d * d + 2 * d * self.ffn) + 7 * d * d + self.time_features * d
        values = batch * n_tokens * (self.in_channels * self.patch_area + self.out_features)
        n_bytes = value_bytes * params + FLOAT_BYTES * values
        return Work(batch * sum(self.row_parts(n_tokens).values()), n_bytes)


@dataclass(frozen=True, slots=True)
class MelDecoderSizes:
    """Defaults: the released decoder (spec/mucodec 6). `widths` from the finest level to the coarsest."""

    widths: tuple[int, ...] = (128, 256, 512, 1024)
    n_res_blocks: int = 2
    latent_channels: int = 16

    def attention_flops(self, positions: int) -> float:
        width = self.widths[-1]
        return positions * (4 * 2.0 * width * width + 4.0 * positions * width)

    def channel(self, n_latents: int, n_bins: int, value_bytes: int = FLOAT_BYTES) -> Work:
        """One audio channel of one window; latents and mel are float32 whatever the weights are."""
        params = 0
        flops = 0.0

        def conv(c_in: int, c_out: int, area: int, positions: int) -> None:
            nonlocal params, flops
            params += area * c_in * c_out
            flops += 2.0 * area * c_in * c_out * positions

        def res_block(c_in: int, c_out: int, positions: int) -> None:
            conv(c_in, c_out, 9, positions)
            conv(c_out, c_out, 9, positions)
            if c_in != c_out:
                conv(c_in, c_out, 1, positions)

        positions, width = n_latents * n_bins, self.widths[-1]
        conv(self.latent_channels, self.latent_channels, 1, positions)
        conv(self.latent_channels, width, 9, positions)
        res_block(width, width, positions)
        res_block(width, width, positions)
        params += 4 * width * width
        flops += self.attention_flops(positions)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.n_res_blocks + 1):
                res_block(width, self.widths[level], positions)
                width = self.widths[level]
            if level:
                positions *= 4
                conv(width, width, 9, positions)
        conv(width, 1, 9, positions)
        values = n_latents * n_bins * self.latent_channels + positions
        return Work(flops, value_bytes * params + FLOAT_BYTES * values)


@dataclass(frozen=True, slots=True)
class VocoderSizes:
    """Defaults: the released vocoder (spec/mucodec 7)."""

    n_mels: int = 256
    initial: int = 1536
    rates: tuple[int, ...] = (6, 5, 4, 2, 2)
    kernels: tuple[int, ...] = (12, 10, 8, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11, 15)
    n_dilations: int = 3

    def frames(self, n_frames: int, value_bytes: int = FLOAT_BYTES) -> Work:
        """One audio channel of `n_frames` mel frames in one pass; mel and samples are always float32."""
        width, n = self.initial, n_frames
        params = 7 * self.n_mels * width
        flops = 2.0 * params * n
        for rate, kernel in zip(self.rates, self.kernels, strict=True):
            up = kernel * width * (width // 2)
            flops += 2.0 * up * n
            width //= 2
            n = (n - 1) * rate + kernel - 2 * ((kernel - rate) // 2)
            blocks = 2 * self.n_dilations * sum(self.block_kernels) * width * width
            flops += 2.0 * blocks * n
            params += up + blocks
        params += 7 * width
        flops += 2.0 * 7 * width * n
        return Work(flops, value_bytes * params + FLOAT_BYTES * (n_frames * self.n_mels + n))


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """Defaults: the layers of MuQ that are needed (spec/mucodec 2.6 to 2.8)."""

    conv_dim: int = 512
    dim: int = 1024
    n_layers: int = 6
    ffn: int = 4096
    depthwise: int = 31
    codebook: int = 16384
    codebook_dim: int = 32
    n_mels: int = 128

    def front_end_flops(self, n_codes: int) -> float:
        half, quarter = (self.n_mels // 2) * 2 * n_codes, (self.n_mels // 4) * n_codes
        width = self.conv_dim
        convs = 2 * 9.0 * (2 * width + width * width) * half + 2 * 9.0 * 3 * width * width * quarter
        return convs + 2.0 * width * (self.n_mels // 4) * self.dim * n_codes

    def layer_flops(self, n_codes: int) -> float:
        d = self.dim
        per_frame = 4 * d * self.ffn + 4 * d * d + 3 * d * d + self.depthwise * d
        return 2.0 * per_frame * n_codes + 4.0 * n_codes * n_codes * d

    def vq_flops(self, n_codes: int) -> float:
        return 2.0 * n_codes * self.codebook_dim * (self.dim + self.codebook)

    def window(self, n_codes: int, n_samples: int) -> Work:
        """One window of `n_codes` codes from two channels of `n_samples` samples."""
        d = self.dim
        flops = self.front_end_flops(n_codes) + self.n_layers * self.layer_flops(n_codes) + self.vq_flops(n_codes)
        params = 9 * (2 * self.conv_dim + 4 * self.conv_dim**2) + self.conv_dim * (self.n_mels // 4) * d
        params += self.n_layers * (4 * d * self.ffn + 7 * d * d + self.depthwise * d)
        params += self.codebook_dim * (d + self.codebook)
        return Work(flops, FLOAT_BYTES * (params + 2 * n_samples))


@dataclass(frozen=True, slots=True)
class TextEncoderSizes:
    """Defaults: CLaMP 3's text branch (spec/clamp3 2)."""

    hidden: int = 768
    n_layers: int = 12
    intermediate: int = 3072
    output: int = 768

    @property
    def layer_params(self) -> int:
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate

    def tokens(self, n_tokens: int) -> Work:
        h = self.hidden
        flops = self.n_layers * (2.0 * self.layer_params * n_tokens + 4.0 * n_tokens * n_tokens * h)
        params = self.n_layers * self.layer_params + h * self.output
        return Work(flops + 2.0 * h * self.output, FLOAT_BYTES * (params + n_tokens * h))


@dataclass(frozen=True, slots=True)
class RefEncoderSizes:
    """Defaults: MERT-v1-95M and CLaMP 3's audio branch (spec/clamp3 4, 5)."""

    conv: int = 512
    hidden: int = 768
    n_layers: int = 12
    intermediate: int = 3072
    pos_kernel: int = 128
    pos_groups: int = 16
    clamp_layers: int = 12
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    def n_frames(self, n_samples: int) -> int:
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            n_samples = (n_samples - kernel) // stride + 1
        return n_samples

    def chunk_parts(self, n_samples: int) -> dict[str, float]:
        """FLOP of MERT on one chunk, by part."""
        parts = {"conv": 0.0}
        n, c_in = n_samples, 1
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            n = (n - kernel) // stride + 1
            parts["conv"] += 2.0 * kernel * c_in * self.conv * n
            c_in = self.conv
        h = self.hidden
        parts["projection"] = 2.0 * self.conv * h * n
        parts["linear"] = 2.0 * self.n_layers * (4 * h * h + 2 * h * self.intermediate) * n
        parts["attention"] = 4.0 * n * n * h * self.n_layers
        parts["positions"] = 2.0 * h * (h // self.pos_groups) * self.pos_kernel * n
        return parts

    def clamp_flops(self) -> float:
        """CLaMP 3's branch on one vector: attention over one position is its value."""
        h = self.hidden
        return 2.0 * self.clamp_layers * (2 * h * h + 2 * h * self.intermediate)

    def chunk(self, n_samples: int) -> Work:
        h = self.hidden
        params = self.n_layers * (4 * h * h + 2 * h * self.intermediate) + h * (h // self.pos_groups) * self.pos_kernel
        params += sum(k * self.conv * self.conv for k in self.kernels[1:]) + self.clamp_layers * 8 * h * h
        return Work(sum(self.chunk_parts(n_samples).values()) + self.clamp_flops(), FLOAT_BYTES * (params + n_samples))


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of the stages of one bundle; None where they are not known."""

    encoder: EncoderSizes | None = EncoderSizes()
    text_encoder: TextEncoderSizes | None = TextEncoderSizes()
    denoiser: DenoiserSizes | None = DenoiserSizes()
    flow: FlowSizes | None = FlowSizes()
    mel_decoder: MelDecoderSizes | None = MelDecoderSizes()
    vocoder: VocoderSizes | None = VocoderSizes()


def song_work(
    sizes: ModelSizes,
    geometry: CodecGeometry,
    *,
    n_samples: int,
    n_steps: int,
    flow_steps: int,
    guided: bool = True,
    n_tokens: int | None = None,
    value_bytes: Mapping[str, int] | None = None,
) -> Mapping[str, Work]:
    """What one song needs at least, stage by stage.

    Only what the output depends on: the encoder windows that give codes, logits of masked rows, the waveform of the
    last window up to the song's end.

    Args:
        sizes: of the networks; a stage without sizes is left out.
        geometry: rates and windows.
        n_samples: of the vocal, at the codec's rate.
        n_steps: denoising steps, cosine schedule.
        flow_steps: Euler steps.
        guided: two flow evaluations per step instead of one.
        n_tokens: of the text; None: there is none.
        value_bytes: stage -> bytes of a weight, where it is not 4.
    """
    size = dict.fromkeys(("denoiser", "flow", "mel_decoder", "vocoder"), FLOAT_BYTES) | dict(value_bytes or {})
    n_codes = geometry.n_codes(n_samples)
    n_windows = geometry.n_windows(n_codes)
    work: dict[str, Work] = {}
    if sizes.encoder is not None:
        window = sizes.encoder.window(geometry.encode_window_codes, geometry.encode_window_samples)
        work["encoder"] = window * math.ceil(n_codes / geometry.encode_window_codes)
    if sizes.text_encoder is not None and n_tokens is not None:
        work["text_encoder"] = sizes.text_encoder.tokens(n_tokens)
    if sizes.denoiser is not None:
        work["denoiser"] = sizes.denoiser.run(n_codes, n_steps, size["denoiser"])
    if sizes.flow is not None:
        n_patches = geometry.window_latents * geometry.latent_bins // sizes.flow.patch_area
        step = sizes.flow.step(n_patches, 2 if guided else 1, size["flow"])
        work["flow"] = step * (flow_steps * n_windows)
    if sizes.mel_decoder is not None:
        channel = sizes.mel_decoder.channel(geometry.window_latents, geometry.latent_bins, size["mel_decoder"])
        work["mel_decoder"] = channel * (2 * n_windows)
    if sizes.vocoder is not None:
        work["vocoder"] = _vocoder_work(
            sizes.vocoder, geometry, geometry.n_samples(n_codes), n_windows, size["vocoder"]
        )
    return work


def _vocoder_work(
    sizes: VocoderSizes, geometry: CodecGeometry, n_samples: int, n_windows: int, value_bytes: int
) -> Work:
    lengths: Sequence[int] = [
        min(geometry.window_samples, n_samples - index * geometry.hop_samples) for index in range(n_windows)
    ]
    frames = [math.ceil(length / geometry.samples_per_mel_frame) for length in lengths]
    return sum((sizes.frames(n, value_bytes) * 2 for n in frames), Work())
