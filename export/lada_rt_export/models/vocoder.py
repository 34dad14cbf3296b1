"""HiFi-GAN vocoder: log-mel to 48 kHz waveform. Source: mucodec spec 7."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.mucodec_common import check_positive

__all__ = ["DEAD_KEYS", "KEY_PREFIX", "Vocoder", "VocoderConfig", "vocode_in_chunks"]

#: what the names start with in audioldm_48k.pth, inside its entry "state_dict"
KEY_PREFIX = "first_stage_model.vocoder."
#: every stored name is read
DEAD_KEYS: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VocoderConfig:
    """Sizes of the vocoder; the defaults are the released ones (mucodec spec 7)."""

    n_mels: int = 256
    initial_channels: int = 1536
    rates: tuple[int, ...] = (6, 5, 4, 2, 2)
    kernels: tuple[int, ...] = (12, 10, 8, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11, 15)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 4

    def __post_init__(self) -> None:
        check_positive(self, "n_mels", "initial_channels")
        if not self.rates or len(self.rates) != len(self.kernels):
            raise ParamError(
                f"VocoderConfig: rates and kernels must have the same length, got {len(self.rates)} and "
                f"{len(self.kernels)}; correct the config"
            )
        if not self.resblock_kernels or len(self.resblock_kernels) != len(self.dilations):
            raise ParamError(
                f"VocoderConfig: resblock_kernels and dilations must have the same length, got "
                f"{len(self.resblock_kernels)} and {len(self.dilations)}; correct the config"
            )
        if not all(1 <= rate <= kernel for rate, kernel in zip(self.rates, self.kernels, strict=True)):
            raise ParamError(
                f"VocoderConfig: every rate must be 1 or more and at most its kernel, got {self.rates} and "
                f"{self.kernels}; correct the config"
            )
        if not all(kernel % 2 for kernel in self.resblock_kernels) or min(map(min, self.dilations)) < 1:
            raise ParamError(
                f"VocoderConfig: resblock_kernels must be odd and dilations 1 or more, got {self.resblock_kernels} and "
                f"{self.dilations}; correct the config"
            )
        if self.initial_channels % 2 ** len(self.rates):
            raise ParamError(
                f"VocoderConfig.initial_channels must be a multiple of {2 ** len(self.rates)}, got "
                f"{self.initial_channels}; correct the config"
            )

    def n_samples(self, n_frames: int) -> int:
        """Samples that `n_frames` mel frames become: 480 F + 16 for the released sizes."""
        n = n_frames
        for rate, kernel in zip(self.rates, self.kernels, strict=True):
            n = (n - 1) * rate + kernel - 2 * ((kernel - rate) // 2)
        return n


class Upsampling(nn.ConvTranspose1d):
    """A transposed convolution that is right on the CPU too.

    torch hands it to oneDNN there, which races with itself: with kernel 10 and stride 5, on two threads, one call in
    three is wrong by 30 % of the largest sample (torch 2.13 with oneDNN 3.12, AVX-512, in float32 and bfloat16). One
    product and a sum of overlapping columns is the same operator, as fast and closer to float64.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, N] -> [B, C', (N - 1) * stride + kernel - 2 * padding]."""
        if not x.is_cpu or torch.onnx.is_in_onnx_export():
            return super().forward(x, output_size)
        assert self.bias is not None
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        columns = self.weight.flatten(1).t() @ x  # [B, C' * kernel, N]
        width = (x.shape[2] - 1) * stride + kernel - 2 * padding
        added = F.fold(columns, (1, width), (1, kernel), stride=(1, stride), padding=(0, padding))
        return added.squeeze(2) + self.bias[:, None]


class ResBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each pair residual."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Vocoder(nn.Module):
    """Log-mel to waveform. State-dict names are those of audioldm_48k.pth without KEY_PREFIX."""

    def __init__(self, config: VocoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VocoderConfig()
        width = config.initial_channels
        self.conv_pre = nn.Conv1d(config.n_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            # (k - u) odd leaves one extra sample at the end; the released model has that stage
            self.ups.append(Upsampling(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            for size, dilations in zip(config.resblock_kernels, config.dilations, strict=True):
                self.resblocks.append(ResBlock(width, size, dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)
        self.eval().requires_grad_(False)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, n_mels, F] -> [B, 1, config.n_samples(F)], in the dtype of the weights."""
        n_kernels = len(self.config.resblock_kernels)
        x = self.conv_pre(mel.to(self.conv_pre.weight.dtype))
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            first, *others = self.resblocks[stage * n_kernels : (stage + 1) * n_kernels]
            total = first(x)
            for block in others:
                total = total + block(x)
            x = total * (1.0 / n_kernels)
        # the last slope is 0.01, all others 0.1
        return torch.tanh(self.conv_post(F.leaky_relu(x, 0.01)))


@torch.no_grad()
def vocode_in_chunks(vocoder: Vocoder, mel: Tensor, chunk_frames: int = 1024, shift_frames: int = 256) -> Tensor:
    """Vocode in overlapping chunks with linear crossfades, as the public code does.

    Three times the work of one pass for the same sound: for parity checks and the baseline measurement.

    Args:
        mel: [B, n_mels, F] float32.
        chunk_frames: frames in a chunk.
        shift_frames: frames between chunk starts, 0 < shift_frames < chunk_frames.

    Returns:
        [B, N] float32; a mel shorter than a chunk gives a multiple of 1024 samples.

    Raises:
        ParamError: shift_frames is out of range.

    Source: mucodec spec 7.1.
    """
    if not 0 < shift_frames < chunk_frames:
        raise ParamError(
            f"shift_frames must lie between 0 and chunk_frames = {chunk_frames}, got {shift_frames}; "
            "the public code uses 256 of 1024"
        )
    start = 0
    out = vocoder(mel[:, :, :chunk_frames])[:, 0]
    kept = out.shape[1] // 1024 * 1024
    out = out[:, :kept]
    overlap = int(kept * (chunk_frames - shift_frames) / chunk_frames)
    rising = torch.linspace(0, 1, overlap, dtype=torch.float64, device=mel.device)
    while start + chunk_frames < mel.shape[2]:
        start += shift_frames
        chunk = vocoder(mel[:, :, start : start + chunk_frames])[:, 0, :kept]
        fade = out[:, -overlap:] * (1 - rising) + chunk[:, :overlap] * rising  # float64, as the public code
        out = torch.cat([out[:, :-overlap], fade.to(out.dtype), chunk[:, overlap:]], dim=1)
    return out
